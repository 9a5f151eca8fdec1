"""Attention, normalization, gates, recurrence and scans, against forward passes with stopped gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lrpfunc as lrp
from tests.cases import normal
from tests.oracles import largest_difference
from tests.transformer_oracles import (
    ACTIVATIONS,
    NETS,
    NORMS,
    PLAIN,
    SOFTMAX,
    STOPS,
    WIDTH,
    Net,
    Unary,
    expected_relevance,
)

TARGET = 3
EXPLAINED = ("attn", "cp")


@cache
def net_called(name: str) -> Net:
    """One network for all its tests, so that it is captured once."""
    return NETS[name]()


CASES = [(name, rules) for name in NETS for rules in net_called(name).composites]
CONSERVING = [
    ("decoder-deep", "cp"),
    ("decoder-deep_sdpa", "cp"),
    *(("mamba-unbiased", rules) for rules in STOPS),
    *((f"{cell}-unbiased", rules) for cell in ("lstm", "gru") for rules in EXPLAINED),
]


def composite(name: str) -> lrp.Composite:
    return {"attn": lrp.attn_lrp, "cp": lrp.cp_lrp, "mamba": lrp.mamba_lrp}[name]()


@pytest.mark.parametrize("name", NETS)
def test_an_oracle_computes_its_network(name: str) -> None:
    """Stopped gradients change no value; with none stopped, the gradient is the network's as well."""
    net = net_called(name)
    params = dict(net.module.named_parameters())
    with torch.set_grad_enabled(not net.no_grad):
        value = net.module(net.x)
    for stops in (PLAIN, *(STOPS[rules] for rules in net.composites)):
        with torch.enable_grad():
            assert largest_difference(net.oracle(params, net.x, stops), value) < 1e-12
    x = net.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net.module(x)[:, TARGET].sum(), x)
    # The derivative of torch's hardsigmoid has its 1/6 in single precision.
    tolerance = 1e-7 if name.endswith(("hardsigmoid", "hardswish_by_sigmoid")) else 1e-10
    assert largest_difference(expected_relevance(net, PLAIN, TARGET), net.x * gradient) < tolerance


@pytest.mark.parametrize(("name", "rules"), CONSERVING)
def test_an_oracle_without_bias_conserves(name: str, rules: str) -> None:
    net = net_called(name)
    assert_conserved(expected_relevance(net, STOPS[rules], TARGET), net.module(net.x)[:, TARGET])


@pytest.mark.parametrize(("name", "rules"), CASES)
def test_relevance_is_the_oracles(name: str, rules: str) -> None:
    net = net_called(name)
    with torch.set_grad_enabled(not net.no_grad):
        model_fn, params = lrp.from_module(net.module)
        relevance = lrp.attribute(model_fn, composite(rules))(params, net.x, target=TARGET)
    assert largest_difference(relevance, expected_relevance(net, STOPS[rules], TARGET)) < 1e-9


@pytest.mark.parametrize(("name", "rules"), CONSERVING)
def test_a_network_without_bias_conserves(name: str, rules: str) -> None:
    net = net_called(name)
    model_fn, params = lrp.from_module(net.module)
    relevance, logits = lrp.attribute_and_value(model_fn, composite(rules))(params, net.x, target=TARGET)
    assert_conserved(relevance, logits[:, TARGET])


def assert_conserved(relevance: Tensor, logits: Tensor) -> None:
    assert largest_difference(relevance.flatten(1).sum(1), logits) < 1e-6


# What follows is arithmetic by hand. With the scores 0 and ln 3, the weights are 1/4 and 3/4; of the values 4 and 8
# that is 1 + 6 = 7, and the derivative for the scores is 1/4 (4 - 7) = -3/4 and 3/4 (8 - 7) = 3/4.
LOG3 = math.log(3.0)
SCORES, VALUES = torch.tensor([[0.0, LOG3], [4.0, 8.0]], dtype=torch.float64).split(1)


def test_softmax_by_hand() -> None:
    """Softmax passes the plain derivative on: the score 0 takes nothing, the other ln 3 * 3/4."""
    fn = lrp.attribute(lambda values, x: (torch.softmax(x, -1) * values).sum(-1, keepdim=True), lrp.attn_lrp())
    assert largest_difference(fn(VALUES, SCORES), torch.tensor([[0.0, 0.75 * LOG3]], dtype=torch.float64)) < 1e-14


def test_product_by_hand() -> None:
    """Half each, whatever the factors: 2 * 3 = 3 + 3."""
    fn = lrp.attribute(lambda _, x: x[:, :1] * x[:, 1:], lrp.attn_lrp())
    assert fn(None, torch.tensor([[2.0, 3.0]])).tolist() == [[3.0, 3.0]]


def attention_eager(_: None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ v


def attention_fused(_: None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("attention", [attention_eager, attention_fused])
@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        # The query 1 has the derivative 3/4 ln 3, and so has the product of the second key, ln 3, with its own.
        ("attn", ([0.75 * LOG3 / 4], [0.0, 0.75 * LOG3 / 4], [0.5, 3.0])),
        ("cp", ([0.0], [0.0, 0.0], [1.0, 6.0])),
    ],
)
def test_attention_by_hand(attention: Callable[..., Tensor], rules: str, expected: tuple[list[float], ...]) -> None:
    """The values take half of everything; query and key a quarter each of their derivative times themselves."""
    q, k, v = torch.ones(1, 1, 1, 1).double(), SCORES.view(1, 1, 2, 1), VALUES.view(1, 1, 2, 1)
    fn = lrp.attribute(attention, composite(rules), argnums=(1, 2, 3))
    relevance = [part.flatten() for part in fn(None, q, k, v)]
    assert largest_difference(relevance, [torch.tensor(part, dtype=torch.float64) for part in expected]) < 1e-14


@pytest.mark.parametrize(("f", "slope"), [(F.gelu, 0.5), (F.silu, 0.5), (torch.tanh, 1.0)])
@pytest.mark.parametrize("rules", EXPLAINED)
def test_an_activation_of_zero_has_its_derivative_for_a_slope(f: Unary, slope: float, rules: str) -> None:
    """There is no secant at `f(1 - 1)`; to a dense layer with the weights 2 and 1 goes `x_0` as well."""

    def model_fn(weight: Tensor, x: Tensor) -> Tensor:
        return torch.cat([f(x.sum(-1, keepdim=True)), x[:, :1]], -1) @ weight

    fn = lrp.attribute(model_fn, composite(rules))
    relevance = fn(torch.tensor([[2.0], [1.0]]).double(), torch.tensor([[1.0, -1.0]]).double(), target=0)
    assert relevance.tolist() == [[2 * slope + 1, -2 * slope]]


# What follows is what layers are taken for.


def kinds(fn: Unary, rules: str = "attn") -> list[lrp.Kind]:
    """Of all layers of a function, whose balance must close."""
    explanation = lrp.explain(lambda _, x: fn(x), composite(rules))(None, normal(2, WIDTH))
    assert abs(explanation.residual) < 1e-9 * max(1.0, abs(explanation.start))
    return [row.layer.kind for row in explanation.rows]


@pytest.mark.parametrize("name", SOFTMAX)
def test_a_softmax_is_one_however_it_is_written(name: str) -> None:
    found = kinds(lambda x: SOFTMAX[name](x[:, :4]) * x[:, 4:])
    assert found.count(lrp.Kind.SOFTMAX) == 1
    assert {lrp.Kind.NORMALIZATION, lrp.Kind.QUOTIENT, lrp.Kind.ACTIVATION}.isdisjoint(found)


@pytest.mark.parametrize("rules", EXPLAINED)
@pytest.mark.parametrize("name", NORMS)
def test_a_normalization_is_one_however_it_is_written(name: str, rules: str) -> None:
    found = kinds(NORMS[name][0], rules)
    # Folded into a scale and a shift, the statistic divides twice: the input, and its mean.
    assert found.count(lrp.Kind.NORMALIZATION) >= 1
    assert {lrp.Kind.PRODUCT, lrp.Kind.QUOTIENT, lrp.Kind.ACTIVATION}.isdisjoint(found)


@pytest.mark.parametrize(
    "name", ["silu_by_hand", "silu_by_exp", "gelu_by_hand", "tanh_gelu_by_hand", "mish_by_hand", "softsign_by_hand"]
)
def test_an_activation_is_one_layer_however_it_is_written(name: str) -> None:
    assert kinds(ACTIVATIONS[name][0]) == [lrp.Kind.ACTIVATION]


def linear_attention(x: Tensor) -> Tensor:
    """Whose denominator is no statistic of its numerator: it does not scale one of the operands."""
    q, k, v = F.elu(x[:, None]) + 1, F.elu(x[:, None] * 2) + 1, x[:, None]
    return ((q @ (k.mT @ v)) / (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True))[:, 0]


@pytest.mark.parametrize("rules", EXPLAINED)
def test_linear_attention_is_a_quotient(rules: str) -> None:
    found = kinds(linear_attention, rules)
    assert lrp.Kind.QUOTIENT in found
    assert {lrp.Kind.NORMALIZATION, lrp.Kind.SOFTMAX}.isdisjoint(found)


GATED: dict[str, Unary] = {
    "squeeze": lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)),
    "statistic": lambda x: x * torch.sigmoid(x.square().mean(-1, keepdim=True)),
    "swiglu": lambda x: F.silu(x[:, :4]) * x[:, 4:],
}


@pytest.mark.parametrize("rules", EXPLAINED)
@pytest.mark.parametrize("name", GATED)
def test_a_gate_is_no_normalization(name: str, rules: str) -> None:
    found = kinds(GATED[name], rules)
    assert lrp.Kind.PRODUCT in found
    assert {lrp.Kind.NORMALIZATION, lrp.Kind.QUOTIENT}.isdisjoint(found)
