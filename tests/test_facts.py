"""What is known of values before any number is, where a claim would be silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lrpfunc as lrp
from tests.cases import normal
from tests.oracles import largest_difference

Function = Callable[[Tensor], Tensor]


def kinds(f: Function, x: Tensor) -> list[lrp.Kind]:
    return [row.layer.kind for row in lrp.explain(lambda _, x: f(x))(None, x, target=lambda out: out).rows]


ZERO_WITH_A_SINGULAR_FACTOR: dict[str, Function] = {
    "sqrt": lambda x: x * x.sqrt(),
    "power": lambda x: x**0.5 * x,
    "of_square": lambda x: x * x.square().sqrt(),
    "divided": lambda x: x / (1 + x.sqrt()),
}


@pytest.mark.parametrize("name", ZERO_WITH_A_SINGULAR_FACTOR)
def test_a_factor_without_a_derivative_at_zero_spoils_no_element(name: str) -> None:
    """`0 * inf` is no slope: where `x` is 0, its relevance is 0."""
    f = ZERO_WITH_A_SINGULAR_FACTOR[name]
    w, x = normal(3, 2), normal(2, 3, seed=1).abs()
    x[0, 0] = 0
    found = lrp.attribute(lambda w, x: f(x) @ w, lrp.epsilon(0.0))(w, x, target=1)
    assert largest_difference(found, f(x) * w[:, 1]) < 1e-12


MASKED: dict[str, Function] = {
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(3).double(), torch.ones(3).double(), eps=0.0),
    "einsum": lambda x: torch.einsum("ij,i->ij", x, torch.ones(2).double()),
    "depthwise": lambda x: F.conv1d(x[:, None], torch.ones(1, 1, 1).double())[:, 0],
    "after_a_sum": lambda x: torch.einsum("ij,i->ij", x + 1, torch.ones(2).double()) - 1,
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_may_be_infinite_in_front_of_an_affine_layer(name: str) -> None:
    x = normal(2, 3)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    rules = [(lrp.Softmax, lrp.TaylorSoftmax("omit")), (lrp.Dense | lrp.Convolution | lrp.BatchNorm, lrp.Epsilon(0.0))]

    def relevance(f: Function) -> Tensor:
        def model_fn(_: Any, x: Tensor) -> Tensor:
            return f(x.masked_fill(mask, -torch.inf)).softmax(-1)

        return lrp.attribute(model_fn, rules)(None, x, target=1)

    found = relevance(MASKED[name])
    assert found.isfinite().all()
    if name != "after_a_sum":
        assert largest_difference(found, relevance(lambda x: x)) < 1e-12


def test_a_norm_that_counts_is_no_norm() -> None:
    """Of order 0 it counts what is not zero: a number, which carries no relevance."""
    with pytest.raises(lrp.NoPathError, match="does not depend"):
        kinds(lambda x: torch.linalg.vector_norm(x, 0, -1, keepdim=True), normal(2, 3))


def test_a_shrinkage_by_nothing_is_the_identity() -> None:
    """At 0, too, where torch's derivative of it is 0."""
    x = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    rules = [(lrp.Activation, lrp.Pass())]
    for f in (F.hardshrink, F.softshrink):
        (row,) = lrp.explain(lambda _, x, f=f: f(x, 0.0), rules)(None, x, target=1).rows
        assert not row.layer.keeps_zero
        (row,) = lrp.explain(lambda _, x, f=f: f(x), rules)(None, x, target=1).rows
        assert row.layer.keeps_zero


NORMALIZATIONS: dict[str, Function] = {
    "relu": lambda x: x.relu().sum(-1, keepdim=True) + 1e-6,
    "where": lambda x: torch.where(x > 0, x, 2 * x).abs().mean(-1, keepdim=True),
    "largest": lambda x: x.square().topk(2).values.sum(-1, keepdim=True).sqrt(),
}


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_any_homogeneous_statistic_normalizes(name: str) -> None:
    assert kinds(lambda x: x / NORMALIZATIONS[name](x), normal(2, 3)) == [lrp.Kind.NORMALIZATION]


WINNERS: dict[str, Function] = {
    "fractional": lambda x: F.fractional_max_pool2d(x, 2, output_size=2, _random_samples=torch.rand(1, 1, 2).double()),
    "median": lambda x: x.median()[None],
}


@pytest.mark.parametrize("name", WINNERS)
def test_winners_need_no_rule(name: str) -> None:
    x = normal(1, 1, 4, 4)
    assert lrp.Kind.WINNER in kinds(WINNERS[name], x)
    found = lrp.attribute(lambda _, x: WINNERS[name](x))(None, x, target=lambda out: out)
    assert found.sum().item() == pytest.approx(WINNERS[name](x).sum().item())


def test_facts_that_pass_through_what_only_moves_elements() -> None:
    """Not negative is also what is stacked, padded or chosen from what is not."""

    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        x = F.pad(torch.where(x > 0, x.relu(), 0.0), (1, 1)).flip(-1)
        return torch.stack([x, x], 1)[:, 0] @ w

    w, x = normal(5, 2), normal(2, 3, seed=1)
    rows = lrp.explain(model_fn, lrp.epsilon_plus())(w, x, target=1).rows
    assert [row.layer.nonnegative for row in rows if row.layer.kind is lrp.Kind.DENSE] == [True]
    negative = lrp.explain(lambda w, x: F.pad(x.relu(), (1, 1), value=-1.0) @ w, lrp.epsilon_plus())(w, x, target=1)
    assert [row.layer.nonnegative for row in negative.rows if row.layer.kind is lrp.Kind.DENSE] == [False]
