"""Normalizations that are written out: a tensor divided by a statistic of itself."""

from __future__ import annotations

from typing import Any

from torch import fx

from lrpfunc._layers.layer import Kind
from lrpfunc._layers.tile import Reached, Tile
from lrpfunc._ops.call import degree_of, of


def normalization(node: fx.Node, reached: Reached) -> Tile | None:
    r"""The operation `node` as the division of a tensor by a statistic of itself.

    The statistic is homogeneous in a tensor `x` up to an epsilon, as :math:`\sqrt{\operatorname{mean}(x^2) + \epsilon}`
    is, and the numerator a linear function of the same `x`. Whatever else divides is no normalization: in linear
    attention the numerator is a product that its normalizer does not read.
    """
    pairs: list[tuple[Any, Any, int]] = []
    if of(node).kind is Kind.QUOTIENT:
        pairs = [(node.args[0], node.args[1], 1)]
    elif of(node).name == "mul":
        first, second = node.args[:2]
        pairs = [(first, second, -1), (second, first, -1)]
    for numerator, statistic, sign in pairs:
        if not (isinstance(numerator, fx.Node) and numerator in reached and reached.is_step(statistic)):
            continue
        degree, reduced = _Degree(reached, _linear_roots(numerator, reached)).of(statistic) or (0.0, False)
        if reduced and degree * sign > 0:
            return Tile(Kind.NORMALIZATION, "normalize", (node,), tuple(dict.fromkeys((numerator, statistic))))
    return None


def _linear_roots(node: fx.Node, reached: Reached) -> set[fx.Node]:
    """The nodes that `node` is a linear function of, each by itself."""
    if not reached.is_step(node) or not reached.is_linear(node):
        return {node}
    return {node, *(root for _, root in reached.dominators(node, reached.is_linear))}


class _Degree:
    """The degree of homogeneity in `roots`, and whether something was reduced; `None` for any other function."""

    def __init__(self, reached: Reached, roots: set[fx.Node]):
        self._reached = reached
        self._known: dict[fx.Node, tuple[float, bool] | None] = dict.fromkeys(roots, (1.0, False))

    def of(self, node: fx.Node) -> tuple[float, bool] | None:
        if node not in self._known:
            self._known[node] = self._step(node) if self._reached.is_step(node) else None
        return self._known[node]

    def _step(self, node: fx.Node) -> tuple[float, bool] | None:
        operator, operands = of(node), self._reached.operands(node)
        degree = 1.0 if operator.epsilon else degree_of(node)
        if degree is None and operator.name != "mul" and operator.kind is not Kind.QUOTIENT:
            return None  # before its operands are looked at, which would lead through the whole network
        found = [self.of(operand) for operand in operands]
        known = [f for f in found if f is not None]
        if len(known) < len(found) or not known:
            return None
        degrees = [degree for degree, _ in known]
        reduced = operator.reduces or any(was for _, was in known)
        if operator.name == "mul":
            return sum(degrees), reduced
        if operator.kind is Kind.QUOTIENT:
            first = degrees[0] if node.args[0] in operands else -degrees[0]
            return first - sum(degrees[1:]), reduced
        return None if degree is None or len(set(degrees)) > 1 else (degrees[0] * degree, reduced)
