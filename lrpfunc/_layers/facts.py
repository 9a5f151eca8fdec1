"""What is known of values before any number is: that they are not negative, finite, or zero at zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from lrpfunc import _tree as tree
from lrpfunc._capture.program import Program, is_float
from lrpfunc._ops.call import claims, of
from lrpfunc._ops.operator import Holds, Kind


def _known(nodes: set[fx.Node], number: Callable[[float], bool]) -> Holds:
    """Whether a property is known of an argument: of these nodes, of numbers that have it, and of no argument."""

    def holds(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(holds, value))
        if isinstance(value, fx.Node):
            return value in nodes
        return value is None or (isinstance(value, (int, float)) and number(value))

    return holds


def keeps_zero(nodes: tuple[fx.Node, ...], root: fx.Node) -> bool:
    """Whether a pointwise function of `root` is 0 where that is, and has a derivative there."""
    zero, singular = {root}, set[fx.Node]()
    is_zero = _known(zero, lambda number: number == 0)
    for node in nodes:
        if not singular.isdisjoint(node.all_input_nodes) or claims(of(node).singular, node, is_zero):
            singular.add(node)  # 0 * inf is no derivative
        elif claims(of(node).zero, node, is_zero):
            zero.add(node)
    return nodes[-1] in zero


def nonnegative(program: Program) -> set[fx.Node]:
    """The nodes whose values are known not to be negative, whatever the input."""
    found: set[fx.Node] = set()
    is_nonnegative = _known(found, lambda number: number >= 0)
    for node in program.graph.nodes:
        if node.op == "call_function" and is_float(node) and claims(of(node).nonnegative, node, is_nonnegative):
            found.add(node)
    return found


def finite(program: Program) -> set[fx.Node]:
    """The nodes that no mask can have made infinite.

    What is multiplied by matrices counts as finite, unless an infinite number is seen to have been written into it: one
    that comes in with an input would make whole rows infinite, or no number.
    """
    found, masked = set[fx.Node](), set[fx.Node]()
    is_finite = _known(found, math.isfinite)
    for node in program.graph.nodes:
        numbers = (leaf for leaf in tree.leaves((node.args, node.kwargs)) if isinstance(leaf, float))
        reads_mask = not masked.isdisjoint(node.all_input_nodes) or any(map(math.isinf, numbers))
        multiplies = of(node).kind in (Kind.DENSE, Kind.CONVOLUTION)
        if (multiplies and not reads_mask) or claims(of(node).finite, node, is_finite):
            found.add(node)
        elif reads_mask:
            masked.add(node)
    return found
