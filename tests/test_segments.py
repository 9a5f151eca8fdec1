"""Softmax over segments, as attention over the edges of a graph writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lrpfunc as lrp
from tests.cases import normal
from tests.oracles import finite_difference_error, largest_difference

INDEX = torch.tensor([0, 2, 0, 1, 2, 2, 0])
"""The segment of each edge; segment 3 has none."""
NODES = 4

Softmax = Callable[[Tensor, Tensor], Tensor]


def spread(index: Tensor, like: Tensor) -> Tensor:
    return index.view(-1, *[1] * (like.ndim - 1)).expand_as(like)


def maxima(e: Tensor, index: Tensor) -> Tensor:
    return e.new_zeros(NODES, *e.shape[1:]).scatter_reduce(0, spread(index, e), e, "amax", include_self=False)


def geometric(e: Tensor, index: Tensor) -> Tensor:
    """As PyTorch Geometric writes it."""
    out = (e - maxima(e.detach(), index).index_select(0, index)).exp()
    sums = out.new_zeros(NODES, *e.shape[1:]).scatter_add_(0, spread(index, out), out) + 1e-16
    return out / sums.index_select(0, index)


def bracketed(e: Tensor, index: Tensor) -> Tensor:
    weights = torch.exp(e - maxima(e, index).detach()[index])
    return weights / weights.new_zeros(NODES, *e.shape[1:]).index_add(0, index, weights)[index]


def unshifted(e: Tensor, index: Tensor) -> Tensor:
    weights = e.exp()
    sums = torch.zeros(NODES, *e.shape[1:], dtype=e.dtype).index_put((index,), weights, accumulate=True)
    return weights * (1 / sums[index].clamp(min=1e-12))


def gathered(e: Tensor, index: Tensor) -> Tensor:
    weights = (e - torch.gather(maxima(e, index), 0, spread(index, e))).exp()
    sums = weights.new_zeros(NODES, *e.shape[1:]).scatter_reduce(0, spread(index, e), weights, "sum")
    return weights.div(torch.gather(sums, 0, spread(index, e)))


def taken_along(e: Tensor, index: Tensor) -> Tensor:
    weights = e.exp()
    sums = weights.new_zeros(NODES, *e.shape[1:]).scatter_add(0, spread(index, e), weights)
    return weights / torch.take_along_dim(sums, spread(index, e), 0)


WAYS: dict[str, Softmax] = {f.__name__: f for f in (geometric, bracketed, unshifted, gathered, taken_along)}


@pytest.mark.parametrize("bias", ["absorb", "omit", "distribute"])
@pytest.mark.parametrize("heads", [(), (2,)])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_a_softmax(way: str, heads: tuple[int, ...], bias: Any) -> None:
    e, start = normal(7, *heads, seed=1), normal(7, *heads, seed=2)
    rules = [(lrp.Softmax, lrp.TaylorSoftmax(bias))]

    def relevance(e: Tensor) -> Tensor:
        return lrp.attribute(WAYS[way], rules, argnums=0)(e, INDEX, target=start)

    expected = torch.zeros_like(e)
    for segment in range(NODES):
        own = torch.eq(INDEX, segment)
        if own.any():
            softmax = lrp.attribute(lambda e: e.softmax(0), rules, argnums=0)
            expected[own] = softmax(e[own], target=start[own])
    assert largest_difference(relevance(e), expected) < 1e-12
    assert finite_difference_error(lambda e: relevance(e).square().sum(), e) < 1e-6
    explanation = lrp.explain(WAYS[way], rules, argnums=0)(e, INDEX, target=start)
    assert [row.layer.kind for row in explanation.rows] == [lrp.Kind.SOFTMAX]
    assert abs(explanation.residual) < 1e-10


def test_the_sum_of_another_segment_is_none() -> None:
    def model_fn(e: Tensor, index: Tensor) -> Tensor:
        weights = e.exp()
        return weights / weights.new_zeros(NODES).index_add(0, index, weights)[index.flip(0)]

    kinds = {row.layer.kind for row in lrp.explain(model_fn, lrp.attn_lrp(), argnums=0)(normal(7), INDEX).rows}
    assert lrp.Kind.SOFTMAX not in kinds
    assert lrp.Kind.QUOTIENT in kinds


def test_graph_attention_does_not_notice_the_shift() -> None:
    w, x = normal(3, 3), normal(NODES, 3)
    source, end = torch.tensor([0, 1, 2, 3, 1, 0, 2]), INDEX

    def attention(softmax: Softmax) -> Callable[[Tensor, Tensor], Tensor]:
        def model_fn(w: Tensor, x: Tensor) -> Tensor:
            h = x @ w
            e = torch.nn.functional.leaky_relu((h[source] * h[end]).sum(-1))
            return x.new_zeros(NODES, 3).index_add(0, end, h[source] * softmax(e, end)[:, None])

        return model_fn

    ways = [lrp.attribute(attention(f), lrp.attn_lrp())(w, x, target=1) for f in WAYS.values()]
    for other in ways[1:]:
        assert largest_difference(ways[0], other) < 1e-12
