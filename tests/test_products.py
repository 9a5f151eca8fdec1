"""Which operand of a product carries the signal: gates, the weights of routed experts, and neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lrpfunc as lrp
from tests.cases import in_front, normal
from tests.oracles import largest_difference

RULES = {"attn_lrp": lrp.attn_lrp(), "cp_lrp": lrp.cp_lrp()}


def product_roles(model_fn: Any, params: Any, x: Tensor) -> set[str]:
    """Of the products that relevance comes to."""
    rows = lrp.explain(model_fn, lrp.attn_lrp())(params, x).rows
    return {row.layer.role.value for row in rows if row.layer.kind is lrp.Kind.PRODUCT}


def experts(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """The outputs of four experts, shaped `(samples, experts, width)`."""
    return F.silu(torch.einsum("nd,edf->nef", x, params["experts"]))


def routed(weights: Tensor, chosen: Tensor, outputs: Tensor) -> Tensor:
    return (weights[..., None] * outputs.gather(1, chosen[..., None].expand(-1, -1, outputs.shape[-1]))).sum(1)


def of_probabilities(logits: Tensor, outputs: Tensor, hold: bool) -> Tensor:
    weights, chosen = logits.softmax(-1).topk(2)
    return routed(weights.detach() if hold else weights, chosen, outputs)


def of_logits(logits: Tensor, outputs: Tensor, hold: bool) -> Tensor:
    weights, chosen = logits.topk(2)
    weights = weights.softmax(-1)
    return routed(weights.detach() if hold else weights, chosen, outputs)


def renormalized(logits: Tensor, outputs: Tensor, hold: bool) -> Tensor:
    weights, chosen = logits.softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    return routed(weights.detach() if hold else weights, chosen, outputs)


def gathered(logits: Tensor, outputs: Tensor, hold: bool) -> Tensor:
    """By scores with a bias that the weights do not have, and scaled."""
    scores = logits.sigmoid()
    chosen = (scores + torch.arange(4) / 10).topk(2).indices
    weights = scores.gather(1, chosen)
    weights = 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return routed(weights.detach() if hold else weights, chosen, outputs)


def indexed(logits: Tensor, outputs: Tensor, hold: bool) -> Tensor:
    weights, chosen = logits.softmax(-1).topk(2)
    picked = outputs[torch.arange(len(outputs))[:, None], chosen]
    return torch.einsum("nk,nkd->nd", weights.detach() if hold else weights, picked)


def scattered(logits: Tensor, outputs: Tensor, hold: bool) -> Tensor:
    """All experts run, and those that were not chosen count for nothing."""
    weights, chosen = logits.softmax(-1).topk(2)
    weights = torch.zeros_like(logits).scatter(1, chosen, weights)
    return torch.einsum("ne,ned->nd", weights.detach() if hold else weights, outputs)


def in_a_loop(logits: Tensor, outputs: Tensor, hold: bool) -> Tensor:
    weights, chosen = logits.softmax(-1).topk(2)
    weights = weights.detach() if hold else weights
    total = torch.zeros_like(outputs[:, 0])
    for i in range(4):
        total = total + outputs[:, i] * (weights * (chosen == i)).sum(-1, keepdim=True)
    return total


ROUTERS = [of_probabilities, of_logits, renormalized, gathered, indexed, scattered, in_a_loop]


@pytest.mark.parametrize("route", ROUTERS)
def test_the_weights_of_routed_experts_are_held(route: Callable[[Tensor, Tensor, bool], Tensor]) -> None:
    """In every spelling: relevance is that of the same mixture with its weights detached."""
    params, x = {"router": normal(5, 4), "experts": normal(4, 5, 5, seed=1)}, normal(6, 5, seed=2)

    def mixture(hold: bool) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        return lambda params, x: route(x @ params["router"], experts(params, x), hold)

    assert product_roles(mixture(False), params, x) == {"Router"}
    for rules in RULES.values():
        relevance = lrp.attribute(mixture(False), rules)(params, x)
        assert largest_difference(relevance, lrp.attribute(mixture(True), rules)(params, x)) < 1e-14
        shared = lrp.attribute(mixture(False), [(lrp.Router, lrp.Uniform()), *rules])(params, x)
        assert largest_difference(shared, relevance) > 0.1


def test_weights_without_a_choice_are_gates() -> None:
    """Attention pooling, and an ensemble of which some members are always asked, are no routed experts."""
    params, x = {"router": normal(5, 4), "experts": normal(4, 5, 5, seed=1)}, normal(6, 5, seed=2)

    def pooled(params: Any, x: Tensor) -> Tensor:
        return ((x @ params["router"][:, 0]).softmax(0)[:, None] * x).sum(0, keepdim=True)

    def fixed(params: Any, x: Tensor) -> Tensor:
        weights = (x @ params["router"]).softmax(-1)[:, [0, 2]]
        return (weights[..., None] * experts(params, x)[:, [0, 2]]).sum(1)

    assert product_roles(pooled, params, x) == product_roles(fixed, params, x) == {"Gate"}


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda gate, x: gate.sigmoid() * x,
    "on_the_right": lambda gate, x: x * gate.sigmoid(),
    "sigmoid_before_tanh": lambda gate, x: x.tanh() * gate.sigmoid(),
    "sigmoid_before_relu": lambda gate, x: gate.sigmoid() * x.relu(),
    "tanh_before_silu": lambda gate, x: F.silu(x) * gate.tanh(),
    "exp_before_relu": lambda gate, x: x.relu() * gate.exp(),
    "tanh": lambda gate, x: gate.tanh() * x,
    "silu": lambda gate, x: F.silu(gate) * x,
    "gelu": lambda gate, x: x * F.gelu(gate),
    "hardsigmoid": lambda gate, x: F.hardsigmoid(gate) * x,
    "one_less": lambda gate, x: (1 - gate.sigmoid()) * x,
    "scaled": lambda gate, x: 2 * gate.sigmoid() * x,
    "moved": lambda gate, x: gate.sigmoid().T.reshape(4, 3).T * x,
    "written_out": lambda gate, x: 1 / (1 + torch.exp(-gate)) * x,
    "silu_written_out": lambda gate, x: gate * gate.sigmoid() * x,
    "softmax": lambda gate, x: gate.softmax(-1) * x,
    "softmax_written_out": lambda gate, x: (y := gate.exp()) / y.sum(-1, keepdim=True) * x,
    "matmul": lambda gate, x: gate.softmax(-1) @ x.mT,
    "matmul_on_the_right": lambda gate, x: x @ gate.softmax(-1).mT,
    "einsum": lambda gate, x: torch.einsum("ij,kj->ik", gate.softmax(-1), x),
    "normalized": lambda gate, x: F.normalize(gate.sigmoid()) * x,
    "fewer_elements": lambda gate, x: gate.sigmoid()[:, :1] * x.sigmoid(),
    "fewer_elements_of_silu": lambda gate, x: F.silu(x) * F.silu(gate[:1]),
    "in_place": lambda gate, x: (1 * x).mul_(gate.sigmoid()),
    "with_an_addend": lambda gate, x: torch.addcmul(3 * x, gate.sigmoid(), x[:1]),
}
"""The first argument gates the second."""


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_held_constant(name: str) -> None:
    """Where the signal takes all, relevance is that of the same product with its gate detached."""
    weight, x = normal(5, 8), normal(3, 5, seed=1)

    def gated(weight: Tensor, x: Tensor) -> Tensor:
        return GATES[name](*(x @ weight).chunk(2, -1))

    def with_the_gate_held(weight: Tensor, x: Tensor) -> Tensor:
        gate, signal = (x @ weight).chunk(2, -1)
        return GATES[name](gate.detach(), signal)

    assert product_roles(gated, weight, x) == {"Gate"}
    held = lrp.attribute(with_the_gate_held, lrp.attn_lrp())(weight, x)
    for rules in (in_front(lrp.Gate, lrp.SignalTakesAll(), lrp.attn_lrp()), lrp.cp_lrp()):
        assert largest_difference(lrp.attribute(gated, rules)(weight, x), held) < 1e-13
    shared = lrp.attribute(gated, lrp.attn_lrp())(weight, x)
    assert largest_difference(shared, held) > 0.01


def test_a_glu_is_the_product_that_it_is_short_for() -> None:
    x = normal(3, 8)
    for rules in RULES.values():
        native, by_hand = (
            lrp.attribute(lambda _, x, f=f: f(x), rules)(None, x)
            for f in (F.glu, lambda x: x[:, :4] * x[:, 4:].sigmoid())
        )
        assert largest_difference(native, by_hand) < 1e-14


EVEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda a, b: a * b,
    "fewer_elements": lambda a, b: a * b[:, :1],
    "two_sigmoids": lambda a, b: a.sigmoid() * b.sigmoid(),
    "two_activations": lambda a, b: F.gelu(a) * F.silu(b),
    "dense_after_sigmoid": lambda a, b: (a.sigmoid() @ normal(4, 4, seed=5)) * b,
    "matmul": lambda a, b: a @ b.mT,
    "einsum_of_three": lambda a, b: torch.einsum("ij,ij,ij->ij", a.sigmoid(), b, a),
}
"""No operand gates the other."""


@pytest.mark.parametrize("name", EVEN)
def test_without_a_gate_products_share(name: str) -> None:
    weight, x = normal(5, 8), normal(3, 5, seed=1)

    def model_fn(weight: Tensor, x: Tensor) -> Tensor:
        return EVEN[name](*(x @ weight).chunk(2, -1))

    assert product_roles(model_fn, weight, x) == {""}
    results = [lrp.attribute(model_fn, rules)(weight, x) for rules in RULES.values()]
    assert largest_difference(*results) == 0
    assert largest_difference(results[0].sum(), model_fn(weight, x).sum()) < 1e-12
    with pytest.raises(lrp.RuleError, match="it is not known which input carries the signal"):
        lrp.attribute(model_fn, [(lrp.Product, lrp.SignalTakesAll()), *lrp.attn_lrp()])(weight, x)
