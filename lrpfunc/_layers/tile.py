"""What patterns are made of: the nodes that depend on the explained input, and groups of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._layers.layer import Kind
from lrpfunc._ops.call import argument, of


@dataclass(frozen=True)
class Tile:
    """Several operations, in their order, as one layer; the last one has its output.

    Operands that are neither nodes nor inputs are held constant: relevance does not go there.

    Attributes:
        axes: The axes that a softmax sums over.
        sums: Of one that sums over segments, what it adds up and the nodes that give each element its segment's sum.
    """

    kind: Kind
    operation: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    axes: tuple[int, ...] = ()
    sums: tuple[fx.Node, ...] = ()


class Reached:
    """The nodes of a program that depend on the explained input, and the order of all of them."""

    def __init__(self, program_nodes: Iterable[fx.Node], nodes: set[fx.Node], sources: set[fx.Node]):
        self._all = tuple(program_nodes)
        self.order = {node: i for i, node in enumerate(self._all)}
        self.nodes = nodes
        self.sources = sources
        self._operands: dict[fx.Node, list[fx.Node]] = {}

    def __contains__(self, node: object) -> bool:
        return node in self.nodes

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The operands that depend on the explained input, as often as they stand there."""
        if node not in self._operands:
            leaves = tree.leaves((node.args, node.kwargs))
            self._operands[node] = [a for a in leaves if isinstance(a, fx.Node) and a in self.nodes]
        return self._operands[node]

    def is_step(self, node: object) -> bool:
        """Whether `node` is an operation on the way from the explained input."""
        return node in self.nodes and node not in self.sources and isinstance(node, fx.Node)

    def dominators(
        self, node: fx.Node, passes: Callable[[fx.Node], bool]
    ) -> Iterator[tuple[frozenset[fx.Node], fx.Node]]:
        """The nodes that every path from the explained input to `node` comes through, the nearest first.

        Each with the nodes in between, `node` among them, all of which but `node` satisfy `passes`.
        """
        inside = {node}
        front = set(self.operands(node))
        while front:
            if len(front) == 1:
                yield frozenset(inside), next(iter(front))
            latest = max(front, key=self.order.__getitem__)
            if not self.is_step(latest) or not passes(latest):
                return
            inside.add(latest)
            front.remove(latest)
            front.update(self.operands(latest))

    def between(self, root: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes on paths from `root` to `end`, `end` included, in order."""
        window = self._all[self.order[root] + 1 : self.order[end] + 1]
        after = {root}
        for node in window:
            if self.is_step(node) and not after.isdisjoint(self.operands(node)):
                after.add(node)
        before = {end}
        for node in reversed(window):
            if node in before and node in after:
                before.update(self.operands(node))
        return tuple(node for node in window if node in before and node in after)

    def is_linear(self, node: fx.Node) -> bool:
        """Whether an operation is linear, up to constants, in all operands that depend on the explained input."""
        operator, operands = of(node), self.operands(node)
        match operator.kind:
            case Kind.SELECT:
                return True
            case Kind.SUM | Kind.AVERAGE | Kind.LINEAR | Kind.SCALE:
                return all(a not in self.nodes for place, a in enumerate(node.args) if place not in operator.operands)
            case Kind.PRODUCT:
                return len(operands) == 1
            case Kind.QUOTIENT:
                return len(operands) == 1 and node.args[0] in self.nodes
        return False

    def source_of(self, node: fx.Node) -> fx.Node:
        """Where a node's values were taken from, through operations that only move them."""
        while isinstance(node, fx.Node) and node.op == "call_function" and node not in self.sources:
            operands = [a for a in node.args if isinstance(a, fx.Node) and _floating(a)]
            if of(node).kind is not Kind.SELECT or len(operands) != 1:
                break
            node = operands[0]
        return node


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def axes_of(node: fx.Node) -> tuple[int, ...]:
    """The axes that a softmax, a sum or the like works along."""
    axes: Any = argument(node, "dim")
    size = len(shape(node.args[0])) or 1  # type: ignore[arg-type]
    if axes is None or axes == []:
        return tuple(range(size))
    return tuple(int(a) % size for a in (axes if isinstance(axes, (list, tuple)) else (axes,)))
