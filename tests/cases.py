"""The lists the matrix of tests runs over. A rule or composite missing here fails `tests/test_public.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
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


@cache
def residual() -> Case:
    return Case(*lrp.from_module(randomized(Residual())), normal(2, 2, 6, 6))


@cache
def smooth() -> Case:
    return Case(*lrp.from_module(randomized(Smooth())), normal(2, 2, 6, seed=1))


@cache
def mlp() -> Case:
    params = {
        "first": {"w": normal(5, 6, seed=2), "b": normal(6, seed=3)},
        "second": {"w": normal(6, 3, seed=4), "b": normal(3, seed=5)},
    }
    return Case(functional_mlp, params, normal(2, 5, seed=6))


MODELS: dict[str, Callable[[], Case]] = {"residual": residual, "smooth": smooth, "mlp": mlp}
"""Each is made once, so that it is captured once."""


def with_rule(rule: lrp.Rule) -> lrp.Composite:
    """A composite that gives every dense layer and convolution the same rule."""
    base = [(lrp.Activation, lrp.Pass()), (lrp.BatchNorm, lrp.Pass()), (lrp.Sum | lrp.AvgPool, lrp.Norm(0.1))]
    return lrp.Composite([(lrp.Dense | lrp.Convolution, rule), *base])


# ---------------------------------------------------------------------------------------------------------------------
# Attention, gates, recurrence and scans


class Transformer(nn.Module):
    """Attention written out and masked by infinity, native layer norms, a SwiGLU, residual connections, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        future = torch.ones(3, 3, dtype=torch.bool, device=x.device).triu(1)
        weights = (q @ k.mT / math.sqrt(2)).masked_fill(future, -torch.inf).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        x = x + self.down(F.silu(gate) * value)
        return self.head(x.mean(1))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.01))


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def fused_attention(params: dict[str, Any], x: Tensor) -> Tensor:
    """Four queries that share two keys and values, in torch's own attention; a norm and an activation written out."""
    h = rms_norm(x, params["norm"])
    q, k, v = (F.linear(h, params[name]).unflatten(-1, (-1, 2)).transpose(1, 2) for name in "qkv")
    past = torch.ones(3, 3, dtype=torch.bool, device=x.device).tril()
    attended = F.scaled_dot_product_attention(q, k, v, past, enable_gqa=True).transpose(1, 2).flatten(2)
    x = x + F.linear(attended, params["out"])
    x = x + F.linear(tanh_gelu(F.linear(x, params["up"])), params["down"])
    return F.linear(rms_norm(x[:, -1], params["norm"]), params["head"])


class Recurrent(nn.Module):
    """All states of an LSTM, and the last ones of a GRU that runs in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, batch_first=True)
        self.gru = nn.GRU(3, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        _, last = self.gru(states)
        return self.head(last.transpose(0, 1).flatten(1))


def selective_scan(params: dict[str, Any], x: Tensor) -> Tensor:
    """A state space model whose decay, input and output depend on what it reads, gated."""
    u, gate = (x @ params["in"]).chunk(2, -1)
    u = F.silu(u)
    step = F.softplus(u @ params["step"])
    decay = torch.exp(-step[..., None] * params["decay"].exp())
    drive = (step * u)[..., None] * (u @ params["write"])[:, :, None]
    read = (u @ params["read"])[:, :, None]
    state, outputs = torch.zeros_like(drive[:, 0]), []
    for t in range(x.shape[1]):
        state = decay[:, t] * state + drive[:, t]
        outputs.append((state * read[:, t]).sum(-1))
    y = torch.stack(outputs, 1) + params["skip"] * u
    return (y * F.silu(gate)).mean(1) @ params["head"]


class Gated(nn.Module):
    """A group norm, a GLU, squeeze and excitation, and the cosine of what is left with three prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.squeeze, self.excite = nn.Linear(4, 2), nn.Linear(2, 4)
        self.prototypes = nn.Parameter(torch.empty(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.norm(self.conv(x)), 1)
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3))))))
        x = F.normalize(x * gate[:, :, None, None], dim=1).mean((2, 3))
        return F.cosine_similarity(x[:, None], self.prototypes, dim=-1)


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {name: 0.6 * normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


@cache
def transformer() -> Case:
    return Case(*lrp.from_module(randomized(Transformer())), normal(2, 3, 4, seed=1))


@cache
def fused() -> Case:
    projections = {"q": (8, 4), "k": (4, 4), "v": (4, 4), "out": (4, 8), "up": (5, 4), "down": (4, 5), "head": (3, 4)}
    return Case(fused_attention, drawn({"norm": (4,), **projections}), normal(2, 3, 4, seed=1))


@cache
def recurrent() -> Case:
    return Case(*lrp.from_module(randomized(Recurrent())), normal(2, 2, 3, seed=1))


@cache
def scan() -> Case:
    square = dict.fromkeys(("step", "head"), (3, 3))
    state = dict.fromkeys(("decay", "write", "read"), (3, 2))
    return Case(selective_scan, drawn({"in": (3, 6), "skip": (3,), **square, **state}), normal(2, 3, 3, seed=1))


@cache
def gated() -> Case:
    return Case(*lrp.from_module(randomized(Gated())), normal(2, 2, 4, 4, seed=1))


ATTENTION_MODELS: dict[str, Callable[[], Case]] = {
    "transformer": transformer,
    "fused": fused,
    "recurrent": recurrent,
    "scan": scan,
    "gated": gated,
}

MODULATED = lrp.Gate | lrp.Router | lrp.Recurrent | lrp.Scan | lrp.Attention

EVERY = tuple(ATTENTION_MODELS)


def in_front(selector: lrp.Selector, rule: lrp.Rule, rules: lrp.Composite) -> lrp.Composite:
    return lrp.Composite([(selector, rule)]) + rules


ATTENTION_COMPOSITES: dict[str, tuple[lrp.Composite | None, tuple[str, ...]]] = {
    "default": (None, EVERY),
    "attn_lrp": (lrp.attn_lrp(), EVERY),
    "cp_lrp": (lrp.cp_lrp(), EVERY),
    "mamba_lrp": (lrp.mamba_lrp(), ("recurrent", "scan", "gated")),
    "gradient": (lrp.gradient(), EVERY),
    "attn_lrp+epsilon_gamma_box": (lrp.attn_lrp() + lrp.epsilon_gamma_box(-3.0, 3.0, 0.1, stabilizer=0.1), EVERY),
    "attn_lrp+epsilon_plus": (lrp.attn_lrp() + lrp.epsilon_plus(0.1, stabilizer=0.1), EVERY),
    "cp_lrp+epsilon_plus_flat": (lrp.cp_lrp() + lrp.epsilon_plus_flat(0.1, stabilizer=0.1), EVERY),
    **{
        f"{name}+attn_lrp": (in_front(lrp.Softmax, ATTENTION_RULES[name], lrp.attn_lrp()), ("transformer",))
        for name in ("taylor_omit", "taylor_distribute")
    },
    "signal+attn_lrp": (
        in_front(MODULATED, lrp.SignalTakesAll(), lrp.attn_lrp()),
        ("transformer", "fused", "scan", "gated"),
    ),
    "uniform+cp_lrp": (in_front(MODULATED, lrp.Uniform(), lrp.cp_lrp()), EVERY),
    "mixture+attn_lrp": (
        in_front(MODULATED, 0.3 * lrp.Uniform() + 0.7 * lrp.SignalTakesAll(), lrp.attn_lrp()),
        EVERY,
    ),
    "stop+attn_lrp": (in_front(lrp.Gate | lrp.Attention, lrp.Stop(), lrp.attn_lrp()), ("transformer", "fused")),
    "gradient+attn_lrp": (
        in_front(lrp.Normalization | lrp.Softmax | lrp.Attention, lrp.Gradient(), lrp.attn_lrp()),
        ("transformer", "fused", "gated"),
    ),
}
"""Each with the models that it covers, and to which it is news; stabilizers as above."""

ATTENTION_CASES = [(model, name) for name, (_, models) in ATTENTION_COMPOSITES.items() for model in models]
