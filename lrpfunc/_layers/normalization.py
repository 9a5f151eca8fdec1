"""Normalizations that are written out: a tensor divided by a statistic of itself."""

from __future__ import annotations

from typing import Any

from torch import fx

from lrpfunc._layers.layer import Kind
from lrpfunc._layers.tile import Reached, Tile
from lrpfunc._ops.call import operation_name
from lrpfunc._ops.table import AVERAGE, LINEAR, PRODUCT, QUOTIENT, SCALE, SELECT, STATISTIC, names

_REDUCES = AVERAGE | {"sum", "nansum", "amax", "amin"}
_KEEPS_DEGREE = names("abs absolute neg negative clamp clamp_min maximum")
_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}

_HOMOGENEOUS = {*STATISTIC, *_REDUCES, *_KEEPS_DEGREE, *_POWERS, *PRODUCT, *QUOTIENT} | names(
    "getitem max min add sub cat stack pow"
)
"""The operations through which a degree of homogeneity is known."""


def normalization(node: fx.Node, reached: Reached) -> Tile | None:
    r"""The operation `node` as the division of a tensor by a statistic of itself.

    The statistic is homogeneous in a tensor `x` up to an epsilon, as :math:`\sqrt{\operatorname{mean}(x^2) + \epsilon}`
    is, and the numerator a linear function of the same `x`. Whatever else divides is no normalization: in linear
    attention the numerator is a product that its normalizer does not read.
    """
    name = operation_name(node)
    pairs: list[tuple[Any, Any, int]] = []
    if name in QUOTIENT and "rounding_mode" not in node.kwargs:
        pairs = [(node.args[0], node.args[1], 1)]
    elif name in PRODUCT:
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
    if not reached.is_step(node) or not _is_linear(node, reached):
        return {node}
    return {node, *(root for _, root in reached.dominators(node, lambda n: _is_linear(n, reached)))}


def _is_linear(node: fx.Node, reached: Reached) -> bool:
    name = operation_name(node)
    if name in SELECT or name in AVERAGE or name in LINEAR:
        return True
    if name in SCALE:
        return len(reached.operands(node)) == 1 and (name not in QUOTIENT or node.args[0] in reached)
    return False


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
        name = operation_name(node)
        operands = self._reached.operands(node) if name in _HOMOGENEOUS or name in SELECT else []
        if not operands:
            return None
        found = [self.of(operand) for operand in operands]
        known = [f for f in found if f is not None]
        if len(known) < len(found):
            return None
        degrees = [degree for degree, _ in known]
        reduced = any(was for _, was in known)
        first = degrees[0]
        if name in STATISTIC:
            return first * STATISTIC[name], True
        if name == "getitem":
            return first, reduced
        if name in _REDUCES or (name in ("max", "min") and len(operands) == 1):
            return first, True
        if name in ("add", "sub", "cat", "stack", "maximum") and len(set(degrees)) == 1:
            return first, reduced
        if name in PRODUCT:
            return sum(degrees), reduced
        if name in QUOTIENT:
            return (first if node.args[0] in operands else -first) - sum(degrees[1:]), reduced
        power = _POWERS.get(name, node.args[1] if name == "pow" and node.args[0] in operands else None)
        if isinstance(power, (int, float)):
            return first * power, reduced
        if len(operands) == 1 and (name in SELECT or name in _KEEPS_DEGREE):
            return first, reduced
        return None
