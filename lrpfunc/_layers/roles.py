"""What a product is for: which of its operands carries the signal, and which modulates it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import fx

from lrpfunc import _tree as tree
from lrpfunc._layers.layer import Kind, Role
from lrpfunc._layers.tile import Reached, Tile, shape
from lrpfunc._ops.call import of
from lrpfunc._ops.operator import Operator

_MOVES = {Kind.SELECT, Kind.SCALE, Kind.PRODUCT, Kind.QUOTIENT}
_THROUGH = _MOVES | {Kind.SUM, Kind.LINEAR, Kind.WINNER}
"""Kinds that keep a gate a gate, with one operand that depends on the explained input."""


@dataclass(frozen=True)
class _Origin:
    """Where an operand of a product comes from: how much it looks like a gate, and whether experts are routed by it."""

    rank: int
    routed: bool


class Roles:
    """Tells the roles of the products of one program.

    Args:
        reached: The nodes that depend on the explained input.
        tile_at: The pattern that ends at a node.
        is_affine: Whether a node is a dense layer or convolution.
    """

    def __init__(
        self, reached: Reached, tile_at: Callable[[fx.Node], Tile | None], is_affine: Callable[[fx.Node], bool]
    ):
        self._reached = reached
        self._tile_at = tile_at
        self._is_affine = is_affine
        self._carriers = self._of_scans()

    def of(self, node: fx.Node, factors: list[fx.Node]) -> tuple[Role, tuple[fx.Node, ...]]:
        """The role of a product, and which of its factors carry the signal."""
        if "signal" in node.meta:
            return Role.RECURRENT, (node.meta["signal"],)
        carriers = [factor for factor in factors if factor in self._carriers]
        if node in self._carriers and len(carriers) == 1:
            return Role.SCAN, tuple(carriers)
        if len(factors) != 2:
            return Role.NONE, ()
        origins = [self._origin(factor) for factor in factors]
        sizes = [prod(shape(factor)) for factor in factors]
        first, second = ((origin.rank, -size) for origin, size in zip(origins, sizes, strict=True))
        if first == second or not max(first[0], second[0]):
            return Role.NONE, ()
        gate = int(second > first)
        return (Role.ROUTER if origins[gate].routed else Role.GATE), (factors[1 - gate],)

    # -- gates

    def _origin(self, node: fx.Node) -> _Origin:
        """Looks back through what keeps a gate a gate: changes of shape, constants added and multiplied."""
        rank, routed = 0, False
        while self._reached.is_step(node):
            operator = of(node)
            tile = self._tile_at(node)
            if tile is not None and tile.kind is Kind.NORMALIZATION:
                node = tile.inputs[0]
                continue
            if not rank:
                rank = _rank(operator, tile)
            routed |= operator.name == "topk" or (operator.chooses and self._is_chosen(node))
            operands = dict.fromkeys(self._reached.operands(node))
            through = operator.kind in _THROUGH or operator.name == "getitem" or _is_fraction(operator)
            if tile is not None and tile.kind is Kind.SOFTMAX:
                operands = dict.fromkeys(tile.inputs)
            elif not through:
                break
            if len(operands) != 1:
                break
            (node,) = operands
        return _Origin(rank, routed and rank == 3)

    def _is_chosen(self, node: fx.Node) -> bool:
        """Whether the indices come from a `topk`."""
        pending = [a for a in tree.leaves(node.args[1:]) if isinstance(a, fx.Node)]
        while pending:
            index = pending.pop()
            if of(index).name == "topk":
                return True
            if index not in self._reached and index.op == "call_function":
                pending.extend(index.all_input_nodes)
        return False

    # -- selective scans

    def _of_scans(self) -> set[fx.Node]:
        r"""The nodes that carry the signal `u` through selective scans, from `u` to the output of the scan.

        A scan is told by its skip connection: a sum of :math:`D u`, with a constant `D`, and of what `u` becomes by
        products and sums alone, among them products with the decay, an exponential.
        """
        carriers: set[fx.Node] = set()
        for node in self._reached.order:
            if node in self._reached.nodes and of(node).name == "add" and self._reached.is_step(node):
                operands = self._reached.operands(node)
                if len(operands) == 2:
                    for scanned, skip in (operands, operands[::-1]):
                        carriers |= self._scan(scanned, skip)
        return carriers

    def _scan(self, scanned: fx.Node, skip: fx.Node) -> set[fx.Node]:
        chain = self._skipped(skip)
        if not chain:
            return set()
        behind = self._behind(scanned)
        start = next((node for node in chain if node in behind), None)
        if start is None:
            return set()
        carriers = {start}
        for node in sorted(behind, key=self._reached.order.__getitem__):
            on_the_way = self._reached.is_step(node) and not self._is_affine(node)
            if on_the_way and not carriers.isdisjoint(self._reached.operands(node)):
                carriers.add(node)
        return carriers if any(self._decays(node, carriers) for node in carriers) else set()

    def _skipped(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that `node` is a constant multiple of, the nearest first; none if nothing multiplies."""
        chain, scaled = [], False
        while self._reached.is_step(node):
            operands = self._reached.operands(node)
            if len(operands) != 1 or of(node).kind not in _MOVES:
                break
            scaled |= of(node).kind is not Kind.SELECT
            (node,) = operands
            chain.append(node)
        return chain if scaled else []

    def _behind(self, node: fx.Node) -> set[fx.Node]:
        """What a node is made of, back to the nearest dense layers, convolutions and sources."""
        found: set[fx.Node] = set()
        pending = [node]
        while pending:
            node = pending.pop()
            if node in found:
                continue
            found.add(node)
            if self._reached.is_step(node) and not self._is_affine(node):
                pending.extend(self._reached.operands(node))
        return found

    def _decays(self, node: fx.Node, carriers: set[fx.Node]) -> bool:
        """Whether `node` is the product of a carrier with an exponential that carries nothing."""
        operands = self._reached.operands(node)
        if of(node).kind not in (Kind.PRODUCT, Kind.DENSE) or len(operands) < 2:
            return False
        others = [self._reached.source_of(operand) for operand in operands if operand not in carriers]
        return any(of(other).name == "exp" for other in others)


def _is_fraction(operator: Operator) -> bool:
    return operator.gate == 2 or operator.kind is Kind.SOFTMAX


def _rank(operator: Operator, tile: Tile | None) -> int:
    """How much the result of an operation looks like a gate: a fraction, a bounded number, an activation, nothing."""
    if tile is not None:
        return {Kind.SOFTMAX: 3, Kind.ACTIVATION: 1}.get(tile.kind, 0)
    if _is_fraction(operator):
        return 3
    return 2 if operator.gate else int(operator.kind is Kind.ACTIVATION)
