"""Operations in place, as the functions that return what they write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lrpfunc._capture.state import Handler, State, Step
from lrpfunc._errors import CaptureError
from lrpfunc._ops.call import REWRITTEN
from lrpfunc._ops.functions import copied, filled, zeroed
from lrpfunc._torch import aten, map_arg, schema

IN_PLACE: dict[str, Any] = {
    "copy_": copied,
    "fill_": filled,
    "zero_": zeroed,
    "detach_": aten.detach.default,
    "normal_": aten.normal_functional.default,
}
"""The functions of operations in place; that of any other is the one called as it is, without the underscore."""


def writes(node: fx.Node) -> bool:
    """Whether an operation changes one of its operands."""
    declared = schema(node.target)
    return declared is not None and declared.is_mutable


def write(state: State, node: fx.Node) -> None:
    """An operation that changes its first operand in place, or writes its result to `out`."""
    target: Any = node.target
    old, found = _written(node), _function(target)
    after = node.meta["val"]
    if old is None or found is None or _is_resized(old, node):
        raise CaptureError(
            f"the operation `{target}` changes a tensor in place and has no form without side effects that "
            "lrpfunc knows. Write it with the operation that returns its result"
        )
    if torch.Tag.inplace_view in target.tags and found is not aten.detach.default:
        # unsqueeze_, t_: no new numbers, but both names now mean another view of the same memory
        state.check(old)
        step = Step(found, node.args[1:], dict(node.kwargs), after, state.no_grad)
        new = state.emit(found, (state.read(old), *step.args), step.kwargs, after)
        state.define_view(old, new, old, step)
        return state.define_view(node, new, old)
    args, kwargs = _operands(state, node, found)
    like = after.to(_dtype(found, args, kwargs))
    new = state.emit(found, args, kwargs, like)
    if like.dtype is not after.dtype:  # a comparison, or a promotion: what is set to it keeps its own
        new = state.emit(copied, (state.read(old), new), None, after)
    _assign(state, node, old, new)


def _assign(state: State, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
    """Writes `new` to `old`, which is what the operation returns."""
    state.write(old, new)
    state.define_view(node, state.read(old), old)


def _written(node: fx.Node) -> fx.Node | None:
    """The tensor that an operation writes to, if that is one, and its first operand or `out`."""
    declared = list(enumerate(schema(node.target).arguments))
    written = [(i, a) for i, a in declared if a.alias_info and a.alias_info.is_write]
    if len(written) != 1:
        return None
    ((index, argument),) = written
    old = node.kwargs.get(argument.name) if argument.is_out else node.args[0] if index == 0 else None
    return old if isinstance(old, fx.Node) else None


def _is_resized(old: fx.Node, node: fx.Node) -> bool:
    """Whether torch gave `out` other memory, for it had not the size of the result."""
    target: Any = node.target
    return old.meta["val"].shape != node.meta["val"].shape and torch.Tag.inplace_view not in target.tags


def _operands(state: State, node: fx.Node, found: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operands for the function, which has no `out`, and no default for the probability of `bernoulli_`."""
    args, kwargs = state.operands(node)
    declared, asked = schema(node.target).arguments, getattr(schema(found), "arguments", ())
    pairs = list(zip(declared, asked, strict=False))[len(args) :]
    missing = (a.default_value for a, b in pairs if not (b.kwarg_only or b.has_default_value()))
    outs = {a.name for a in declared if a.is_out}
    return (*args, *missing), {name: value for name, value in kwargs.items() if name not in outs}


def _dtype(function: Any, args: Any, kwargs: Any) -> torch.dtype:
    """That of the function's result. A size that depends on numbers is taken for 1, which suits any operation."""

    def seen(node: fx.Node) -> Any:
        value = node.meta["val"]
        sizes = [size if isinstance(size, int) else 1 for size in getattr(value, "shape", ())]
        return value.new_empty(sizes) if isinstance(value, Tensor) else value

    args, kwargs = map_arg((args, kwargs), seen)
    return function(*args, **kwargs).dtype


def _function(target: Any) -> Any:
    """The operation that returns what `target` writes, found by the types of its arguments."""
    name = schema(target).name.removeprefix("aten::")
    if name in IN_PLACE:
        return IN_PLACE[name]
    name = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
    packet: Any = getattr(aten, name, None)
    types = [str(a.type) for a in schema(target).arguments if not a.is_out]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        if [str(a.type) for a in schema(found).arguments] == types and not schema(found).is_mutable:
            return REWRITTEN.get(found, found)
    return None


# -- operations in place that no function has a name for


def _index_put(state: State, node: fx.Node) -> None:
    """`x[mask] = value`. With a mask, how many elements are written is not known, unless the value is one for all."""
    args: Any = node.args
    x, indices, value, *accumulate = args
    masks = [index for index in indices if index is not None and index.meta["val"].dtype is torch.bool]
    is_one = all(isinstance(size, int) and size == 1 for size in value.meta["val"].shape)
    if len(masks) != 1 or len(masks) + indices.count(None) != len(indices) or not is_one or True in accumulate:
        return write(state, node)
    shape = masks[0].meta["val"].shape
    trailing = x.meta["val"].ndim - indices.index(masks[0]) - len(shape)
    mask = state.emit_new(aten.reshape.default, state.read(masks[0]), [*shape, *[1] * trailing])
    value = state.emit_new(aten.reshape.default, state.read(value), [])
    _assign(state, node, x, state.emit_new(aten.masked_fill.Tensor, state.read(x), mask, value))


def _fill_diagonal(state: State, node: fx.Node) -> None:
    x: Any = node.args[0]
    like = x.meta["val"]
    if like.ndim != 2 or True in node.args[2:3]:
        return write(state, node)
    diagonal = state.emit_new(aten.eye.m, *like.shape, dtype=torch.bool, device=like.device)
    _assign(state, node, x, state.emit_new(aten.masked_fill.Scalar, state.read(x), diagonal, node.args[1]))


WRITES: dict[str, Handler] = {"index_put_": _index_put, "fill_diagonal_": _fill_diagonal}
"""By the name of the operation."""
