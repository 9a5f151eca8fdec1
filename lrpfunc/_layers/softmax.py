"""Softmax, its logarithm and the like, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from lrpfunc._layers.layer import Kind
from lrpfunc._layers.tile import Reached, Tile, axes_of, shape
from lrpfunc._ops.call import degree_of, of
from lrpfunc._ops.operator import Operator

_INVERSE = {"exp": "softmax", "log": "log_softmax"}


def softmax(node: fx.Node, reached: Reached) -> Tile | None:
    """The operations that end at `node` as a softmax or log-softmax of one tensor.

    Known are `exp(x) / sum(exp(x))`, with or without a maximum subtracted, a constant mask multiplied or an epsilon
    added; `exp` of a log-softmax or of `x - logsumexp(x)`, and `x - logsumexp(x)` and the logarithm of a softmax.
    """
    operator = of(node)
    factors = list(node.args[:2])
    if operator.kind is Kind.QUOTIENT:
        return _quotient(node, factors[0], factors[1], reached)
    if operator.name == "mul":
        found = (_quotient(node, e, _inverted(i, reached), reached) for e, i in (factors, factors[::-1]))
        return next((tile for tile in found if tile is not None), None)
    if operator.name == "sub":
        return _less_logsumexp(node, reached)
    if operator.name in _INVERSE and reached.is_step(node.args[0]):
        return _of_log(node, node.args[0], operator.name, reached)  # type: ignore[arg-type]
    return None


def _of_log(node: fx.Node, inner: fx.Node, name: str, reached: Reached) -> Tile | None:
    """`exp(log_softmax(x))`, or `log(softmax(x))`."""
    if of(inner).name == {"exp": "log_softmax", "log": "softmax"}[name]:
        (x,) = reached.operands(inner)
        return Tile(Kind.SOFTMAX, _INVERSE[name], (inner, node), (x,), axes_of(inner))
    written = softmax(inner, reached)
    if written is None or written.operation == _INVERSE[name]:
        return None
    return Tile(Kind.SOFTMAX, _INVERSE[name], (*written.nodes, node), written.inputs, written.axes)


def _less_logsumexp(node: fx.Node, reached: Reached) -> Tile | None:
    """`x - logsumexp(x)`."""
    if len(reached.operands(node)) != 2 or node.kwargs:
        return None
    x, normalizer = reached.operands(node)
    total = reached.source_of(normalizer)
    if of(total).name != "logsumexp" or total.args[0] is not x:
        return None
    return Tile(Kind.SOFTMAX, "log_softmax", reached.between(x, node), (x,), axes_of(total))


def _quotient(node: fx.Node, numerator: Any, divisor: Any, reached: Reached) -> Tile | None:
    if not reached.is_step(numerator) or not reached.is_step(divisor):
        return None
    total = _sum_under(divisor, reached)
    if total is None:
        return None
    weights = reached.source_of(_unmasked(numerator, reached))
    if of(weights).name not in ("exp", "exp2") or weights in reached.sources:
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
    operands: Any = node.args
    if of(node).name == "mul" and operands[1] == 1:  # torch runs `1 / d` as `d.reciprocal() * 1`
        node = operands[0]
        operands = node.args
    if degree_of(node) == -1:
        return operands[0]
    inverts = of(node).kind is Kind.QUOTIENT and operands[1] in reached and operands[0] not in reached
    return operands[1] if inverts else None


def _sum_under(divisor: fx.Node, reached: Reached) -> fx.Node | None:
    """The sum that a divisor is, through changes of shape, an epsilon that is added and a lower bound."""
    while reached.is_step(divisor):
        operator = of(divisor)
        if operator.kind is Kind.SUM and operator.reduces:
            return divisor
        if operator.kind is not Kind.SELECT and not operator.epsilon:
            return None
        operands = reached.operands(divisor)
        if len(operands) != 1:
            return None
        (divisor,) = operands
    return None


def _unmasked(node: fx.Node, reached: Reached) -> fx.Node:
    """What a constant mask was multiplied by."""
    operands = reached.operands(node)
    masked = of(node).name in ("mul", "masked_fill", "where") and len(operands) == 1
    return operands[0] if masked and reached.is_step(node) else node


def _without_maximum(logits: fx.Node, reached: Reached) -> fx.Node:
    """The `x` of `x - max(x)`, which the softmax does not notice."""
    if of(logits).name != "sub" or not reached.is_step(logits):
        return logits
    x, shift = logits.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(shift, fx.Node) or x not in reached:
        return logits
    largest = _behind(shift, lambda n: of(n).kind is Kind.SELECT or of(n).name in ("detach", "getitem"))
    if of(largest).name not in ("amax", "max"):
        return logits
    of_what = _behind(largest.args[0], lambda n: n is not x and (_copies(of(n)) or of(n).name == "detach"))
    return x if of_what is x else logits


def _behind(node: Any, passes: Callable[[fx.Node], bool]) -> fx.Node:
    """The first node, from `node` back along first operands, that does not pass."""
    while passes(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _copies(operator: Operator) -> bool:
    return operator.kind is Kind.SELECT and operator.pointwise and operator.operands == (0,)
