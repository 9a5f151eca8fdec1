"""Rules and models that a careless lowering gets wrong: each equals the walk operation by operation."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lrpfunc as lrp
from tests.cases import normal
from tests.oracles import finite_difference_error, largest_difference

Body = Callable[[Any, Any], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Written(lrp.Rule):
    """A rule that returns what a function computes."""

    body: Body
    form = "relevance"

    def propagate(self, layer: Any, message: Any) -> tuple[Any, ...]:
        return (lrp.Relevance(self.body(layer, message)),)


def promoted(layer: Any, message: Any) -> Tensor:
    return message.value * ((layer.input > 0) * 1 + (layer.output > 0) * 1)


def promoted_from_bool(layer: Any, message: Any) -> Tensor:
    return message.value * (1 - (layer.input > 0) * 1.0)


def broadcast(layer: Any, message: Any) -> Tensor:
    return message.value * torch.where(layer.input < 0, torch.ones(5, *layer.input.shape).double(), layer.input).sum(0)


def detached(layer: Any, message: Any) -> Tensor:
    y = message.value * layer.input
    before = y.detach()
    return (y + 1) * before


def viewed(layer: Any, message: Any) -> Tensor:
    y = message.value * layer.input
    flat = y.reshape(-1)
    return (y + 1) * flat.view(y.shape)


def twice(layer: Any, message: Any) -> Tensor:
    y = message.value * layer.input
    return (y * y + y) / (y + 2)


def itself(layer: Any, message: Any) -> Tensor:
    return message.value


@pytest.mark.parametrize("body", [promoted, promoted_from_bool, broadcast, detached, viewed, twice, itself])
@pytest.mark.parametrize("differentiated", [False, True])
def test_rules(body: Body, differentiated: bool) -> None:
    rules = lrp.Composite([(lrp.operation("gelu"), Written(body))]) + lrp.epsilon_plus()
    x = normal(2, 3).requires_grad_(differentiated)
    fns = [lrp.attribute(lambda _, x: F.gelu(x.relu()) * 2, rules, lowered=n, layers="*") for n in (True, False)]
    found, steps = (fn(None, x, target=1) for fn in fns)
    assert largest_difference(found, steps) < 1e-12


@pytest.mark.parametrize("threshold", [0.5, -0.5, 0.0])
def test_a_threshold_is_no_relu(threshold: float) -> None:
    rules = [(lrp.Activation, lrp.Gradient()), *lrp.epsilon().entries]
    fns = [
        lrp.attribute(lambda p, x: F.threshold(x @ p["w"], threshold, 0.0) @ p["v"], rules, lowered=n)
        for n in (True, False)
    ]
    params = {"w": normal(4, 4), "v": normal(4, 3, seed=1)}
    found, steps = (fn(params, normal(3, 4, seed=2), target=0) for fn in fns)
    assert largest_difference(found, steps) < 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Reading(lrp.Rule):
    factor: Tensor

    def propagate(self, layer: Any, message: Any) -> tuple[Any, ...]:
        return (lrp.Relevance(message.relevance(layer.output) * float(self.factor)),)


def test_a_number_read_from_a_tensor_is_read_again() -> None:
    x = normal(2, 3).abs()
    for factor in (2.0, 3.0):
        relevance_fn = lrp.attribute(lambda _, x: x.relu(), [(lrp.Activation, Reading(torch.tensor(factor)))])
        assert torch.allclose(relevance_fn(None, x), factor * x)
    flag = torch.tensor(True)
    rules = [(lambda layer: bool(flag) and lrp.Activation(layer), lrp.Pass()), (lrp.Activation, lrp.Gradient())]
    relevance_fn = lrp.attribute(lambda _, x: F.gelu(x), rules)
    passed = relevance_fn(None, x)
    flag.fill_(False)
    assert not torch.allclose(relevance_fn(None, x), passed)


def test_a_rule_that_reads_numbers_is_refused() -> None:
    reading = [
        lambda layer, message: message.value if message.value.sum() > 0 else -message.value,
        lambda layer, message: message.value[:, int(layer.input.sum(0).argmax())].unsqueeze(1).expand(2, 3),
    ]
    for function in reading:
        rules = [(lrp.Activation, Written(function))]
        with pytest.raises(lrp.RuleError, match=r"(?s)depends on the numbers inside a tensor.*lowered=False"):
            lrp.attribute(lambda _, x: x.relu(), rules)(None, normal(2, 3))
        lrp.attribute(lambda _, x: x.relu(), rules, lowered=False)(None, normal(2, 3))


def without_gradients(layer: Any, message: Any) -> Tensor:
    with torch.no_grad():
        doubled = layer.input * 2
    return message.value * doubled


def test_a_rule_without_gradients_is_told_to_detach() -> None:
    rules = [(lrp.Activation, Written(without_gradients))]
    with pytest.raises(lrp.RuleError, match=r"torch.no_grad\(\).*detach\(\)"):
        lrp.attribute(lambda _, x: x.relu(), rules)(None, normal(2, 3))


def overwriting(layer: Any, message: Any) -> Tensor:
    return message.value * layer.input.clamp_(min=0)


def test_a_rule_that_overwrites_is_refused() -> None:
    x = normal(2, 3)
    before = x.clone()
    with pytest.raises(lrp.RuleError, match=r"changes in place a tensor that it was given"):
        lrp.attribute(lambda _, x: F.gelu(x), [(lrp.Activation, Written(overwriting))])(None, x)
    assert torch.equal(x, before)


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers


def masked(p: Any, x: Tensor) -> Tensor:
    """Stochastic depth, its mask drawn without gradients."""
    with torch.no_grad():
        mask = torch.bernoulli(torch.full(x.shape, 0.5, dtype=x.dtype))
    h = ((x @ p["w"]) * mask).relu()
    return (h @ p["w"]).relu() @ p["v"]


PARAMS = {"w": normal(4, 4), "v": normal(4, 3, seed=1)}


def test_segments_see_the_same_draw() -> None:
    fn = lrp.attribute_and_value(masked, lrp.epsilon(0.0), segments=3)
    for _ in range(3):
        relevance, value = fn(PARAMS, normal(3, 4, seed=2))
        assert torch.allclose(relevance.sum(), value.sum())


def test_bind_draws_anew() -> None:
    bound = lrp.attribute_and_value(masked, lrp.epsilon(0.0)).bind(PARAMS)
    values = [bound(normal(3, 4, seed=2))[1] for _ in range(4)]
    assert any(not torch.equal(values[0], value) for value in values[1:])


def test_a_differentiated_target_sees_the_same_draw() -> None:
    def dropped(p: Any, x: Tensor) -> Tensor:
        return F.dropout((x @ p["w"]).relu(), 0.5, True) @ p["v"]

    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    fn = lrp.attribute_and_value(dropped, lrp.epsilon(0.0))
    relevance, value = fn(PARAMS, normal(3, 4, seed=2), target=lambda out: factor * out)
    assert torch.allclose(relevance.sum(), value.sum())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="draws random numbers"):
        torch.compile(fn, fullgraph=True, backend="aot_eager")(PARAMS, normal(3, 4, seed=2), target=lambda out: 2 * out)


# ---------------------------------------------------------------------------------------------------------------------
# bind, compile


def test_what_bind_returns_is_the_callers() -> None:
    def model_fn(p: Any, x: Tensor) -> Any:
        return x @ p["w"], (p["w"], 2 * p["w"], p["w"].T)

    bound = lrp.attribute(model_fn, lrp.epsilon(), has_aux=True).bind(PARAMS)
    relevance, aux = bound(normal(3, 4), target=0)
    for tensor in aux:
        tensor.zero_()
    assert torch.equal(bound(normal(3, 4), target=0)[0], relevance)


def test_bind_refuses_transformed_parameters() -> None:
    fn = lrp.attribute(lambda p, x: x @ p, lrp.epsilon())
    stacked, x = normal(2, 4, 3), normal(3, 4)
    with pytest.raises(lrp.InputError, match=r"holds copies"):
        torch.vmap(lambda p: fn.bind(p)(x, target=0))(stacked)
    with pytest.raises(lrp.InputError, match=r"holds copies"):
        torch.func.grad(lambda p: fn.bind(p)(x, target=0).sum())(stacked[0])


def test_compiles_with_a_tensor_in_a_rule() -> None:
    torch._dynamo.reset()
    fn = lrp.attribute(lambda p, x: (x @ p["w"]).relu() @ p["v"], lrp.epsilon(torch.tensor(0.1).double()))
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert largest_difference(compiled(PARAMS, normal(3, 4), target=1), fn(PARAMS, normal(3, 4), target=1)) < 1e-12


def by_weight(layer: Any, message: Any) -> Tensor:
    return (layer.parameters[0].abs().sum(0)[None] + 1) * message.value.sum(-1, keepdim=True)


def test_the_walk_writes_to_nothing_that_is_bound() -> None:
    params, x = {"w": normal(2, 3)}, normal(1, 3)
    relevance_fn = lrp.attribute(lambda p, x: F.linear(x, p["w"]), [(lrp.Dense, Written(by_weight))])
    bound, expected = relevance_fn.bind(params), relevance_fn(params, x, target=1)
    assert all(torch.equal(bound(x, target=1), expected) for _ in range(2))


def test_what_is_mapped_over_is_not_written_to_what_is_not() -> None:
    params, x = {"w": normal(2, 3)}, normal(1, 3)
    relevance_fn = lrp.attribute(lambda p, x: F.linear(x, p["w"]), [(lrp.Dense, Written(by_weight))])
    every = torch.vmap(lambda t: relevance_fn(params, x, target=t))(torch.arange(2))
    assert all(torch.equal(every[t], relevance_fn(params, x, target=t)) for t in range(2))


class Severed(torch.autograd.Function):
    """The identity, with a backward of its own, as it was written before torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(gradients[0])


@pytest.mark.parametrize("lowered", [True, False])
def test_custom_autograd_functions_are_refused(lowered: bool) -> None:
    rule = Written(lambda layer, message: Severed.apply(message.value * layer.input))
    with pytest.raises(lrp.RuleError, match=r"custom torch\.autograd\.Function, Severed\. Its backward"):
        lrp.attribute(F.relu, [(lrp.Activation, rule)], argnums=0, lowered=lowered)(normal(1, 3), target=0)


def test_custom_autograd_functions_that_do_not_show() -> None:
    rule = Written(lambda layer, message: importlib.import_module(__name__).Severed.apply(message.value * layer.input))
    with pytest.raises(lrp.RuleError, match=r"custom torch\.autograd\.Function\. Its backward"):
        lrp.attribute(F.relu, [(lrp.Activation, rule)], argnums=0)(normal(1, 3), target=0)


def circular(_: Any, x: Tensor) -> Tensor:
    return F.pad(torch.tanh(x), (1, 1, 2, 1), mode="circular").permute(0, 2, 3, 1).square()[:, 1:].sum((1, 2, 3))


def circular_of_one_number(_: Any, x: Tensor) -> Tensor:
    return F.pad(torch.tanh(x), (1, 1, 2, 1), mode="circular").sum((1, 2, 3)).square()


def windows(_: Any, x: Tensor) -> Tensor:
    return torch.tanh(x).as_strided((len(x), 4, 3), (60, 5, 2), 1).square().sum((1, 2))


def windows_of_what_was_written(_: Any, x: Tensor) -> Tensor:
    y = x.new_zeros(len(x), 5, 4, 3)
    y.copy_(x.permute(0, 3, 2, 1))
    return y.as_strided((len(x), 4, 3), (60, 5, 2), 1).square().sum((1, 2))


def score_of_what_was_written(_: Any, x: Tensor) -> Tensor:
    def energy(x: Tensor) -> Tensor:
        y = x * 1.0
        y[..., 1:3].add_(y[..., :2].clone())
        return F.pad(y, (1, 1, 2, 1), mode="circular").sin().sum()

    return torch.func.grad(energy)(x).square().sum((1, 2, 3))


@pytest.mark.parametrize(
    "model_fn",
    [circular, circular_of_one_number, windows, windows_of_what_was_written, score_of_what_was_written],
    ids=lambda fn: fn.__name__,
)
def test_what_a_trace_saw_of_memory_decides_nothing(model_fn: Any) -> None:
    """Writes to slices have derivatives that count places in memory, and what runs may lie there in another way."""
    x = normal(2, 3, 4, 5)
    relevance_fn = lrp.attribute_and_value(model_fn, lrp.gradient())
    relevance, value = relevance_fn(None, x)
    assert torch.equal(value, model_fn(None, x))
    assert largest_difference(relevance, torch.func.grad(lambda x: model_fn(None, x).sum())(x)) < 1e-12
    every = torch.vmap(lambda start: relevance_fn(None, x, target=start)[0])(torch.eye(2, dtype=x.dtype))
    assert largest_difference(every.sum(0), relevance) < 1e-12
    in_last_place = torch.vmap(lambda x: relevance_fn(None, x[None])[0][0], -1, -1)(x.movedim(0, -1).contiguous())
    assert largest_difference(in_last_place.movedim(-1, 0), relevance) < 1e-12
    assert finite_difference_error(lambda x: relevance_fn(None, x)[0].sin().sum(), x) < 1e-6


def test_memory_is_read_the_same_where_a_compiler_looks_on() -> None:
    x = normal(2, 3, 4, 5)
    expected = lrp.attribute(circular, lrp.gradient())(None, x)
    compiled = torch.compile(lrp.attribute(circular, lrp.gradient()), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(None, x), expected)
    exported = torch.export.export(lrp.attribute(circular, lrp.gradient()).bind(None), (x,))
    assert torch.equal(exported.module()(x), expected)


def test_memory_beyond_a_view_is_refused() -> None:
    with pytest.raises(lrp.CaptureError, match=r"beyond the tensor of shape \(3, 4\)"):
        lrp.attribute(lambda x: x.tanh()[:, 1:].as_strided((3, 4), (5, 1), 0), argnums=0)(normal(3, 5), target=0)


def test_what_a_rule_writes_to_slices() -> None:
    """Torch's derivative of such a write, `as_strided_scatter`, is wrong."""

    def scaled(layer: Any, message: Any) -> Tensor:
        def forward(x: Tensor) -> Tensor:
            y = layer.affine(x, layer.parameters[0], None)
            y[..., 0] *= 3
            y[..., 1:3].add_(y[..., :2].clone())
            return y

        return layer.input * torch.func.vjp(forward, layer.input)[1](message.value.square())[0]

    params, x = {"w": normal(3, 4)}, normal(2, 4)

    def explained(lowered: bool) -> Callable[[Tensor], Tensor]:
        rules = [(lrp.Dense, Written(scaled))]
        relevance_fn = lrp.attribute(lambda p, x: F.linear(x, p["w"]), rules, lowered=lowered)
        return lambda x: relevance_fn(params, x, target=lambda z: z).sum()

    assert largest_difference(torch.func.grad(explained(True))(x), torch.func.grad(explained(False))(x)) < 1e-12
    assert finite_difference_error(explained(True), x) < 1e-6
