"""Relevance of some of the samples of a forward pass, at their part of its cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

import lrpfunc as lrp
from tests.cases import normal, randomized
from tests.oracles import largest_difference
from tests.test_shapes import made

W = normal(8, 3)
ROWS: dict[str, Any] = {
    "list": [5, 0, 2],
    "tensor": torch.tensor([5, 0, 2]),
    "mask": torch.tensor([True, False, True, False, False, True, False, False]),
    "slice": slice(1, 4),
    "negative": [-1, 3, -4],
}
SHAPES = {"dense": (8, 8), "attention": (8, 5, 8), "convolutional": (8, 2, 8, 8)}
RULES = {"dense": lrp.attn_lrp() + lrp.epsilon(), "attention": lrp.attn_lrp(), "convolutional": lrp.epsilon_plus_flat()}


def flops(f: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_full_walk_with_zeros_elsewhere(name: str, dynamic: bool, kind: str) -> None:
    """For every kind of target; twice, since the first walk is compared with that for all samples."""
    (model_fn, params, _), x, rows = made(name), normal(*SHAPES[name]), ROWS[kind]
    output, pullback = lrp.vjp(model_fn, RULES[name], params, x, dynamic=dynamic)
    numbers = normal(3, 3, seed=4)
    start = torch.zeros_like(output)
    start[rows] = numbers
    expected = pullback(start)[rows]
    for _ in range(2):
        assert largest_difference(pullback(numbers, rows=rows), expected) < 1e-12
    for target in (1, torch.tensor([0, 2, 1]), lrp.predicted, lrp.contrast(0, 1), None):
        wanted = lrp.attribute(model_fn, RULES[name])(params, x[rows], target=target)
        assert largest_difference(pullback(target, rows=rows), wanted) < 1e-12


@pytest.mark.parametrize("name", SHAPES)
def test_what_it_costs(name: str) -> None:
    """3 of 8 samples are three eighths of the operations."""
    (model_fn, params, _), x = made(name), normal(*SHAPES[name])
    _, pullback = lrp.vjp(model_fn, RULES[name], params, x, dynamic=True)
    pullback(1, rows=[0, 1, 2])
    assert 8 * flops(lambda: pullback(1, rows=[5, 0, 2])) == 3 * flops(lambda: pullback(1)) > 0


@pytest.mark.parametrize("dynamic", [True, False])
def test_derivatives(dynamic: bool) -> None:
    """Also through the statistics of a batch, which all of its samples have a part in."""
    model_fn, params = lrp.from_module(randomized(made_to_train()).train(), return_buffers=True)
    params = {key: p.detach().requires_grad_(p.requires_grad) for key, p in params.items()}
    x, rows, numbers = normal(8, 2, 6, 6), [5, 0, 2], normal(3, 3, seed=4)
    learned = [p for p in params.values() if p.requires_grad]

    def gradients(pull: Callable[[Any], Tensor]) -> tuple[Tensor, ...]:
        output, pullback, _ = lrp.vjp(model_fn, lrp.epsilon_plus(), params, x, has_aux=True, dynamic=dynamic)
        relevance = pull((output, pullback))
        return (relevance, *torch.autograd.grad((relevance**2).sum() + output.sum(), learned))

    def of_all(pair: Any) -> Tensor:
        output, pullback = pair
        return pullback(torch.zeros_like(output).index_copy(0, torch.tensor(rows), numbers))[rows]

    for _ in range(2):
        found, expected = gradients(lambda pair: pair[1](numbers, rows=rows)), gradients(of_all)
        assert all(largest_difference(a, b) < 1e-10 for a, b in zip(found, expected, strict=True))


def made_to_train() -> nn.Module:
    conv = nn.Conv2d(2, 4, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)).double()


@pytest.mark.parametrize("dynamic", [True, False])
def test_samples_that_are_mixed(dynamic: bool) -> None:
    """A gradient through the statistics of a batch, and attention across it."""
    model_fn, params = lrp.from_module(randomized(made_to_train()).train(), return_buffers=True)
    x = normal(8, 2, 6, 6)
    _, pullback, _ = lrp.vjp(model_fn, lrp.gradient(), params, x, has_aux=True, dynamic=dynamic)
    with pytest.raises(lrp.InputError, match=r"(?s)relevance goes from one sample to another.*pullback\(start\)"):
        pullback(1, rows=[0, 2])

    def across(w: Tensor, x: Tensor) -> Tensor:
        return (x @ x.T).softmax(-1) @ x @ w

    _, pullback = lrp.vjp(across, lrp.attn_lrp(), W, normal(8, 8), dynamic=dynamic)
    with pytest.raises(lrp.InputError, match="from one sample to another"):
        pullback(1, rows=[0, 2])


def test_relevance_of_layers_and_of_parameters() -> None:
    model_fn, params, _ = made("dense")
    x, rows = normal(8, 8), [5, 0, 2]
    start = torch.zeros(8, 3).double()
    start[rows] = numbers = normal(3, 3, seed=4)
    for dynamic in (True, False):
        _, pullback = lrp.vjp(model_fn, RULES["dense"], params, x, layers="*", dynamic=dynamic)
        for _ in range(2):
            (found, layers), (expected, whole) = pullback(numbers, rows=rows), pullback(start)
            assert largest_difference(found, expected[rows]) < 1e-12
            assert all(largest_difference(layers[name], whole[name][rows]) < 1e-12 for name in whole)
        _, pullback = lrp.vjp(model_fn, lrp.gradient(), params, x, argnums=(0, 1), dynamic=dynamic)
        for _ in range(2):
            (of_params, found), (expected, of_x) = pullback(numbers, rows=rows), pullback(start)
            assert largest_difference(found, of_x[rows]) < 1e-12
            assert all(largest_difference(of_params[name], expected[name]) < 1e-12 for name in expected)


def test_inside_vmap() -> None:
    model_fn, params, _ = made("dense")
    _, pullback = lrp.vjp(model_fn, RULES["dense"], params, normal(8, 8), dynamic=True)
    rows = torch.tensor([5, 0, 2])
    for _ in range(2):
        many = vmap(lambda start: pullback(start, rows=rows))(starts := normal(4, 3, 3))
        assert largest_difference(many, torch.stack([pullback(start, rows=rows) for start in starts])) < 1e-12


def test_what_picks_no_samples() -> None:
    _, pullback = lrp.vjp(lambda w, x: x @ w, lrp.epsilon(), W, normal(8, 8))
    for rows, message in (
        ([8], r"rows=\[8\] picks no samples of an output of shape \(8, 3\)"),
        ("all", "rows='all' picks no samples"),
        (3, r"rows=3 picks one sample, and a list of them is wanted"),
        ([[0, 1]], r"a grid of samples, \(1, 2\)"),
        ([1, 1], "picks a sample several times"),
    ):
        with pytest.raises(lrp.InputError, match=message):
            pullback(1, rows=rows)
    assert pullback(1, rows=[]).shape == (0, 8)
    with pytest.raises(lrp.InputError, match="the output has none"):
        lrp.vjp(lambda w, x: (x @ w).sum(), lrp.epsilon(), W, normal(8, 8))[1](None, rows=[0])
