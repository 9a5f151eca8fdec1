"""The lists the matrix of tests runs over. A rule or composite missing here fails `test_coverage`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrpfunc as lrp

LINEAR_RULES: dict[str, lrp.Rule] = {
    "epsilon": lrp.Epsilon(0.1),
    "epsilon_zero": lrp.Epsilon(0.0),
    "epsilon_clip": lrp.Epsilon(lrp.Stabilizer(0.1, clip=True)),
    "epsilon_norm_scale": lrp.Epsilon(lrp.Stabilizer(0.1, norm_scale=True)),
    "epsilon_zero_bias": lrp.Epsilon(0.1, zero_params="bias"),
    "zplus": lrp.ZPlus(0.01),
    "zplus_zero_bias": lrp.ZPlus(0.01, zero_params="bias"),
    "alpha_beta": lrp.AlphaBeta(2.0, 1.0, 0.01),
    "alpha_beta_one_sided": lrp.AlphaBeta(1.0, 0.0, 0.01),
    "gamma": lrp.Gamma(0.25, 0.01),
    "gamma_zero_bias": lrp.Gamma(0.25, 0.01, zero_params=["bias"]),
    "zbox": lrp.ZBox(-3.0, 3.0, 0.01),
    "wsquare": lrp.WSquare(0.01),
    "flat": lrp.Flat(0.01),
    "gradient": lrp.Gradient(),
    "gradient_of_relevance": lrp.Gradient("relevance"),
    "stop": lrp.Stop(),
    "uniform": lrp.Uniform(),
    "combination": 2 * lrp.Epsilon(0.1) - 0.5 * lrp.ZPlus(0.01),
}
"""For dense layers and convolutions; stabilizers large enough that derivatives are tame."""

ELEMENTWISE_RULES: dict[str, lrp.Rule] = {
    "pass": lrp.Pass(),
    "gradient": lrp.Gradient(),
    "deconvnet": lrp.ReLUDeconvNet(),
    "guided_backprop": lrp.ReLUGuidedBackprop(),
    "beta_smooth": lrp.ReLUBetaSmooth(3.0),
}
"""For activations."""

SUM_RULES: dict[str, lrp.Rule] = {"norm": lrp.Norm(0.1), "uniform": lrp.Uniform(), "stop": lrp.Stop()}
"""For sums and average pooling."""

ATTENTION_RULES: dict[str, lrp.Rule] = {
    "taylor": lrp.TaylorSoftmax(),
    "taylor_omit": lrp.TaylorSoftmax("omit", 0.1),
    "taylor_distribute": lrp.TaylorSoftmax("distribute"),
    "signal": lrp.SignalTakesAll(),
    "uniform": lrp.Uniform(),
}
"""For softmax, products, attention and normalizations."""

COMPOSITES: dict[str, lrp.Composite] = {
    "epsilon": lrp.epsilon(0.1, stabilizer=0.1),
    "epsilon_gamma_box": lrp.epsilon_gamma_box(-3.0, 3.0, 0.1, stabilizer=0.1),
    "attn_lrp": lrp.attn_lrp(),
    "cp_lrp": lrp.cp_lrp(),
    "mamba_lrp": lrp.mamba_lrp(),
    "epsilon_plus": lrp.epsilon_plus(0.1, stabilizer=0.1),
    "epsilon_plus_flat": lrp.epsilon_plus_flat(0.1, stabilizer=0.1),
    "epsilon_alpha2_beta1": lrp.epsilon_alpha2_beta1(0.1, stabilizer=0.1),
    "epsilon_alpha2_beta1_flat": lrp.epsilon_alpha2_beta1_flat(0.1, stabilizer=0.1),
    "excitation_backprop": lrp.excitation_backprop(stabilizer=0.1),
    "gradient": lrp.gradient(),
    "deconvnet": lrp.deconvnet(),
    "guided_backprop": lrp.guided_backprop(),
    "beta_smooth": lrp.beta_smooth(3.0),
}


@dataclass
class Case:
    """A model function, its parameters and an input, in float64."""

    model_fn: Callable[..., Any]
    params: dict[str, Any]
    x: Tensor
    rules: lrp.Composite | None = None


class Residual(nn.Module):
    """Convolution and batch norm, an in-place ReLU used twice, a residual sum, average pooling, a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        return self.fc(self.drop(self.pool(self.relu(y)).mean((2, 3))))


class Smooth(nn.Module):
    """Activations without kinks, a batch norm that cannot be merged, a concatenation and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.conv = nn.Conv1d(2, 4, 3, stride=2)
        self.up = nn.ConvTranspose1d(4, 2, 2)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.conv(F.silu(self.norm(x))))
        z = torch.tanh(self.up(y))
        z = torch.cat([z, F.softplus(y[:, :, :1]).expand(-1, -1, 2).reshape(len(x), 2, 4)[..., :2]], -1)
        return self.head(z.flatten(1))


def functional_mlp(params: dict[str, Any], x: Tensor) -> Tensor:
    """No module anywhere; a bias that is added by hand, and `addmm`."""
    hidden = F.elu(x @ params["first"]["w"] + params["first"]["b"])
    return torch.addmm(params["second"]["b"], hidden, params["second"]["w"])


def randomized(module: nn.Module, seed: int = 0) -> Any:
    """In float64 and evaluation mode, every parameter and running statistic drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if "running_var" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                scale = 0.5 if tensor.ndim == 1 else 1.5 / tensor[0].numel() ** 0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def residual() -> Case:
    return Case(*lrp.from_module(randomized(Residual())), normal(2, 2, 6, 6))


def smooth() -> Case:
    return Case(*lrp.from_module(randomized(Smooth())), normal(2, 2, 6, seed=1))


def mlp() -> Case:
    params = {
        "first": {"w": normal(5, 6, seed=2), "b": normal(6, seed=3)},
        "second": {"w": normal(6, 3, seed=4), "b": normal(3, seed=5)},
    }
    return Case(functional_mlp, params, normal(2, 5, seed=6))


MODELS: dict[str, Callable[[], Case]] = {"residual": residual, "smooth": smooth, "mlp": mlp}


def with_rule(rule: lrp.Rule) -> lrp.Composite:
    """A composite that gives every dense layer and convolution the same rule."""
    base = [(lrp.Activation, lrp.Pass()), (lrp.BatchNorm, lrp.Pass()), (lrp.Sum | lrp.AvgPool, lrp.Norm(0.1))]
    return lrp.Composite([(lrp.Dense | lrp.Convolution, rule), *base])
