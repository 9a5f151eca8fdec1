"""One program for every size: batches, lengths and resolutions that differ from call to call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

import lrpfunc as lrp
from lrpfunc.rules._message import Message
from lrpfunc.testing import Net, models
from tests.cases import normal, randomized
from tests.oracles import largest_difference

W = normal(8, 3)


class Attention(nn.Module):
    """Heads by `view`, a causal mask, a table of positions, a mean over them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 3)
        self.positions = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        x = x + self.positions[:length]
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mask = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)
        weights = (q @ k.mT / 2 + mask).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).reshape(batch, length, width)
        return self.head(x.mean(1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
    )


class ChannelsLast(nn.Module):
    """Convolutions by depth around a layer norm over channels, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(2, 4, 2, stride=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.up, self.last = nn.LayerNorm(4), nn.Linear(4, 6), nn.LayerNorm(6)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Flatten(1), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.stem(x)).permute(0, 2, 3, 1)
        pooled = self.pool(F.gelu(self.up(self.norm(y))).permute(0, 3, 1, 2))
        return self.head(self.last(pooled.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def channels_last() -> nn.Module:
    return ChannelsLast()


def attention() -> nn.Module:
    return Attention()


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "dense": (dense, [(3, 8), (5, 8), (2, 8), (7, 8)]),
    "attention": (attention, [(2, 5, 8), (2, 7, 8), (2, 3, 8), (4, 9, 8), (3, 4, 8)]),
    "channels last": (channels_last, [(2, 2, 8, 8), (5, 2, 8, 8), (3, 2, 8, 8), (3, 2, 12, 10), (4, 2, 10, 12)]),
    "convolutional": (convolutional, [(2, 2, 8, 8), (5, 2, 8, 8), (3, 2, 8, 8), (3, 2, 12, 10), (4, 2, 9, 11)]),
}


def made(name: str) -> tuple[Callable[..., Any], Any, list[tuple[int, ...]]]:
    module, sizes = NETS[name]
    return *lrp.from_module(randomized(module().double()).eval()), sizes


@pytest.mark.parametrize(
    "rules", [lrp.attn_lrp() + lrp.epsilon(), lrp.attn_lrp() + lrp.epsilon_plus_flat()], ids=["epsilon", "flat"]
)
@pytest.mark.parametrize("name", NETS)
def test_a_program_for_all_sizes_equals_one_for_each(name: str, rules: lrp.Composite) -> None:
    """Values, relevance, and derivatives by the parameters."""
    model_fn, params, sizes = made(name)
    functions = [lrp.attribute_and_value(model_fn, rules, dynamic=dynamic) for dynamic in (None, True, False)]
    for seed, size in enumerate(sizes):
        x = normal(*size, seed=seed)
        *found, (expected, value) = (fn(params, x, target=1) for fn in functions)
        for relevance, output in found:
            assert torch.equal(output, value)
            assert largest_difference(relevance, expected) < 1e-12
        *derivatives, derivative = (
            grad(lambda p, fn=fn, x=x: (fn(p, x, target=1)[0] ** 2).sum())(params) for fn in functions
        )
        for one in derivatives:
            assert max(largest_difference(one[key], derivative[key]) for key in derivative) < 1e-11


@pytest.mark.parametrize("name", NETS)
def test_few_recordings_serve_every_size(name: str, recordings: list[int]) -> None:
    """One for the first sizes, and one more for each time that another dimension differs."""
    model_fn, params, sizes = made(name)
    relevance_fn = lrp.attribute(model_fn, lrp.attn_lrp() + lrp.epsilon_plus())
    for seed, size in enumerate(sizes):
        relevance_fn(params, normal(*size, seed=seed), target=1)
    assert len(recordings) == (2 if name == "dense" else 3)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_how_often_a_function_is_recorded(dynamic: bool | None, recordings: list[int]) -> None:
    relevance_fn = lrp.attribute(lambda w, x: torch.relu(x @ w), lrp.epsilon(), dynamic=dynamic)
    for batch in (5, 3, 7, 2, 9, 3, 5):
        assert relevance_fn(W, normal(batch, 8)).shape == (batch, 8)
    assert len(recordings) == {None: 2, True: 1, False: 5}[dynamic]
    relevance_fn(W, normal(1, 8))  # which broadcasts
    assert len(recordings) == {None: 3, True: 2, False: 6}[dynamic]


def test_parameters_are_data_only_where_they_stand_alone(recordings: list[int]) -> None:
    """Another width is another model."""
    relevance_fn = lrp.attribute(lambda w, x: x @ w, lrp.epsilon())
    for width in (2, 3, 4):
        relevance_fn(normal(8, width), normal(2, 8))
    assert len(recordings) == 3
    relevance_fn = lrp.attribute(lambda x: torch.relu(x @ W), lrp.epsilon(), argnums=0)
    for batch in (2, 3, 4):
        relevance_fn(normal(batch, 8))
    assert len(recordings) == 5


# ---------------------------------------------------------------------------------------------------------------------
# What a recording closes


def looped(w: Tensor, x: Tensor) -> Tensor:
    """A state for each position."""
    h = torch.zeros(x.shape[0], w.shape[0], dtype=x.dtype)
    for t in range(x.shape[1]):
        h = torch.tanh(h + x[:, t])
    return h @ w


def test_a_loop_over_positions_is_recorded_for_each_length(
    recordings: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    relevance_fn = lrp.attribute(looped, lrp.epsilon())
    with caplog.at_level(logging.INFO, logger="lrpfunc"):
        for batch, length in ((2, 3), (2, 4), (3, 3), (4, 3), (5, 3), (3, 4), (6, 4)):
            relevance, x = relevance_fn(W, x := normal(batch, length, 8), target=1), x
            expected = lrp.attribute(looped, lrp.epsilon(), dynamic=False)(W, x, target=1)
            assert largest_difference(relevance, expected) < 1e-12
    assert any("closes" in record.message for record in caplog.records)


def test_a_size_beyond_a_guard_is_recorded_by_itself(recordings: list[int]) -> None:
    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        return x @ w * (2.0 if x.shape[0] < 6 else 3.0)

    relevance_fn = lrp.attribute(model_fn, lrp.epsilon())
    for batch in (2, 3, 4, 5, 6, 7, 8, 5):
        relevance = relevance_fn(W, x := normal(batch, 8), target=0)
        assert largest_difference(relevance, x * W[:, 0] * (2 if batch < 6 else 3)) < 1e-5
    assert len(recordings) == 3


def test_the_error_of_a_model_for_a_size_is_its_own() -> None:
    model_fn, params, _ = made("attention")
    relevance_fn = lrp.attribute(model_fn, lrp.attn_lrp())
    for length in (5, 7):
        relevance_fn(params, normal(2, length, 8), target=0)
    with pytest.raises(RuntimeError, match="broadcast a dimension of length 16"):
        relevance_fn(params, normal(2, 17, 8), target=0)


def test_a_rule_for_certain_sizes() -> None:
    """Bounds for each element of a batch: the walk fits it alone, and others have walks of their own."""
    for batch in (2, 3, 4, 3):
        low = -torch.ones(batch, 8).double()
        relevance = [
            lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, lrp.ZBox(low, 2.0))], dynamic=dynamic)(W, normal(batch, 8))
            for dynamic in (None, True, False)
        ]
        assert largest_difference(relevance[0], relevance[2]) == largest_difference(relevance[1], relevance[2]) == 0


class Half(lrp.Rule):
    """Asks for a number where others leave it open."""

    def propagate(self, layer: lrp.BoundLayer, message: Message) -> tuple[Message, ...]:
        share = 1 / int(layer.output.shape[0])
        return lrp.Epsilon().propagate(layer, type(message)(message.value * share))  # pyright: ignore


def test_a_rule_that_asks_for_a_number() -> None:
    relevance_fn = lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, Half())])
    for batch in (2, 3, 4, 3):
        expected = lrp.attribute(lambda w, x: x @ w, lrp.epsilon())(W, x := normal(batch, 8)) / batch
        assert largest_difference(relevance_fn(W, x), expected) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# With everything else


def test_transforms_around_a_program_for_all_sizes() -> None:
    model_fn, params, _ = made("attention")
    one, each = (lrp.attribute(model_fn, lrp.attn_lrp(), dynamic=dynamic) for dynamic in (True, False))
    one(params, normal(3, 4, 8), target=0)
    for batch, length in ((2, 5), (4, 6)):
        x = normal(batch, length, 8)
        many = vmap(lambda t, x=x: one(params, x, target=t))(torch.arange(3))
        assert largest_difference(many, torch.stack([each(params, x, target=t) for t in range(3)])) < 1e-12
        samples = vmap(lambda x: one(params, x[None], target=1)[0])(x)
        assert largest_difference(samples, each(params, x, target=1)) < 1e-12
        wanted = [grad(lambda x, fn=fn: fn(params, x, target=1).square().sum())(x) for fn in (one, each)]
        assert largest_difference(*wanted) < 1e-11
        bound, in_segments = one.bind(params), lrp.attribute(model_fn, lrp.attn_lrp(), dynamic=True, segments=3)
        for fn in (bound, lambda x, target, fn=in_segments: fn(params, x, target=target)):
            assert largest_difference(fn(x, target=1), each(params, x, target=1)) < 1e-12
        output, pullback = lrp.vjp(model_fn, lrp.attn_lrp(), params, x, dynamic=True)
        assert torch.equal(output, model_fn(params, x))
        assert largest_difference(pullback(1), each(params, x, target=1)) < 1e-12


def test_tensors_with_gaps_in_memory() -> None:
    """A short sentence of a padded batch, another order of dimensions, and one row for all."""
    model_fn, params, _ = made("attention")
    one, each = (lrp.attribute(model_fn, lrp.attn_lrp(), dynamic=dynamic) for dynamic in (True, False))
    padded = normal(3, 9, 8)
    for x in (padded[:, :5], padded.mT.contiguous().mT, padded[::2], padded[:1].expand(4, -1, -1), padded[:, 2:]):
        assert largest_difference(one(params, x, target=1), each(params, x, target=1)) < 1e-12
    model_fn, params, _ = made("convolutional")
    one, each = (lrp.attribute(model_fn, lrp.epsilon_plus(), dynamic=dynamic) for dynamic in (True, False))
    for size in (8, 10):
        x = normal(2, 2, size, 8).contiguous(memory_format=torch.channels_last)
        assert largest_difference(one(params, x, target=1), each(params, x, target=1)) < 1e-12


def test_token_ids_and_masks(recordings: list[int]) -> None:
    def model_fn(table: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(F.embedding(ids, table))
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    one = lrp.attribute(model_fn, lrp.attn_lrp(), layers="*")
    for batch, length in ((2, 5), (2, 7), (2, 4), (3, 6), (4, 5)):
        ids = torch.randint(0, 16, (batch, length))
        mask = (ids > 2).double()
        mask[:, 0] = 1.0
        _, found = one(normal(16, 3), ids, mask, target=1)
        _, expected = lrp.attribute(model_fn, lrp.attn_lrp(), layers="*", dynamic=False)(
            normal(16, 3), ids, mask, target=1
        )
        assert found.keys() == expected.keys()
        assert max(largest_difference(found[name], expected[name]) for name in found) < 1e-12
    assert len(recordings) == 3 + 4


def test_statistics_of_batches_of_any_size() -> None:
    module = randomized(convolutional().double()).train()
    model_fn, params = lrp.from_module(module, return_buffers=True)
    for dynamic in (None, True):
        fn = lrp.attribute_and_value(model_fn, lrp.epsilon_plus(), has_aux=True, dynamic=dynamic)
        for batch in (3, 5, 4):
            x = normal(batch, 2, 8, 8)
            relevance, (value, buffers) = fn(params, x, target=1)
            expected, (output, updated) = lrp.attribute_and_value(
                model_fn, lrp.epsilon_plus(), has_aux=True, dynamic=False
            )(params, x, target=1)
            assert torch.equal(value, output)
            assert all(torch.equal(buffers[name], updated[name]) for name in updated)
            assert largest_difference(relevance, expected) < 1e-12


@pytest.mark.slow
@settings(max_examples=12, suppress_health_check=list(HealthCheck))  # pyright: ignore[reportArgumentType]
@given(models())
def test_drawn_models_with_other_batches(net: Net) -> None:
    model_fn, params, x = net.case()
    rules = lrp.attn_lrp() + lrp.epsilon_plus_flat(0.1, stabilizer=0.1)
    one, each = (lrp.attribute(model_fn, rules, dynamic=dynamic) for dynamic in (True, False))
    for batch in (torch.cat([x, x.flip(0) * 0.7]), torch.cat([x, x, -x])):
        found, expected = one(params, batch, target=0), each(params, batch, target=0)
        assert largest_difference(found, expected) < 1e-12


def test_a_compiled_function_of_any_size() -> None:
    model_fn, params, _ = made("attention")
    relevance_fn = lrp.attribute(model_fn, lrp.attn_lrp())
    compiled = torch.compile(relevance_fn, dynamic=True, backend="aot_eager", fullgraph=True)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for batch, length in ((2, 5), (3, 7), (4, 6), (5, 9)):
        x = normal(batch, length, 8)
        assert largest_difference(compiled(params, x, target=1), relevance_fn(params, x, target=1)) < 1e-12
    assert graphs["unique_graphs"] - before <= 2


def test_an_exported_function_of_any_size() -> None:
    model_fn, params, _ = made("attention")
    relevance_fn = lrp.attribute(model_fn, lrp.attn_lrp()).bind(params)
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2, max=16)}
    exported = torch.export.export(relevance_fn, (normal(3, 6, 8),), {"target": 1}, dynamic_shapes=((sizes,), None))
    for batch, length in ((2, 5), (4, 9)):
        x = normal(batch, length, 8)
        assert largest_difference(exported.module()(x, target=1), relevance_fn(x, target=1)) < 1e-12
