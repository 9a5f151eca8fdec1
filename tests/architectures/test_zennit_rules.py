"""Single layers: every rule gives Zennit's relevance, on every kind of linear layer, from any starting relevance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zennit.layer
from torch import Tensor, nn
from torch.nn.utils import fusion
from zennit import rules as theirs
from zennit.composites import LayerMapComposite
from zennit.core import Hook
from zennit.types import Activation, BatchNorm, Linear

import lrpfunc as lrp
from tests.architectures.models import image, randomized
from tests.architectures.zennit_oracle import MergeSequential, stabilizer, zennit_relevance
from tests.oracles import largest_difference

TOLERANCE = 1e-10
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "linear": (nn.Linear, (6, 5), {}, (3, 6)),
    "linear_of_sequences": (nn.Linear, (6, 5), {}, (2, 4, 6)),
    "conv1d": (nn.Conv1d, (3, 4, 3), {"stride": 2, "padding": 1}, (2, 3, 9)),
    "conv1d_dilated": (nn.Conv1d, (4, 6, 3), {"dilation": 2, "groups": 2}, (2, 4, 9)),
    "conv2d": (nn.Conv2d, (3, 4, 3), {"stride": 2, "padding": 1}, (2, 3, 7, 6)),
    "conv2d_same": (nn.Conv2d, (3, 4, (3, 2)), {"padding": "same", "dilation": (1, 2)}, (2, 3, 5, 6)),
    "conv2d_reflecting": (nn.Conv2d, (3, 4, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 3, 5, 6)),
    "conv2d_circular": (nn.Conv2d, (3, 4, 3), {"padding": (1, 2), "padding_mode": "circular"}, (2, 3, 5, 6)),
    "conv2d_grouped": (nn.Conv2d, (4, 6, (3, 2)), {"groups": 2, "padding": (2, 1)}, (2, 4, 5, 6)),
    "conv2d_depthwise": (nn.Conv2d, (3, 6, 3), {"groups": 3, "dilation": 2}, (2, 3, 7, 7)),
    "conv3d": (nn.Conv3d, (2, 3, 3), {"stride": (1, 2, 2), "padding": 1}, (2, 2, 4, 5, 5)),
    "conv3d_grouped": (nn.Conv3d, (4, 4, 2), {"groups": 2, "dilation": (1, 2, 1)}, (1, 4, 3, 4, 4)),
    "transposed1d": (nn.ConvTranspose1d, (3, 4, 3), {"stride": 2, "output_padding": 1}, (2, 3, 5)),
    "transposed2d": (
        nn.ConvTranspose2d,
        (3, 4, 3),
        {"stride": 2, "padding": 1, "output_padding": (1, 0)},
        (2, 3, 4, 4),
    ),
    "transposed2d_grouped": (nn.ConvTranspose2d, (4, 6, 3), {"stride": 2, "groups": 2, "dilation": 2}, (2, 4, 3, 4)),
    "transposed3d": (nn.ConvTranspose3d, (2, 4, 2), {"stride": 2, "groups": 2, "output_padding": 1}, (1, 2, 2, 3, 3)),
}
RULES: dict[str, tuple[Callable[..., lrp.Rule], Callable[..., Hook], tuple[float, ...]]] = {
    "epsilon": (lrp.Epsilon, theirs.Epsilon, ()),
    "zplus": (lrp.ZPlus, theirs.ZPlus, ()),
    "alpha_beta": (lrp.AlphaBeta, theirs.AlphaBeta, (2.0, 1.0)),
    "alpha_beta_one_sided": (lrp.AlphaBeta, theirs.AlphaBeta, (1.0, 0.0)),
    "gamma": (lrp.Gamma, theirs.Gamma, (0.25,)),
    "zbox": (lrp.ZBox, theirs.ZBox, (-4.0, 4.5)),
    "wsquare": (lrp.WSquare, theirs.WSquare, ()),
    "flat": (lrp.Flat, theirs.Flat, ()),
}
OPTIONS: dict[str, tuple[Any, Any]] = {
    "no_bias": (1e-6, "bias"),
    "no_weight": (1e-6, ["weight"]),
    "nothing": (0.1, ("weight", "bias")),
    "stabilizer": (0.3, None),
    "clip": (lrp.Stabilizer(0.5, clip=True), None),
    "norm_scale": (lrp.Stabilizer(0.2, norm_scale=True), ["bias"]),
    "both": (lrp.Stabilizer(0.7, clip=True, norm_scale=True), None),
}


def layer(name: str, bias: bool = True) -> nn.Module:
    kind, args, options, _ = LAYERS[name]
    return randomized(kind(*args, bias=bias, **options))


def inputs(name: str) -> Tensor:
    return image(*LAYERS[name][3])


def start(model: nn.Module, x: Tensor) -> Tensor:
    """Starting relevance of both signs, which has nothing to do with the output."""
    return image(*model(x).shape, seed=2)


def ours(model: nn.Module, rule: lrp.Rule, x: Tensor) -> Tensor:
    rules = [(lrp.Dense | lrp.Convolution | lrp.AvgPool | lrp.Sum, rule), (lrp.Activation | lrp.BatchNorm, lrp.Pass())]
    model_fn, params = lrp.from_module(model)
    return lrp.attribute(model_fn, rules)(params, x, target=start(model, x))


def zennits(model: nn.Module, rule: Hook, x: Tensor, *canonizers: Any) -> Tensor:
    layer_map = [((Linear, zennit.types.AvgPool, zennit.layer.Sum), rule), ((Activation, BatchNorm), theirs.Pass())]
    return zennit_relevance(model, LayerMapComposite(layer_map, list(canonizers)), x, start(model, x))


def both(model: nn.Module, rule: str, x: Tensor, stab: Any = 1e-6, zero_params: Any = None) -> tuple[Tensor, Tensor]:
    mine, other, args = RULES[rule]
    return (
        ours(model, mine(*args, stab, zero_params), x),
        zennits(model, other(*args, stabilizer(stab), zero_params), x),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str, name: str, bias: bool):
    assert largest_difference(*both(layer(name, bias), rule, inputs(name))) <= TOLERANCE


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["linear", "conv2d_grouped", "transposed1d"])
@pytest.mark.parametrize("rule", RULES)
def test_options(rule: str, name: str, options: str):
    assert largest_difference(*both(layer(name), rule, inputs(name), *OPTIONS[options])) <= TOLERANCE


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d_depthwise", "transposed2d_grouped"])
@pytest.mark.parametrize("rule", RULES)
def test_inputs_that_are_not_negative(rule: str, name: str):
    """After a ReLU the rules leave half of their work out."""
    model = nn.Sequential(nn.ReLU(), layer(name))
    assert largest_difference(*both(model, rule, inputs(name))) <= TOLERANCE


@pytest.mark.parametrize("zero_params", [None, "bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_alpha_beta_of_any_split(name: str, zero_params: str | None):
    """Zennit refuses 1.4 and 0.4, whose difference is not 1 to the last bit; (1, 0) and (2, 1) span them all."""
    model, x = layer(name), inputs(name)
    one, two = (zennits(model, theirs.AlphaBeta(a, a - 1, zero_params=zero_params), x) for a in (1.0, 2.0))
    relevance = ours(model, lrp.AlphaBeta(1.4, 0.4, zero_params=zero_params), x)
    assert largest_difference(relevance, 0.6 * one + 0.4 * two) <= TOLERANCE


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1, 1), (3, 7, 6)])
def test_box_with_a_bound_a_channel(shape: tuple[int, ...]):
    low, high = -3 - image(*shape).abs(), 3 + image(*shape).abs()
    model, x = layer("conv2d"), inputs("conv2d")
    # Zennit aligns bounds with fewer dimensions from the left, so it is given all of them.
    expected = zennits(model, theirs.ZBox(low.expand(x.shape), high.expand(x.shape)), x)
    assert largest_difference(ours(model, lrp.ZBox(low, high), x), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("mine", "other"),
    [(lrp.Epsilon(0.1), theirs.Epsilon(0.1)), (lrp.Norm(0.1), theirs.Norm(0.1))],
    ids=["epsilon", "norm"],
)
def test_contributions_that_cancel(mine: lrp.Rule, other: Hook):
    """Exactly: the stabilizer's sign of 0 is +1."""
    model = nn.Linear(2, 1, bias=False)
    model.weight = nn.Parameter(torch.tensor([[3.0, -3.0]], dtype=torch.float64))
    x = torch.ones(1, 2, dtype=torch.float64)
    assert largest_difference(ours(model, mine, x), zennits(model, other, x)) <= TOLERANCE


# --------------------------------------------------------------------------------------------------------------
# Norm and Pass

AVERAGES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "average1d": (nn.AvgPool1d(3, 2), (2, 3, 8)),
    "average2d": (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True), (2, 3, 6, 7)),
    "average2d_without_padding": (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), (2, 3, 6, 7)),
    "average3d": (nn.AvgPool3d(2), (2, 2, 4, 4, 4)),
    "adaptive1d": (nn.AdaptiveAvgPool1d(3), (2, 3, 7)),
    "adaptive2d": (nn.AdaptiveAvgPool2d((3, 2)), (2, 3, 7, 5)),
    "adaptive2d_to_one": (nn.AdaptiveAvgPool2d(1), (2, 3, 5, 5)),
    "adaptive3d": (nn.AdaptiveAvgPool3d(2), (1, 2, 3, 4, 5)),
    "sum": (zennit.layer.Sum(), (2, 3, 4)),
    "sum_along_an_axis": (zennit.layer.Sum(1), (2, 3, 4)),
}


@pytest.mark.parametrize("stab", [1e-6, 0.3, lrp.Stabilizer(0.2, clip=True)], ids=repr)
@pytest.mark.parametrize("name", AVERAGES)
def test_norm_of_sums_and_averages(name: str, stab: Any):
    model, shape = AVERAGES[name]
    expected = zennits(model, theirs.Norm(stabilizer(stab)), image(*shape))
    assert largest_difference(ours(model, lrp.Norm(stab), image(*shape)), expected) <= TOLERANCE


@pytest.mark.parametrize("name", LAYERS)
def test_norm_of_layers(name: str):
    model, x = layer(name), inputs(name)
    assert largest_difference(ours(model, lrp.Norm(0.3), x), zennits(model, theirs.Norm(0.3), x)) <= TOLERANCE


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.LeakyReLU(0.2),
    nn.PReLU(),
    nn.RReLU(),
    nn.ELU(),
    nn.SELU(),
    nn.CELU(0.5),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Hardswish(),
    nn.Sigmoid(),
    nn.Hardsigmoid(),
    nn.LogSigmoid(),
    nn.Tanh(),
    nn.Hardtanh(),
    nn.Softplus(),
    nn.Hardshrink(),
    nn.Softshrink(),
    nn.Threshold(0.1, 0.3),
]


@pytest.mark.parametrize("rule", ["epsilon", "zplus", "flat"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_pass_of_activations(activation: nn.Module, rule: str):
    model = randomized(nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 5)))
    assert largest_difference(*both(model, rule, image(4, 6))) <= TOLERANCE


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d, (4, 3)),
        (nn.BatchNorm1d, (2, 3, 5)),
        (nn.BatchNorm2d, (2, 3, 4, 4)),
        (nn.BatchNorm3d, (1, 3, 2, 3, 3)),
    ],
)
@pytest.mark.parametrize("rule", ["epsilon", "zplus"])
def test_pass_of_batch_norms(norm: Callable[..., nn.Module], shape: tuple[int, ...], rule: str):
    x = image(*shape)
    model = randomized(nn.Sequential(norm(3), nn.Sigmoid(), norm(3), nn.Flatten(), nn.Linear(x[0].numel(), 4)))
    assert largest_difference(*both(model, rule, x)) <= TOLERANCE


# --------------------------------------------------------------------------------------------------------------
# Merged batch norms


def batch_norm(of: nn.Module) -> nn.Module:
    if isinstance(of, nn.Linear):
        return nn.BatchNorm1d(of.out_features)
    dimensions = of.weight.ndim - 2  # type: ignore[union-attr, operator]
    return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1](of.out_channels)  # type: ignore[arg-type]


def merged(first: Any, norm: Any) -> nn.Module:
    """One layer that does what both do, by torch's own formula, which does not know transposed groups."""
    if isinstance(first, nn.Linear):
        return fusion.fuse_linear_bn_eval(first, norm)
    if first.transposed and first.groups > 1:
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
        spread = scale.reshape(first.groups, -1).repeat_interleave(first.in_channels // first.groups, 0)
        one = copy.deepcopy(first)
        one.weight = nn.Parameter(first.weight * spread.reshape(*spread.shape, 1, 1))
        bias = 0 if first.bias is None else first.bias
        one.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias)
        return one
    return fusion.fuse_conv_bn_eval(first, norm, transpose=first.transposed)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["linear", "conv2d_grouped", "transposed1d", "transposed2d_grouped"])
@pytest.mark.parametrize("rule", RULES)
def test_merged_batch_norm(rule: str, name: str, bias: bool):
    first = layer(name, bias)
    pair = randomized(nn.Sequential(first, norm := batch_norm(first)))
    one, x = merged(first, norm), inputs(name)
    torch.testing.assert_close(one(x), pair(x))
    mine, other, args = RULES[rule]
    assert largest_difference(ours(pair, mine(*args), x), zennits(one, other(*args), x)) <= TOLERANCE


@pytest.mark.parametrize("name", ["linear", "conv2d_grouped", "transposed2d"])
def test_merged_as_zennit_merges(name: str):
    pair = randomized(nn.Sequential(first := layer(name), batch_norm(first)))
    expected = zennits(pair, theirs.ZPlus(), inputs(name), MergeSequential())
    assert largest_difference(ours(pair, lrp.ZPlus(), inputs(name)), expected) <= TOLERANCE
