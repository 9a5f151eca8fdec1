"""Whole networks: every composite that Zennit has gives Zennit's relevance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from zennit import composites as theirs
from zennit.core import Composite

import lrpfunc as lrp
from tests.architectures.models import CLASSES, architecture, image, randomized
from tests.architectures.zennit_oracle import (
    CanonizeResNet,
    CanonizeVGG,
    MergeNamed,
    OneModuleACall,
    stabilizer,
    zennit_relevance,
)
from tests.oracles import largest_difference

# Options of torchvision's, Zennit's canonizers, the size of the image.
ARCHITECTURES: dict[str, tuple[dict[str, Any], tuple[Callable[[], Any], ...], int]] = {
    "vgg16": ({}, (), 32),
    "vgg16_bn": ({}, (CanonizeVGG,), 32),
    "resnet18": ({}, (CanonizeResNet,), 64),
    "resnet50": ({"width_per_group": 16}, (CanonizeResNet,), 64),
    "alexnet": ({}, (), 64),
}
TOLERANCE = 1e-10
LOW = torch.tensor([-4.0, -5.0, -6.0], dtype=torch.float64).reshape(1, 3, 1, 1)
HIGH = torch.tensor([5.0, 6.0, 4.5], dtype=torch.float64).reshape(1, 3, 1, 1)
LRP = {
    "epsilon_plus": (lrp.epsilon_plus, theirs.EpsilonPlus),
    "epsilon_plus_flat": (lrp.epsilon_plus_flat, theirs.EpsilonPlusFlat),
    "epsilon_alpha2_beta1": (lrp.epsilon_alpha2_beta1, theirs.EpsilonAlpha2Beta1),
    "epsilon_alpha2_beta1_flat": (lrp.epsilon_alpha2_beta1_flat, theirs.EpsilonAlpha2Beta1Flat),
    "epsilon_gamma_box": (partial(lrp.epsilon_gamma_box, LOW, HIGH), partial(theirs.EpsilonGammaBox, LOW, HIGH)),
    "excitation_backprop": (lrp.excitation_backprop, theirs.ExcitationBackprop),
}
COTANGENT = {
    "gradient": (lrp.gradient, Composite),
    "deconvnet": (lrp.deconvnet, theirs.DeconvNet),
    "guided_backprop": (lrp.guided_backprop, theirs.GuidedBackprop),
    "beta_smooth": (partial(lrp.beta_smooth, 3.0), partial(theirs.BetaSmooth, 3.0)),
}


@dataclass
class Network:
    model: nn.Module
    x: Tensor
    canonizers: tuple[Callable[[], Any], ...] = ()

    @cached_property
    def function(self) -> tuple[Any, dict[str, Tensor]]:
        return lrp.from_module(self.model)

    def ours(self, rules: Any, target: Any) -> Tensor:
        model_fn, params = self.function
        return lrp.attribute(model_fn, rules)(params, self.x, target=target)

    def theirs(self, composite: Callable[..., Any], start: Any, **options: Any) -> Tensor:
        made = composite(canonizers=[canonizer() for canonizer in self.canonizers], **options)
        return zennit_relevance(self.model, made, self.x, start)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def network(request: pytest.FixtureRequest) -> Network:
    options, canonizers, size = ARCHITECTURES[request.param]
    return Network(architecture(request.param, **options), image(1, 3, size, size), canonizers)


def logit(output: Tensor) -> Tensor:
    """Starting relevance: the logit of class 3."""
    return output * torch.eye(CLASSES, dtype=output.dtype)[3]


@pytest.mark.parametrize("composite", LRP)
def test_composite(network: Network, composite: str):
    mine, others = LRP[composite]
    assert largest_difference(network.ours(mine(), 3), network.theirs(others, logit)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("composite", LRP)
def test_resnet50_as_wide_as_it_is(composite: str):
    network = Network(architecture("resnet50"), image(2, 3, 64, 64), (CanonizeResNet,))
    mine, others = LRP[composite]
    assert largest_difference(network.ours(mine(), 3), network.theirs(others, logit)) <= TOLERANCE


@pytest.mark.parametrize("composite", COTANGENT)
def test_cotangent_composite(network: Network, composite: str):
    mine, others = COTANGENT[composite]
    apart = Network(inputs_kept(network.model), network.x)
    assert largest_difference(network.ours(mine(), 3), apart.theirs(others, one_hot)) <= TOLERANCE


def one_hot(output: Tensor) -> Tensor:
    """The starting cotangent of class 3."""
    return torch.eye(CLASSES, dtype=output.dtype)[[3]].expand_as(output)


def inputs_kept(model: nn.Module) -> nn.Module:
    """The model as Zennit's `ReLUBetaSmooth` needs it.

    Its hook keeps the input of its module's last call only, and that tensor itself, which an in-place ReLU overwrites.
    """
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if isinstance(module, BasicBlock | Bottleneck):
            module.relu = OneModuleACall(2 if isinstance(module, BasicBlock) else 3)  # type: ignore[assignment]
        elif isinstance(module, nn.ReLU):
            module.inplace = False
    return twin


OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {"zero_params": "bias"},
    "stabilizer": {"stabilizer": 0.3, "zero_params": ["bias"]},
    "epsilon": {"epsilon": 0.2, "stabilizer": lrp.Stabilizer(0.1, clip=True)},
    "norm_scale": {
        "epsilon": lrp.Stabilizer(0.1, norm_scale=True),
        "stabilizer": lrp.Stabilizer(0.01, norm_scale=True),
    },
}


@pytest.fixture(scope="module")
def small_network() -> Network:
    return Network(randomized(ResNet(BasicBlock, [1, 1, 1, 1], CLASSES)), image(2, 3, 32, 32), (CanonizeResNet,))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("composite", LRP)
def test_options(small_network: Network, composite: str, options: str):
    """`zero_params`, and stabilizers of each kind."""
    accepted = ("stabilizer", "zero_params") + ("epsilon",) * (composite != "excitation_backprop")
    given = {name: value for name, value in OPTIONS[options].items() if name in accepted}
    translated = {name: value if name == "zero_params" else stabilizer(value) for name, value in given.items()}
    mine, others = LRP[composite]
    theirs = small_network.theirs(others, logit, **translated)
    assert largest_difference(small_network.ours(mine(**given), 3), theirs) <= TOLERANCE


class PreActivation(nn.Module):
    """Norm, ReLU, convolution, as in DenseNet: no batch norm can be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        self.grown = nn.ModuleList(self.grow(channels) for channels in (8, 12, 16))
        self.head = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(80, CLASSES))

    @staticmethod
    def grow(channels: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.grown:
            x = torch.cat([x, layer(x)], 1)
        return self.head(x)


@pytest.fixture(scope="module")
def densenet() -> Network:
    """torchvision's, where some batch norms can be merged.

    Its last ReLU and pooling are functions, which Zennit cannot see; here they are modules.
    """
    model = DenseNet(growth_rate=8, block_config=(2, 1, 1, 2), num_init_features=16, num_classes=CLASSES)
    end = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.classifier]
    names = [name for name, _ in model.features.named_modules()]
    merged = [("conv0", "norm0")] + [(n, n.replace("conv1", "norm2")) for n in names if n.endswith(".conv1")]
    name_map = [([f"0.{convolution}"], f"0.{norm}") for convolution, norm in merged]
    model = nn.Sequential(model.features, *end)
    return Network(randomized(model), image(2, 3, 64, 64), (partial(MergeNamed, name_map),))


@pytest.mark.parametrize("composite", LRP)
def test_batch_norm_that_is_not_merged(composite: str):
    network = Network(randomized(PreActivation()), image(2, 3, 16, 16))
    mine, others = LRP[composite]
    assert largest_difference(network.ours(mine(), 3), network.theirs(others, logit)) <= TOLERANCE


@pytest.mark.parametrize("composite", LRP)
def test_densenet(densenet: Network, composite: str):
    mine, others = LRP[composite]
    assert largest_difference(densenet.ours(mine(), 3), densenet.theirs(others, logit)) <= TOLERANCE
