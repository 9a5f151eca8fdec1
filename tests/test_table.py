"""Every claim of the table of operators, proven on random inputs; and what no record names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from lrpfunc._layers.kinds import nature_of
from lrpfunc._layers.tile import axes_of
from lrpfunc._ops.call import claims, degree_of, is_random, of
from lrpfunc._ops.operator import Kind, Operator
from lrpfunc._ops.table import TABLE
from tests.cases import normal
from tests.table_samples import NOT_DRAWN, drawn

DRAWN = [name for name in TABLE if name not in NOT_DRAWN]
SEEDS = range(9)


@dataclass
class Called:
    """A call of an operator with random arguments, and the node that would stand for it in a program."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def operator(self) -> Operator:
        return of(self.node()[0])

    @property
    def operands(self) -> list[Any]:
        """Tensors and numbers at the places that the record names."""
        return [leaf for place in self.operator.operands for leaf in pytree.tree_leaves(self.args[place : place + 1])]

    def node(self) -> tuple[fx.Node, dict[fx.Node, Tensor]]:
        """The node, and the values of those that it reads."""
        graph, values = fx.Graph(), dict[fx.Node, Tensor]()

        def read(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            node = graph.placeholder(f"x{len(values)}")
            node.meta["val"] = values[node] = leaf
            return node

        args, kwargs = pytree.tree_map(read, (self.args, self.kwargs))
        return graph.call_function(self.target, args, kwargs), values

    def claims(self, field: str, known: Callable[[Any], bool]) -> bool:
        """Whether the record claims it, where `known` says what is true of tensors and numbers."""
        node, values = self.node()

        def holds(value: Any) -> bool:
            if isinstance(value, (list, tuple)):
                return all(map(holds, value))
            return value is None or known(values[value] if isinstance(value, fx.Node) else value)

        return claims(getattr(self.operator, field), node, holds)

    def with_operands(self, change: Callable[[Any], Any], places: Any = None) -> Called:
        """The same call with other operands; other arguments stay."""
        chosen = self.operator.operands if places is None else places
        args = [pytree.tree_map(change, a) if place in chosen else a for place, a in enumerate(self.args)]
        return Called(self.name, self.target, tuple(args), self.kwargs)

    def __call__(self) -> list[Tensor]:
        """The floating-point tensors that it returns."""
        return self._tensors(self.target)

    def in_walk(self) -> list[Tensor]:
        """The same, with the derivatives that rules take."""
        return self._tensors(self.operator.in_walk or self.target)

    def _tensors(self, target: Any) -> list[Tensor]:
        torch.default_generator.manual_seed(0)
        found = pytree.tree_leaves(target(*self.args, **self.kwargs))
        return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]


@cache
def draws(name: str) -> list[Called]:
    return [Called(name, *drawn(name, seed)) for seed in SEEDS]


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def on_tensors(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda value: change(value) if is_float(value) else value


def having(**fields: Any) -> list[str]:
    """The names of records whose fields have one of those values, or any at all."""
    return [
        name
        for name in DRAWN
        if all(
            getattr(TABLE[name], k) in v if isinstance(v, tuple) else getattr(TABLE[name], k) for k, v in fields.items()
        )
    ]


@pytest.mark.parametrize("name", TABLE)
def test_every_record_is_of_an_operator(name: str) -> None:
    """A name that torch no longer has would be a claim about nothing."""
    if name in NOT_DRAWN:
        assert hasattr(torch.ops.aten, name)
        return
    for called in draws(name):
        called()
        assert called.operator == TABLE[name]


def test_what_is_not_drawn_has_a_record() -> None:
    assert NOT_DRAWN.keys() <= TABLE.keys()


# ---------------------------------------------------------------------------------------------------------------------
# Claims about numbers


def nonnegative(value: Any) -> bool:
    return bool((torch.as_tensor(value) >= 0).all())


def finite(value: Any) -> bool:
    return bool(torch.as_tensor(value).isfinite().all())


def spoiled(x: Tensor) -> Tensor:
    """With some infinite elements, as a mask makes them."""
    x = x.clone()
    step = max(x.numel() // 3, 2)
    x.view(-1)[::step] = -torch.inf
    x.view(-1)[1::step] = torch.inf
    return x


@pytest.mark.parametrize("name", having(nonnegative=True))
def test_what_is_never_negative(name: str) -> None:
    proven = 0
    for called in draws(name):
        for changed in (called, called.with_operands(on_tensors(torch.abs))):
            if changed.claims("nonnegative", nonnegative):
                proven += 1
                assert not any((x < 0).any() for x in changed())
    assert proven


def holed(x: Tensor) -> Tensor:
    """With some zeros, where functions may be infinite."""
    step = max(x.numel() // 3, 2)
    first = int(x.view(-1)[0].abs() * 1000) % step  # other ones in every operand
    x = x.clone()
    x.view(-1)[first::step] = 0
    return x


@pytest.mark.parametrize("name", having(finite=True))
def test_what_is_finite(name: str) -> None:
    proven = 0
    for called in draws(name):
        for changed in (called, *(called.with_operands(on_tensors(change)) for change in (spoiled, holed))):
            if changed.claims("finite", finite):
                proven += 1
                assert not any(x.isinf().any() for x in changed())
    assert proven


def choices(called: Called) -> list[list[bool]]:
    """Which tensors among the operands are 0: all, or one of them."""
    count = sum(map(is_float, called.operands))
    return [[True] * count, *([i == j for j in range(count)] for i in range(count) if count > 1)]


def line(called: Called, zero: list[bool]) -> Callable[[Any], Called]:
    """The call as a function of a number, of which those operands are multiples."""

    def at(t: Any) -> Called:
        multiples = iter(zero)
        return called.with_operands(lambda value: value * t if is_float(value) and next(multiples) else value)

    return at


def is_zero(value: Any) -> bool:
    return bool((torch.as_tensor(value) == 0).all())


def slope_at_zero(at: Callable[[Any], Called], weights: list[Tensor]) -> Tensor:
    """Of the weighted sum of the result, by the derivative that rules take."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(weighted(at(t).in_walk(), weights), t)[0]


def weighted(outputs: list[Tensor], weights: list[Tensor]) -> Tensor:
    return torch.stack([(w * x).sum() for w, x in zip(weights, outputs, strict=True)]).sum()


def positive(outputs: list[Tensor]) -> list[Tensor]:
    return [normal(*x.shape, seed=5).abs() + 0.1 for x in outputs]


@pytest.mark.parametrize("name", having(zero=True))
def test_what_is_zero_at_zero(name: str) -> None:
    """With finite slopes on both sides, between which torch's derivative lies."""
    assert TABLE[name].pointwise
    proven = 0
    for called in draws(name):
        for zero in choices(called):
            at = line(called, zero)
            if not at(0).claims("zero", is_zero) or is_random(called.node()[0]):
                continue
            proven += 1
            weights = positive(at(0)())
            assert all(map(is_zero, at(0)()))
            h = 1e-7
            above, below = (torch.cat([x.reshape(-1) for x in at(step)()]) / step for step in (h, -h))
            above, below = above.where(above == above, below), below.where(below == below, above)  # beyond its domain
            flat = [torch.cat([w.reshape(-1) for w in weights])]
            low = weighted([torch.minimum(above, below)], flat)
            high = weighted([torch.maximum(above, below)], flat)
            assert low - 5e-3 <= slope_at_zero(at, weights) <= high + 5e-3
            assert max(low.abs(), high.abs()) < 1e3
    assert proven


@pytest.mark.parametrize("name", having(singular=True))
def test_what_has_no_derivative_at_zero(name: str) -> None:
    proven = 0
    for called in draws(name):
        for zero in choices(called):
            at = line(called, zero)
            outputs = at(0)()
            if at(0).claims("singular", is_zero):
                proven += 1
                assert not all(map(finite, [slope_at_zero(at, positive(outputs)), *outputs]))
    assert proven


@pytest.mark.parametrize("name", [name for name in DRAWN if TABLE[name].degree is not None])
def test_degrees_of_homogeneity(name: str) -> None:
    proven = 0
    for called in draws(name):
        node, _ = called.node()
        degree = degree_of(node)
        if degree is None:
            continue
        proven += 1
        numbers = () if callable(called.operator.degree) else (int, float)  # an exponent is none that scales
        scaled = called.with_operands(lambda x, n=numbers: 1.7 * x if is_float(x) or isinstance(x, n) else x)
        for x, y in zip(scaled(), called(), strict=True):
            torch.testing.assert_close(x, 1.7**degree * y, equal_nan=True)
    assert proven


# ---------------------------------------------------------------------------------------------------------------------
# Claims about what the result is made of

TOGETHER = (Kind.SELECT, Kind.SUM, Kind.AVERAGE, Kind.LINEAR, Kind.SCALE)
EACH = (Kind.PRODUCT, Kind.DENSE, Kind.CONVOLUTION)


def linear_in(called: Called) -> list[tuple[int, ...]]:
    """The places of operands that the operator is affine in, together."""
    operator = called.operator
    if operator.kind in TOGETHER:
        return [operator.operands]
    if operator.kind is Kind.QUOTIENT:
        return [(0,)]
    if operator.kind is Kind.PRODUCT and operator.degree is not None:
        return []  # of its own elements
    if operator.kind in EACH and operator.name != "einsum":
        return [(place,) if operator.addend is None else (place, operator.addend) for place in operator.operands]
    node, values = called.node()
    if not node.args or node.args[0] not in values:
        return []
    node.meta["val"] = called.target(*called.args, **called.kwargs)
    return [(0,)] if operator.kind is Kind.BATCH_NORM and nature_of(node, (node.args[0],)).linear else []


@pytest.mark.parametrize("name", having(kind=(*TOGETHER, *EACH, Kind.QUOTIENT, Kind.BATCH_NORM)))
def test_what_is_linear(name: str) -> None:
    """`f(a x + (1 - a) y) = a f(x) + (1 - a) f(y)`, and each of the operands matters."""
    a = 0.3
    for called in draws(name):
        for places in linear_in(called):
            other = called.with_operands(on_tensors(lambda x: x.flip(list(range(x.ndim))) * 1.3 + 0.1), places)
            pairs = iter(zip(pytree.tree_leaves(called.args), pytree.tree_leaves(other.args), strict=True))

            def mixed(value: Any, pairs: Any = pairs) -> Any:
                x, y = next(pairs)
                return a * x + (1 - a) * y if is_float(value) else value

            mean = Called(name, called.target, pytree.tree_map(mixed, called.args), called.kwargs)
            for x, y, z in zip(mean(), called(), other(), strict=True):
                torch.testing.assert_close(x, a * y + (1 - a) * z, equal_nan=True)
            if called.operator.kind in EACH:
                assert all(map(is_zero, called.with_operands(lambda x: x * 0, places)()))


DERIVED = [name for name in DRAWN if TABLE[name].kind is not Kind.NON_LINEAR and not TABLE[name].underived]


@pytest.mark.parametrize("name", [name for name in DRAWN if TABLE[name].underived])
def test_what_torch_takes_for_a_constant(name: str) -> None:
    for called in draws(name):
        assert not any(x.requires_grad for x in called.with_operands(on_tensors(Tensor.requires_grad_))())


@pytest.mark.parametrize("name", DERIVED)
def test_each_operand_matters(name: str) -> None:
    """It has a derivative that is not zero everywhere, or none that torch knows."""
    missing = {place for called in draws(name) for place in called.operator.operands if is_given(called, place)}
    for called in draws(name):
        for place in sorted(missing):
            args = [pytree.tree_map(on_tensors(Tensor.clone), a) for a in called.args]
            leaves = [x.requires_grad_() for x in pytree.tree_leaves(args[place : place + 1]) if is_float(x)]
            outputs = Called(name, called.target, tuple(args), called.kwargs).in_walk()
            if leaves and any(x.requires_grad for x in outputs):
                total = weighted([x.square() for x in outputs], positive(outputs))
                try:
                    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
                except NotImplementedError:
                    missing.discard(place)
                else:
                    missing -= set() if all(map(is_zero, found)) else {place}
    assert not missing


def is_given(called: Called, place: int) -> bool:
    return any(map(is_float, pytree.tree_leaves(called.args[place : place + 1])))


@pytest.mark.parametrize("name", having(kind=(Kind.SELECT, Kind.WINNER)))
def test_what_only_takes_elements(name: str) -> None:
    """Each element of the result is one of an operand, or a constant."""
    for called in draws(name):
        taken = torch.cat(
            [torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in called.operands if x is not None]
        )
        constants = torch.tensor([0.0], dtype=torch.float64)
        for x in called():
            assert torch.isin(x, torch.cat([taken, constants])).all()


@pytest.mark.parametrize("name", having(pointwise=True))
def test_what_is_pointwise(name: str) -> None:
    """An element of the result changes with the same element of the operands alone."""
    for called in draws(name):
        (before,) = called()
        assert before.shape in [x.shape for x in called.operands if is_float(x)]
        for row in (0, 2):
            (after,) = called.with_operands(on_tensors(lambda x, row=row: other_row(x, row)))()
            kept = [k for k in range(3) if k != row]
            torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=0, equal_nan=True)


def other_row(x: Tensor, row: int) -> Tensor:
    x = x.clone()
    x[row] = x[row].flip(0) * 1.1
    return x


@pytest.mark.parametrize("name", having(kind=(Kind.SOFTMAX,)))
def test_the_axes_of_a_softmax(name: str) -> None:
    """Its exponentials add up to 1 along them, and a shift along them changes nothing, or the result alike."""
    for called in draws(name):
        node, _ = called.node()
        axes, (x, *rest) = axes_of(node), called.args
        (result,) = called()
        shifted = called.target(x + torch.full_like(x.sum(axes, keepdim=True), 2.5), *rest)
        expected = torch.logsumexp(x, axes, keepdim=True)
        if called.operator.reduces:
            torch.testing.assert_close(result, expected.reshape(result.shape))
            torch.testing.assert_close(shifted, result + 2.5)
        else:
            weights = result if called.operator.name == "softmax" else result.exp()
            torch.testing.assert_close(weights, (x - expected).exp())
            torch.testing.assert_close(shifted, result)


@pytest.mark.parametrize("name", having(reduces=True))
def test_what_reduces(name: str) -> None:
    for called in draws(name):
        assert called()[0].numel() < called.operands[0].numel()


@pytest.mark.parametrize("name", having(reshapes=True))
def test_what_only_reshapes(name: str) -> None:
    for called in draws(name):
        assert torch.equal(called()[0].flatten(), called.args[0].flatten())


@pytest.mark.parametrize("name", having(chooses=True))
def test_what_is_chosen_by_integers(name: str) -> None:
    for called in draws(name):
        leaves = pytree.tree_leaves(called.args[1:])
        assert any(isinstance(x, Tensor) and not x.is_floating_point() for x in leaves)


@pytest.mark.parametrize("name", having(epsilon=True))
def test_what_keeps_a_number_away_from_zero(name: str) -> None:
    x = normal(3, 4).abs()
    x[0, 0] = 0
    for epsilon in (1e-9, torch.full_like(x, 1e-9)):
        target = drawn(name, 0)[0].overloadpacket
        if not (name == "maximum" or name.startswith("max.")) or isinstance(epsilon, Tensor):
            found = target(x, epsilon)
            assert (found > 0).all()
            torch.testing.assert_close(found, x, rtol=0, atol=2e-9)


@pytest.mark.parametrize("name", having(gate=True))
def test_what_looks_like_a_gate(name: str) -> None:
    """A fraction lies between 0 and 1, a bounded number within 1 of 0, if only for what is not positive."""
    for seed in SEEDS:
        x = -normal(3, 4, seed=seed).abs() * 3
        target = drawn(name, 0)[0]
        rest = drawn(name, 0)[1][1:] if TABLE[name].kind is Kind.SOFTMAX else ()
        for sign in (1, -1) if TABLE[name].gate == 2 else (1,):
            found = target(sign * x, *rest)
            assert found.abs().max() <= 1
            assert found.unique().numel() > 1
            assert TABLE[name].gate == 1 or found.min() >= 0


@pytest.mark.parametrize("name", [name for name in DRAWN if TABLE[name].features is not None])
def test_where_the_features_of_the_output_lie(name: str) -> None:
    axis, place = TABLE[name].features, TABLE[name].operands[1]
    for called in draws(name):
        weight = called.args[place]
        scale = torch.arange(1.0, weight.shape[axis] + 1).double()
        along = scale.reshape([-1 if k == axis % weight.ndim else 1 for k in range(weight.ndim)])
        no_addend = called.with_operands(torch.zeros_like, (TABLE[name].addend,))
        scaled = no_addend.with_operands(lambda w, along=along: w * along, (place,))
        torch.testing.assert_close(scaled()[0], no_addend()[0] * scale)


@pytest.mark.parametrize("name", [name for name in DRAWN if not TABLE[name].differentiable and name != "fused"])
def test_what_relevance_does_not_pass_through(name: str) -> None:
    """Its derivative with respect to the operands is zero."""
    for called in draws(name):
        changed = called.with_operands(on_tensors(lambda x: x.clone().requires_grad_()))
        for x in changed():
            if x.requires_grad and "NotImplemented" not in str(x.grad_fn):
                leaves = [leaf for leaf in changed.operands if is_float(leaf)]
                found = torch.autograd.grad(x.sum(), leaves, allow_unused=True)
                assert all(g is None or is_zero(g) for g in found)
            elif x.requires_grad:  # torch has no derivative, not even one of zeros
                nearby = called.with_operands(on_tensors(lambda x: x.detach() * (1 + 1e-9)))
                assert torch.equal(nearby()[0], x)


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_random(name: str) -> None:
    """Another call gives another result where the record, or torch's tag, says so, and nowhere else."""
    for called in draws(name)[: None if callable(TABLE[name].random) else 2]:
        torch.default_generator.manual_seed(0)
        results = [pytree.tree_leaves(called.target(*called.args, **called.kwargs)) for _ in range(3)]
        same = all(
            torch.equal(x.nan_to_num(), y.nan_to_num())
            for other in results[1:]
            for x, y in zip(results[0], other, strict=True)
            if isinstance(x, Tensor)
        )
        # Of the first, memory is random; the second is written as a product with a mask when it is captured.
        if name not in ("new_empty", "empty_like", "dropout"):
            assert same is not is_random(called.node()[0])


@pytest.mark.parametrize("name", having(held=True))
def test_statistics_that_are_held(name: str) -> None:
    """The operator itself at the values it had, and affine around them."""
    for called in draws(name):
        held, (x, *rest) = TABLE[name].held, called.args
        assert held is not None

        def f(values: Tensor, x: Tensor = x, rest: Any = rest, held: Any = held) -> Tensor:
            return pytree.tree_leaves(held(values, x, *rest))[0]

        torch.testing.assert_close(f(x), called()[0])
        y = x.flip(0) * 1.3 + 0.1
        torch.testing.assert_close(f(0.3 * x + 0.7 * y), 0.3 * f(x) + 0.7 * f(y))


@pytest.mark.parametrize("field", ["in_walk", "exact"])
@pytest.mark.parametrize("name", [name for name in DRAWN if TABLE[name].in_walk or TABLE[name].exact])
def test_what_runs_in_the_walk_gives_the_same(name: str, field: str) -> None:
    for called in draws(name):
        other = getattr(TABLE[name], field)
        if other is not None and not is_random(called.node()[0]):
            torch.testing.assert_close(other(*called.args, **called.kwargs), called()[0])
