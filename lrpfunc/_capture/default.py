"""What becomes of an operation that has no handler of its own: itself, or the function that returns what it writes."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._capture.inplace import write, writes
from lrpfunc._capture.state import State, Step
from lrpfunc._ops.call import REWRITTEN, operation_name
from lrpfunc._ops.functions import scaled_dot_product_attention
from lrpfunc._ops.strided import as_strided, free_of_layout
from lrpfunc._ops.table import SHAPED_LIKE
from lrpfunc._torch import aten, storage_of


def default(state: State, node: fx.Node) -> None:
    """Any operation, in place or not."""
    write(state, node) if writes(node) else _copy(state, node)


def _copy(state: State, node: fx.Node) -> None:
    args, kwargs = state.operands(node)
    if node.target is operator.getitem and isinstance(args[0], tuple):
        return state.define(node, args[0][args[1]])
    target: Any = REWRITTEN.get(node.target, node.target)
    if target is scaled_dot_product_attention:
        args = apart(state, args)
    if operation_name(node) in SHAPED_LIKE:  # of the other tensor, only the shape or dtype matters
        target, of = SHAPED_LIKE[operation_name(node)]
        args, kwargs = (args[0], of(node.meta["val"])), {}
    target, kwargs = free_of_layout(target, node.args, kwargs)
    new = state.emit(target, args, kwargs, node.meta.get("val"))
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and _shares(node, first) and not _is_result(state, first):
        like = node.meta["val"]
        return state.define_view(node, new, first, Step(target, args[1:], kwargs, like, state.no_grad))
    owner = _owner(state, node)
    if owner is None:
        return state.define(node, new)
    state.define_view(node, new, owner, _where(owner, node, state.no_grad))


def apart(state: State, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands, with another name for one that stands at several places: each has a part of its own."""
    seen: set[Any] = set()
    result = []
    for operand in operands:
        if isinstance(operand, fx.Node) and operand in seen:
            operand = state.emit(aten.alias.default, (operand,), None, operand.meta["val"])
        seen.add(operand)
        result.append(operand)
    return tuple(result)


# -- views


def _storages(node: fx.Node) -> set[int]:
    leaves = tree.leaves(node.meta.get("val"))
    return {storage_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)}


def _shares(node: fx.Node, other: fx.Node) -> bool:
    """Whether both lie in one memory. What `detach` and `alias` return does, though a trace may not show it."""
    same = node.target in (aten.detach.default, aten.alias.default) and other is node.args[0]
    return same or not _storages(node).isdisjoint(_storages(other))


def _is_result(state: State, node: fx.Node) -> bool:
    """Whether `node` is what an operation returned, several new tensors; each has memory of its own."""
    memory = state.memory(node)
    return memory is None or (not isinstance(node.meta.get("val"), Tensor) and memory.root is node)


def _owner(state: State, node: fx.Node) -> fx.Node | None:
    """The tensor that `node` is a view of, though it is not the first operand: `einsum`, `broadcast_tensors`."""
    if not isinstance(node.meta.get("val"), Tensor):
        return None  # each of its tensors has an owner of its own
    source = node
    if node.target is operator.getitem:
        source: Any = node.args[0]
    owners = (o for o in source.all_input_nodes if isinstance(o.meta.get("val"), Tensor) and _shares(node, o))
    return next((owner for owner in owners if state.memory(owner) is not None), None)


def _where(owner: fx.Node, node: fx.Node, no_grad: bool) -> Step:
    """The view by where it lies in memory, which says it whatever the operation was."""
    whole, part = owner.meta["val"], node.meta["val"]
    layout = whole.stride(), whole.storage_offset()
    return Step(as_strided, (part.shape, part.stride(), part.storage_offset()), {"layout": layout}, part, no_grad)
