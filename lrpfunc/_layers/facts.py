"""What is known of values before any number is: that they are not negative, finite, or zero at zero."""

from __future__ import annotations

from typing import Any

from torch import fx

from lrpfunc._capture.program import Program, is_float
from lrpfunc._ops.call import operation_name
from lrpfunc._ops.table import FINITE, KEEPS_FINITE, KEEPS_SIGN, POSITIVE, QUOTIENT, SELECT, ZERO_AT_ZERO


def keeps_zero(nodes: tuple[fx.Node, ...], root: fx.Node) -> bool:
    """Whether a pointwise function of `root` is 0 where that is, and has a derivative there."""
    zero = {root}
    for node in nodes:
        if _zero_at_zero(node, zero):
            zero.add(node)
    return nodes[-1] in zero


def _zero_at_zero(node: fx.Node, zero: set[fx.Node]) -> bool:
    name = operation_name(node)
    first, *others = (*node.args, None)
    if name in ("mul", "multiply"):
        return first in zero or others[0] in zero
    if name in ("add", "sub", "subtract", "rsub", "maximum", "minimum"):
        return all(a in zero or (isinstance(a, (int, float)) and a == 0) for a in (first, others[0]))
    if name == "where":
        return all(a in zero or (isinstance(a, (int, float)) and a == 0) for a in others[:2])
    if first not in zero:
        return False
    if name in ("clamp", "clamp_min", "clamp_max", "clip", "hardtanh"):
        return _bounds_hold_zero(node, name)
    if name in ("pow", "float_power"):
        return isinstance(others[0], (int, float)) and others[0] >= 1
    if name == "masked_fill":
        return others[1] == 0
    quotient = name in QUOTIENT and others[0] not in zero
    return quotient or name in ZERO_AT_ZERO or name in SELECT or name in ("neg", "negative")


def _bounds_hold_zero(node: fx.Node, name: str) -> bool:
    """Whether a clamp leaves 0 as it is. At a bound of 0 it is a ReLU, whose slope there torch chooses."""
    low, high = {"hardtanh": (-1, 1)}.get(name, (None, None))
    given: list[Any] = list(node.args[1:])
    if name == "clamp_max":
        given.insert(0, None)
    given += [low, high][len(given) :]
    bounds = [node.kwargs.get(key, value) for key, value in zip(("min", "max"), given, strict=False)]
    numbers: list[Any] = [0 if bound is None else bound for bound in bounds]
    return all(isinstance(n, (int, float)) for n in numbers) and numbers[0] <= 0 <= numbers[1]


def finite(program: Program) -> set[fx.Node]:
    """The nodes that no mask can have made infinite."""
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        name = operation_name(node)
        if name in FINITE or (name in KEEPS_FINITE and all(n in known for n in node.all_input_nodes)):
            known.add(node)
    return known


def nonnegative(program: Program) -> set[fx.Node]:
    """The nodes whose values are known not to be negative, whatever the input."""
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and is_float(node) and _never_negative(node, known):
            known.add(node)
    return known


def _never_negative(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether no argument whatever can make the result negative; what is not listed may."""
    name = operation_name(node)
    first, *others = (*node.args, None)
    if name in POSITIVE:
        return True
    if name == "softplus":
        return len(node.args) == 1 and not node.kwargs
    if name in ("clamp", "clamp_min", "clip", "hardtanh"):
        low = node.kwargs.get("min", others[0])
        high = node.kwargs.get("max", others[1] if len(others) > 2 else None)
        return _not_below_zero(low, known) and (high is None or _not_below_zero(high, known))
    if name == "pow":
        return isinstance(others[0], int) and others[0] % 2 == 0
    if name in ("cat", "concat", "concatenate", "stack"):
        return all(part in known for part in first)  # type: ignore[union-attr]
    if name in ("add", "mul", "div"):
        operands = (first, others[0], node.kwargs.get("alpha", 1))
        return "rounding_mode" not in node.kwargs and all(_not_below_zero(a, known) for a in operands)
    if name in ("pad", "constant_pad_nd"):
        numbers: list[Any] = [a for a in others[1:] if isinstance(a, (int, float))] + [node.kwargs.get("value") or 0]
        return first in known and all(a >= 0 for a in numbers)
    if name in ("avg_pool1d", "avg_pool2d", "avg_pool3d") and len(node.args) > 6:
        return False  # a divisor of the user's own
    return name in KEEPS_SIGN and first in known


def _not_below_zero(value: Any, known: set[fx.Node]) -> bool:
    return value >= 0 if isinstance(value, (int, float)) else value in known
