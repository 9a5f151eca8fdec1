"""Writes by the name that `detach` gives a tensor: the numbers are shared, and the history is not, as in autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lrpfunc as lrp
from tests.cases import normal

W, V, X = normal(4, 3), normal(4, 3, seed=1), normal(2, 4, seed=2)


def both_are_read(x: Tensor) -> Tensor:
    h = x @ W
    v = h.detach()
    v += torch.sin(x @ V)
    return v + 2 * h


def only_the_alias_is_read(x: Tensor) -> Tensor:
    v = (x @ W).detach()
    v += torch.sin(x @ V)
    return v * 1.0


def part_of_it(x: Tensor) -> Tensor:
    h = x @ W
    v = h[0].detach()
    v += torch.sin(x @ V)[1]
    return v * h


def alias_of_an_alias(x: Tensor) -> Tensor:
    h = x @ W
    row = h[0]
    v = h.detach()
    v *= 2
    v[0] += (x @ V)[0]
    u = v.detach()
    u[1] += (x @ V)[1]
    return h + v.sigmoid() * 3 + u * 2 + row


def without_gradients_first(x: Tensor) -> Tensor:
    h = x @ W
    v = h.detach()
    with torch.no_grad():
        v += torch.sin(x @ V)
    v[:, 1:] += (x @ V)[:, 1:]
    return v + 2 * h


def without_gradients_later(x: Tensor) -> Tensor:
    h = x @ W
    v = h.detach()
    v += x @ V
    with torch.no_grad():
        h *= 2
    return v * 2 + h * 3


def data(x: Tensor) -> Tensor:
    h = x @ W
    v = h.data
    v += torch.sin(x @ V)
    v = v.clone()
    h += v
    return v * 2 + h * 3


def the_tensor_is_written_to(x: Tensor) -> Tensor:
    h = x @ W
    v = h.detach()
    h += x @ V
    v *= 3
    return v * 2 + h * 3


def of_a_constant(x: Tensor) -> Tensor:
    h = torch.zeros(2, 3, dtype=x.dtype)
    v = h.detach()
    v += x @ V
    u = v.detach()
    u += x @ W
    return v * 2 + u * 3 + h


CASES = [
    both_are_read,
    only_the_alias_is_read,
    part_of_it,
    alias_of_an_alias,
    without_gradients_first,
    without_gradients_later,
    data,
    the_tensor_is_written_to,
    of_a_constant,
]


@pytest.mark.parametrize("model_fn", CASES)
@pytest.mark.parametrize("before_dispatch", [True, False])
def test_writes_by_a_detached_name_are_autograds(model_fn: Callable[[Tensor], Tensor], before_dispatch: bool) -> None:
    def transformed(x: Tensor) -> Tensor:  # is recorded after dispatch
        return model_fn(x) + torch.vmap(torch.sin)(x).sum()

    function = model_fn if before_dispatch else transformed
    x = X.clone().requires_grad_()
    expected = function(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    output, pullback = lrp.vjp(function, lrp.gradient(), X, argnums=0)
    assert torch.equal(output, expected)
    torch.testing.assert_close(pullback(torch.ones_like(output)), gradient, rtol=1e-12, atol=1e-12)


def test_a_value_that_autograd_would_have_saved_is_the_one_it_was() -> None:
    """Autograd has only the numbers that were written later, and raises; a program has both."""

    def model_fn(x: Tensor) -> Tensor:
        h = x @ W
        y = h.sigmoid()
        v = y.detach()
        v += x @ V
        return y + v

    def cloned(x: Tensor) -> Tensor:
        y = (x @ W).sigmoid()
        v = y.detach() + x @ V
        return (y + (v - y).detach()) + v

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model_fn(X.clone().requires_grad_()).sum().backward()
    output, pullback = lrp.vjp(model_fn, lrp.gradient(), X, argnums=0)
    expected, expected_pullback = lrp.vjp(cloned, lrp.gradient(), X, argnums=0)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(pullback(output), expected_pullback(output))


NAN = float("nan")


def overwritten(x: Tensor) -> Tensor:
    b = torch.full((4,), NAN, dtype=x.dtype)
    with torch.no_grad():
        b.copy_(torch.arange(4.0))
    return (x + b) @ W


def overwritten_in_parts(x: Tensor) -> Tensor:
    table = torch.empty(2, 4, dtype=x.dtype).fill_(NAN)
    with torch.no_grad():
        table[:, ::2] = torch.arange(2.0).sin()
        table[:, 1::2].copy_(torch.arange(2.0).cos())
    return (x * table) @ W


def overwritten_by_data(x: Tensor) -> Tensor:
    table = torch.nn.Parameter(torch.full((2, 4), NAN, dtype=x.dtype))
    table.data.copy_(torch.ones(2, 4))
    torch.nn.init.constant_(table, 2.0)
    return (x * table) @ W


@pytest.mark.parametrize("model_fn", [overwritten, overwritten_in_parts, overwritten_by_data])
@pytest.mark.parametrize("lowered", [True, False])
def test_memory_that_held_nan(model_fn: Callable[[Tensor], Tensor], lowered: bool) -> None:
    relevance_fn = lrp.attribute_and_value(model_fn, lrp.gradient(), argnums=0, lowered=lowered)
    relevance, output = relevance_fn(X, target=1)
    assert torch.equal(output, model_fn(X))
    torch.testing.assert_close(relevance, torch.func.grad(lambda x: model_fn(x)[:, 1].sum())(X))
    slope = torch.func.grad(lambda x: relevance_fn(x, target=1)[0].square().sum() + relevance_fn(x, target=1)[1].sum())
    torch.testing.assert_close(slope(X), torch.func.grad(lambda x: model_fn(x).sum())(X))
    assert lrp.attribute(model_fn, lrp.epsilon(), argnums=0, lowered=lowered)(X, target=1).isfinite().all()
