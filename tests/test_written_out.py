"""What is written out is explained like torch's own: softmaxes in all their spellings, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lrpfunc as lrp
from tests.cases import normal
from tests.oracles import largest_difference

Function = Callable[[Tensor], Tensor]

MASK = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)


def total(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


SOFTMAXES: dict[str, Function] = {
    "one exponential": lambda x: (e := x.exp()) / total(e),
    "two exponentials": lambda x: x.exp() / total(x.exp()),
    "less its maximum": lambda x: (e := (x - x.amax(-1, keepdim=True)).exp()) / total(e),
    "less the values of max": lambda x: (e := (x - x.max(-1, keepdim=True).values).exp()) / total(e),
    "less a detached maximum": lambda x: (e := (x - x.detach().amax(-1, keepdim=True)).exp()) / total(e),
    "less the maximum of a detached tensor": lambda x: (e := (x - x.amax(-1, True).detach()).exp()) / total(e),
    "less a number": lambda x: (e := (x - 1.5).exp()) / total(e),
    "times an inverse": lambda x: (e := x.exp()) * (1 / total(e)),
    "an inverse times": lambda x: (1 / total(e := x.exp())) * e,
    "times a reciprocal": lambda x: (e := x.exp()) * total(e).reciprocal(),
    "no dimension kept": lambda x: (e := x.exp()) / e.sum(-1).unsqueeze(-1),
    "the exponential of a log-softmax": lambda x: x.log_softmax(-1).exp(),
    "the exponential of one written out": lambda x: (x - x.logsumexp(-1, keepdim=True)).exp(),
}
LOG_SOFTMAXES: dict[str, Function] = {
    "less its logsumexp": lambda x: x - x.logsumexp(-1, keepdim=True),
    "the logarithm of a softmax": lambda x: x.softmax(-1).log(),
    "the logarithm of one written out": lambda x: ((e := x.exp()) / total(e)).log(),
}
OTHERS: dict[str, Function] = {
    "another tensor is summed": lambda x: x.exp() / total((2 * x).exp()),
    "less the logsumexp of another": lambda x: x - (2 * x).logsumexp(-1, keepdim=True),
    "a square is summed": lambda x: (e := x.exp()) / total(e.square()),
    "no exponential": lambda x: (e := x.square()) / total(e),
    "one alone": lambda x: x.exp() / total(x.exp()[..., :1]),
}


def explained(f: Function) -> tuple[Tensor, list[str]]:
    """Relevance behind a dense layer, and which operations are layers."""
    w, x = normal(3, 4), normal(2, 3, seed=1)
    rules = lrp.attn_lrp() + lrp.epsilon(0.1)
    table = lrp.explain(lambda w, x: f(x @ w) @ w.mT, rules)(w, x, target=1)
    assert abs(table.residual) < 1e-12
    return table.relevance, [row.layer.operation for row in table.rows]


@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_softmax_is_one_in_any_spelling(name: str) -> None:
    relevance, operations = explained(SOFTMAXES[name])
    assert "softmax" in operations
    expected, _ = explained(lambda x: x.softmax(-1))
    # That a number is subtracted is a layer of its own, whose constant absorbs.
    assert name == "less a number" or largest_difference(relevance, expected) < 1e-12


@pytest.mark.parametrize("name", LOG_SOFTMAXES)
def test_a_log_softmax_is_one_in_any_spelling(name: str) -> None:
    relevance, operations = explained(LOG_SOFTMAXES[name])
    assert "log_softmax" in operations
    assert largest_difference(relevance, explained(lambda x: x.log_softmax(-1))[0]) < 1e-12


def test_a_constant_mask_belongs_to_the_softmax() -> None:
    relevance, operations = explained(lambda x: (e := x.exp() * MASK) / total(e))
    expected, _ = explained(lambda x: x.masked_fill(MASK == 0, -torch.inf).softmax(-1))
    assert "softmax" in operations
    assert largest_difference(relevance, expected) < 1e-12


@pytest.mark.parametrize(
    "bounded", [lambda s: s + 1e-3, lambda s: s.clamp(min=1e-3), lambda s: torch.maximum(s, torch.tensor(1e-3))]
)
def test_a_sum_that_is_kept_from_zero_is_still_that_of_a_softmax(bounded: Function) -> None:
    assert "softmax" in explained(lambda x: (e := x.exp()) / bounded(total(e)))[1]


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_a_softmax(name: str) -> None:
    operations = explained(OTHERS[name])[1]
    assert "softmax" not in operations
    assert "log_softmax" not in operations
