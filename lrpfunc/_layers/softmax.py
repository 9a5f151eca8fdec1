"""Softmax, its logarithm and the like, written out."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from lrpfunc._layers.layer import Kind
from lrpfunc._layers.tile import Reached, Tile, shape
from lrpfunc._ops.call import operation_name
from lrpfunc._ops.table import PRODUCT, QUOTIENT, SELECT

_INVERSE = {"exp": "softmax", "log": "log_softmax"}


def softmax(node: fx.Node, reached: Reached) -> Tile | None:
    """The operations that end at `node` as a softmax or log-softmax of one tensor.

    Known are `exp(x) / sum(exp(x))`, with or without a maximum subtracted, a constant mask multiplied or an epsilon
    added; `exp` of a log-softmax or of `x - logsumexp(x)`, and `x - logsumexp(x)` and the logarithm of a softmax.
    """
    name = operation_name(node)
    factors = list(node.args[:2])
    if name in QUOTIENT:
        return _quotient(node, factors[0], factors[1], reached)
    if name in PRODUCT:
        found = (_quotient(node, e, _inverted(i, reached), reached) for e, i in (factors, factors[::-1]))
        return next((tile for tile in found if tile is not None), None)
    if name == "sub":
        return _less_logsumexp(node, reached)
    if name in ("exp", "log") and reached.is_step(node.args[0]):
        return _of_log(node, node.args[0], name, reached)  # type: ignore[arg-type]
    return None


def _of_log(node: fx.Node, inner: fx.Node, name: str, reached: Reached) -> Tile | None:
    """`exp(log_softmax(x))`, or `log(softmax(x))`."""
    native = ("log_softmax", "_log_softmax") if name == "exp" else ("softmax", "_softmax", "_safe_softmax")
    if operation_name(inner) in native:
        (x,) = reached.operands(inner)
        return Tile(Kind.SOFTMAX, _INVERSE[name], (inner, node), (x,), axes_of(inner))
    written = softmax(inner, reached)
    if written is None or written.operation == _INVERSE[name]:
        return None
    return Tile(Kind.SOFTMAX, _INVERSE[name], (*written.nodes, node), written.inputs, written.axes)


def _less_logsumexp(node: fx.Node, reached: Reached) -> Tile | None:
    """`x - logsumexp(x)`."""
    if operation_name(node) != "sub" or len(reached.operands(node)) != 2 or node.kwargs:
        return None
    x, normalizer = reached.operands(node)
    total = reached.source_of(normalizer)
    if operation_name(total) != "logsumexp" or total.args[0] is not x:
        return None
    return Tile(Kind.SOFTMAX, "log_softmax", reached.between(x, node), (x,), axes_of(total))


def _quotient(node: fx.Node, numerator: Any, divisor: Any, reached: Reached) -> Tile | None:
    if not reached.is_step(numerator) or not reached.is_step(divisor):
        return None
    total = _sum_under(divisor, reached)
    if total is None or operation_name(total) not in ("sum", "nansum"):
        return None
    weights = reached.source_of(_unmasked(numerator, reached))
    if operation_name(weights) not in ("exp", "exp2") or weights in reached.sources:
        return None
    summed, logits = reached.source_of(_unmasked(total.args[0], reached)), weights.args[0]  # type: ignore[arg-type]
    same = summed is weights or (summed.target is weights.target and summed.args == weights.args)
    if not same or shape(numerator) != shape(total.args[0]) or not isinstance(logits, fx.Node):  # type: ignore[arg-type]
        return None
    root = _without_maximum(logits, reached)
    return Tile(Kind.SOFTMAX, "softmax", reached.between(root, node), (root,), axes_of(total))


def _inverted(node: Any, reached: Reached) -> fx.Node | None:
    """The `d` of `1 / d`, through changes of shape."""
    if not reached.is_step(node):
        return None
    node = reached.source_of(node)
    name = operation_name(node)
    if name == "reciprocal" or (name == "pow" and node.args[1] == -1):
        return node.args[0]  # type: ignore[return-value]
    return node.args[1] if name in QUOTIENT and node.args[1] in reached and node.args[0] not in reached else None  # type: ignore[return-value]


def _sum_under(divisor: fx.Node, reached: Reached) -> fx.Node | None:
    """The sum that a divisor is, through changes of shape, an epsilon that is added and a lower bound."""
    while reached.is_step(divisor):
        name = operation_name(divisor)
        if name in ("sum", "nansum"):
            return divisor
        if name not in SELECT and name not in ("add", "clamp", "clamp_min", "maximum"):
            return None
        operands = reached.operands(divisor)
        if len(operands) != 1:
            return None
        (divisor,) = operands
    return None


def _unmasked(node: fx.Node, reached: Reached) -> fx.Node:
    """What a constant mask was multiplied by."""
    operands = reached.operands(node)
    masked = operation_name(node) in (*PRODUCT, "masked_fill", "where") and len(operands) == 1
    return operands[0] if masked and reached.is_step(node) else node


def _without_maximum(logits: fx.Node, reached: Reached) -> fx.Node:
    """The `x` of `x - max(x)`, which the softmax does not notice."""
    if operation_name(logits) != "sub" or not reached.is_step(logits):
        return logits
    x, shift = logits.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(shift, fx.Node) or x not in reached:
        return logits
    names = SELECT | {"detach", "getitem"}
    while shift.op == "call_function" and operation_name(shift) in names and isinstance(shift.args[0], fx.Node):
        shift = shift.args[0]
    detached = {"detach", "alias", "clone", "to"}
    largest = shift.op == "call_function" and operation_name(shift) in ("amax", "max")
    while (
        largest
        and isinstance(shift.args[0], fx.Node)
        and operation_name(shift.args[0]) in detached
        and shift.args[0] is not x
    ):
        shift = shift.args[0]
    return x if largest and (shift.args[0] is x or shift.target is operator.getitem) else logits


def axes_of(node: fx.Node) -> tuple[int, ...]:
    """The axes that a softmax, a sum or the like reduces."""
    axes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    size = len(shape(node.args[0]))  # type: ignore[arg-type]
    if axes is None or axes == []:
        return tuple(range(size))
    return tuple(int(a) % size for a in (axes if isinstance(axes, (list, tuple)) else (axes,)))
