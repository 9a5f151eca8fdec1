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


# ---------------------------------------------------------------------------------------------------------------------
# The training question: a batch norm that learns, several attributions of parts of a batch beside the task loss


class Dropped(nn.Module):
    """A net with a batch norm and with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.nn.functional.avg_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1)))


def plain_and_explained() -> tuple[nn.Module, nn.Module]:
    return tuple(randomized(Dropped().double()).train() for _ in range(2))  # type: ignore[return-value]


def test_training_on_several_attributions_of_one_forward_pass() -> None:
    """With weight 0 for the attributions, parameters and running statistics are plain training's to the bit."""
    x, labels, a, b = normal(8, 2, 8, 8), torch.arange(8) % 3, torch.tensor([0, 3, 5]), torch.tensor([1, 2])
    mask = torch.ones(8, 1, 8, 8).double()
    mask[..., 4:] = 0
    plain, explained = plain_and_explained()
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.01) for module in (plain, explained)]
    model_fn, params = lrp.from_module(explained, return_buffers=True)
    for step in range(3):
        losses = []
        torch.manual_seed(step)
        losses.append(nn.functional.cross_entropy(plain(x), labels))
        torch.manual_seed(step)
        output, pullback, buffers = lrp.vjp(model_fn, lrp.epsilon_plus(), params, x, has_aux=True)
        one, other = pullback(lrp.one_hot(labels[a], value=1.0), rows=a), pullback(normal(2, 3, seed=step), rows=b)
        assert one.shape == x[a].shape
        penalty = lrp.losses.outside(one, mask[a]) + lrp.losses.sparsity(other)
        losses.append(nn.functional.cross_entropy(output, labels) + 0.0 * penalty)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        lrp.update_buffers(explained, buffers)
        assert all(map(torch.equal, plain.state_dict().values(), explained.state_dict().values()))


def test_the_gradient_of_the_whole_loss() -> None:
    """It is what finite differences give, along a direction in all parameters."""
    x, labels, a = normal(8, 2, 8, 8), torch.arange(8) % 3, torch.tensor([0, 3, 5])
    mask = torch.ones(3, 1, 8, 8).double()
    mask[..., 4:] = 0
    module = randomized(Dropped().double()).train()
    model_fn, params = lrp.from_module(module, return_buffers=True)
    learned = {name: p.detach() for name, p in params.items() if p.requires_grad}
    direction = {name: normal(*p.shape, seed=len(name)) for name, p in learned.items()}

    def loss(t: Any) -> Tensor:
        torch.manual_seed(0)
        moved = params | {name: p + t * direction[name] for name, p in learned.items()}
        output, pullback, _ = lrp.vjp(model_fn, lrp.epsilon_plus(0.1, stabilizer=0.1), moved, x, has_aux=True)
        penalty = lrp.losses.outside(pullback(labels[a], rows=a), mask)
        return nn.functional.cross_entropy(output, labels) + penalty

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(t), t)
    assert abs(float(slope) - float(loss(1e-6) - loss(-1e-6)) / 2e-6) < 1e-6 * max(1.0, abs(float(slope)))


def test_how_many_passes_a_step_takes() -> None:
    """One forward pass of the model, and one walk for each attribution."""
    x = normal(8, 8)

    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        return torch.relu(x @ w)

    forward = flops(lambda: model_fn(W, x))
    _, pullback = lrp.vjp(model_fn, lrp.epsilon(), W, x)
    assert flops(lambda: lrp.vjp(model_fn, lrp.epsilon(), W, x)) == forward
    assert flops(lambda: [pullback(target) for target in range(3)]) == 3 * forward


def test_buffers_that_do_not_fit() -> None:
    norm = nn.BatchNorm1d(2)
    with pytest.raises(lrp.InputError, match=r"BatchNorm1d has no buffer '0.running_mean': it has running_mean, "):
        lrp.update_buffers(norm, {"0.running_mean": torch.zeros(2)})
    with pytest.raises(lrp.InputError, match=r"has shape \(2,\), and is given one of shape \(3, 2\), as by vmap"):
        lrp.update_buffers(norm, {"running_mean": torch.zeros(3, 2)})


# ---------------------------------------------------------------------------------------------------------------------
# A first walk that proves nothing


def test_all_rows_first_prove_nothing_of_some() -> None:
    """Whoever asks for all samples sees none that relevance could have gone to."""
    model_fn, params = lrp.from_module(randomized(made_to_train()).train(), return_buffers=True)
    _, pullback, _ = lrp.vjp(model_fn, lrp.gradient(), params, normal(8, 2, 6, 6), has_aux=True, dynamic=True)
    assert largest_difference(pullback(1, rows=slice(None)), pullback(1)) < 1e-12
    for _ in range(2):
        with pytest.raises(lrp.InputError, match="from one sample to another"):
            pullback(1, rows=[0, 2])


def test_a_start_of_zero_first_proves_nothing() -> None:
    """The positions stand before the samples where both are in one dimension: their rows are not those of the walk."""

    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        rows = torch.relu(x.transpose(0, 1).reshape(length * batch, width))
        return (rows @ w).reshape(length, batch, -1).sum(0)

    x, rows = normal(8, 5, 8), [5, 0, 2]
    output, pullback = lrp.vjp(model_fn, RULES["dense"], W, x, dynamic=True)
    numbers, start = normal(3, 3, seed=4), torch.zeros_like(output)
    start[rows] = numbers
    assert not pullback(torch.zeros(3, 3).double(), rows=rows).any()
    for _ in range(2):
        assert largest_difference(pullback(numbers, rows=rows), pullback(start)[rows]) < 1e-12


def test_data_whose_samples_do_not_stand_first() -> None:
    _, pullback = lrp.vjp(lambda w, x: (x @ w).sum(0), lrp.attn_lrp(), W, normal(5, 4, 8))
    with pytest.raises(lrp.InputError, match=r"(?s)the output has 4 samples.*shape \(5, 4, 8\).*transpose"):
        pullback(1, rows=[0, 2])
