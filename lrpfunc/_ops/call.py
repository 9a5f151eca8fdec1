"""Calls of operators: what is known of them, in which place of one another they run, and under which modes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import fx

from lrpfunc._ops.functions import hardsigmoid, scaled_dot_product_attention
from lrpfunc._ops.operator import Arguments, Condition, Holds, Operator, holds
from lrpfunc._ops.symbols import has_open_sizes
from lrpfunc._ops.table import POINTWISE, TABLE, UNKNOWN
from lrpfunc._torch import OpOverload, aten, overload_name, schema


def operation_name(node: fx.Node) -> str:
    """`"conv2d"` for a call of `aten.conv2d.default`; the function's name for a function of ours."""
    return operation_name_of(node.target)


def operation_name_of(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", str(target))


REWRITTEN: dict[Any, Any] = {
    aten.hardsigmoid.default: hardsigmoid,
    aten._sparse_mm.default: aten.mm.default,
    aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
}
"""What capture writes in place of an operation."""


def of(node: fx.Node) -> Operator:
    """The record of the operation that a node calls, under whichever mode it does."""
    node = getattr(node.target, "node", node)
    mode = next((a for a in (*node.args, *node.kwargs.values()) if isinstance(a, str)), None)
    by_mode = None if mode is None else TABLE.get(f"{operation_name(node)}:{mode}")
    return by_mode or of_target(node.target)


def of_target(target: Any) -> Operator:
    if isinstance(target, OpOverload):
        return _of_overload(target)
    return UNKNOWN if isinstance(target, str) else named(operation_name_of(target))


def named(operation: str) -> Operator:
    """The record of an operation of that name, whichever its overload."""
    return TABLE.get(operation, UNKNOWN)


@cache
def _of_overload(target: OpOverload) -> Operator:
    """An operator of somebody else's may have a name of torch's, and any derivative."""
    if target.namespace != "aten":
        return UNKNOWN
    name = operation_name_of(target)
    default = POINTWISE if torch.Tag.pointwise in target.tags else UNKNOWN
    return TABLE.get(f"{name}.{overload_name(target)}", TABLE.get(name, default))


def claims(condition: Condition, node: fx.Node, known: Holds) -> bool:
    """Whether a claim of the node's record holds of it, from what is known of its arguments."""
    return holds(condition, _arguments(node, of(node)), known)


def degree_of(node: fx.Node) -> float | None:
    """The degree of homogeneity in all operands together."""
    degree = of(node).degree
    return degree(_arguments(node, of(node))) if callable(degree) else degree


def _arguments(node: fx.Node, operator: Operator) -> Arguments:
    operands = tuple(node.args[place] for place in operator.operands if place < len(node.args))
    return Arguments(operands, partial(argument, node))


@contextlib.contextmanager
def _surroundings(node: fx.Node) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if node.meta.get("no_grad"):
            stack.enter_context(torch.no_grad())
        for device, dtype, enabled, cache in node.meta.get("autocast", ()):
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield


def call(node: fx.Node, args: Any, kwargs: Any, *, exact: bool | None = None) -> Any:
    """Calls a node's operation, under the grad mode and autocast it was written under.

    The walk says whether it must be `exact`, that is, have derivatives of its VJP too.
    """
    target: Any = node.target
    if exact is not None:
        operator = of(node)
        target = (exact and operator.exact) or operator.in_walk or target
        if operator.of_open_sizes and has_open_sizes(args[0]):
            target = operator.of_open_sizes
    if node.meta.get("no_grad") or node.meta.get("autocast"):
        with _surroundings(node):
            return target(*args, **kwargs)
    return target(*args, **kwargs)


def argument(node: fx.Node, name: str) -> Any:
    """The argument of that name, `None` if it is left to its default."""
    return argument_of(node.target, node.args, node.kwargs, name)


def argument_of(target: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    declared = schema(target)
    order = [a.name for a in declared.arguments] if declared else list(inspect.signature(target).parameters)
    position = order.index(name) if name in order else len(args)
    return args[position] if position < len(args) else kwargs.get(name)


def is_random(node: fx.Node) -> bool:
    """Whether calling the node again gives another result."""
    node = getattr(node.target, "node", node)
    if operation_name(node).endswith("backward"):
        return False
    operator = of(node)
    if operator.random is None:
        return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return operator.random(_arguments(node, operator)) if callable(operator.random) else operator.random
