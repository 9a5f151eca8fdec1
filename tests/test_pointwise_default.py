"""What no record names: torch's tag says that it is pointwise, or nothing is known of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lrpfunc as lrp
from lrpfunc._ops.call import of_target
from lrpfunc._ops.table import POINTWISE
from tests.cases import normal
from tests.oracles import largest_difference
from tests.table_samples import Draw


def tagged() -> list[str]:
    """Torch's operators that are an activation by their tag alone."""
    found = []
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in getattr(packet, "overloads", list)():
            target = getattr(packet, overload)
            returns_tensor = [str(r.type) for r in target._schema.returns] == ["Tensor"]
            writes = target._schema.is_mutable or any(a.is_out for a in target._schema.arguments)
            if returns_tensor and not writes and of_target(target) is POINTWISE:
                found.append(f"{name}.{overload}")
    return found


def called(target: Any, seed: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The operator as a function of its tensors, which lie where most functions are defined."""
    draw = Draw(seed)
    values = {"Tensor": lambda: draw.positive(64) * 0.8, "int": lambda: 2, "number": lambda: 0.5}
    drawn = [values[str(a.type)]() for a in target._schema.arguments if not a.has_default_value()]
    tensors = [x for x in drawn if isinstance(x, Tensor)]

    def fn(*given: Tensor) -> Tensor:
        rest = iter(given)
        return target(*(next(rest) if isinstance(x, Tensor) else x for x in drawn))

    return fn, tensors


@pytest.mark.parametrize("name", tagged())
def test_no_operator_that_rounds_or_is_linear_counts_as_an_activation(name: str) -> None:
    """It has a derivative with respect to each tensor, not zero everywhere, and is not linear in it.

    A scaling may be: relevance passes it unchanged, too.
    """
    packet, _, overload = name.partition(".")
    fn, tensors = called(getattr(getattr(torch.ops.aten, packet), overload), seed=0)
    try:
        is_float = fn(*tensors).is_floating_point()
    except NotImplementedError:  # of integers alone
        return
    if not is_float:
        return
    for place, x in enumerate(tensors):
        # Rounding is smooth within an interval, and the remainder linear.
        wide = torch.cat([x, x * 3, x - 0.05]) if "zeta" not in name else x

        def f(x: Tensor, place: int = place) -> Tensor:
            return fn(*(x if k == place else t.repeat(x.numel() // t.numel()) for k, t in enumerate(tensors)))

        with torch.enable_grad():
            leaf = wide.clone().requires_grad_()
            (slope,) = torch.autograd.grad(f(leaf).nan_to_num().sum(), leaf)
        assert (slope.nan_to_num() != 0).any()
        middle, mean = f((wide + wide.flip(0)) / 2), (f(wide) + f(wide.flip(0))) / 2
        assert ((middle - mean).abs().nan_to_num() > 1e-6).any() or not f(wide * 0).any()


@pytest.mark.parametrize("name", ["special_i1e", "special_entr", "frac"])
def test_an_activation_that_no_record_names(name: str) -> None:
    function = getattr(torch.ops.aten, name)
    w, x = normal(4, 3), normal(2, 3, seed=1).abs()
    explanation = lrp.explain(lambda w, x: function(x) @ w.T, lrp.epsilon())(w, x, target=1)
    (row,) = (row for row in explanation.rows if row.layer.operation == name)
    assert row.layer.kind is lrp.Kind.ACTIVATION
    assert not row.layer.keeps_zero
    assert not row.layer.nonnegative
    passed = lrp.attribute(lambda w, y: y @ w.T, lrp.epsilon())(w, function(x), target=1)
    assert largest_difference(explanation.relevance, passed) < 1e-12


def test_of_several_operands_it_is_not_covered() -> None:
    with pytest.raises(lrp.UncoveredLayerError, match="special_zeta"):
        lrp.attribute(lambda _, x: torch.special.zeta(x + 2, x.flip(-1)))(None, normal(2, 3).abs(), target=1)


def test_what_rounds_passes_nothing() -> None:
    for f in (torch.round, torch.floor, torch.sign, torch.angle, lambda x: x.gt(0).double()):
        with pytest.raises(lrp.NoPathError, match="does not depend"):
            lrp.attribute(lambda _, x, f=f: f(x))(None, normal(2, 3), target=1)
    for mode in ("floor", "trunc"):
        with pytest.raises(lrp.NoPathError, match="does not depend"):
            lrp.attribute(lambda _, x, mode=mode: torch.div(x, 0.3, rounding_mode=mode))(None, normal(2, 3), target=1)
        with pytest.raises(lrp.NoPathError, match="does not depend"):
            lrp.attribute(lambda _, x, mode=mode: torch.div(1 + x.exp(), 0.3, rounding_mode=mode))(
                None, normal(2, 3), target=1
            )


def test_the_sign_of_another_tensor_carries_no_relevance() -> None:
    """`copysign` has a derivative in its first operand alone."""
    y = normal(2, 3).abs()
    with pytest.raises(lrp.NoPathError, match="does not depend"):
        lrp.attribute(torch.copysign)(y, normal(2, 3, seed=1), target=1)


def test_an_operator_of_somebody_elses_is_not_known_by_its_name_or_tag() -> None:
    """It may be called `relu`, or tagged as pointwise, and round."""
    library = torch.library.Library("lrpfunc_test_table", "FRAGMENT")
    for name in ("relu", "view"):
        library.define(f"{name}(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
        library.impl(name, lambda x: x.round(), "CompositeExplicitAutograd")
        function = getattr(torch.ops.lrpfunc_test_table, name)
        with pytest.raises(lrp.UncoveredLayerError, match=name):
            lrp.attribute(lambda _, x, function=function: function(x))(None, normal(2, 3), target=1)
