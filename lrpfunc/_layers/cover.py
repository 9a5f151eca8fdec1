"""Covers a program with layers."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, fx

from lrpfunc._capture.program import Program, is_float
from lrpfunc._layers.activation import activation
from lrpfunc._layers.affine import Affine, find_affine, merge
from lrpfunc._layers.facts import keeps_zero, nonnegative
from lrpfunc._layers.kinds import Nature, nature_of
from lrpfunc._layers.layer import Kind, Layer, Role
from lrpfunc._layers.normalization import normalization
from lrpfunc._layers.roles import Roles
from lrpfunc._layers.softmax import softmax
from lrpfunc._layers.tile import Reached, Tile
from lrpfunc._ops.call import of, operation_name


def _reached(program: Program, seeds: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend, differentiably, on the seeds."""
    reached = set(seeds)
    for node in program.graph.nodes:
        if node.op != "call_function" or node.meta["no_grad"] or not is_float(node):
            continue
        if of(node).differentiable and any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return reached


def _detached(program: Program, active: set[fx.Node]) -> set[fx.Node]:
    """What depends on the data through `detach` or `no_grad` alone."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or node in active or not is_float(node):
            continue
        stops = node.meta["no_grad"] or of(node).name == "detach"
        if any(n in found or (stops and n in active) for n in node.all_input_nodes):
            found.add(node)
    return found


class Cover:
    """Covers the nodes between the explained input and the output with layers.

    It goes back from the outputs: whatever pattern ends at a node that is needed is one layer, and needs its inputs. A
    node inside one layer may be needed by another, and is then a layer of its own, too.

    Attributes:
        active: The nodes that depend on the data.
        tapped: Those that depend on explained parameters alone.
        needed: The nodes to which relevance comes.
    """

    def __init__(self, program: Program, data: set[fx.Node], taps: set[fx.Node]):
        self._program = program
        self._sources = data | taps
        self.active = _reached(program, data)
        self.tapped = _reached(program, taps) - self.active
        self._reached = Reached(program.graph.nodes, self.active, self._sources)
        self._affines = self._merged_affines()
        self._tiles: dict[fx.Node, Tile | None] = {}
        self._roles = Roles(self._reached, self._tile, self._is_affine)
        self._nonnegative = nonnegative(program)
        self._detached = _detached(program, self.active)
        self.needed: set[fx.Node] = {node for node in program.outputs if node in self.active | self.tapped}

    def layers(self) -> list[Layer]:
        ends = list(self._ends())[::-1]
        count = max(sum(node in self._affines for node in ends), 1)
        names: Counter[str] = Counter()
        layers: list[Layer] = []
        passed = 0
        for node in ends:
            layers.append(self._layer(node, layers, passed / count, names))
            passed += node in self._affines
        return layers

    def _ends(self) -> Iterator[fx.Node]:
        """The last nodes of the layers, from the output to the input."""
        for node in reversed(self._program.graph.nodes):
            if node not in self.needed or node in self._sources or node.op != "call_function":
                continue
            if node.target is operator.getitem:
                self.needed.add(node.args[0])
                continue
            _, inputs, taps = self._operands(node)
            self.needed.update(inputs, taps)
            yield node

    def _operands(self, node: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        """The nodes of the layer that ends at `node`, its inputs, and the explained parameters that it uses."""
        found, tile = self._affines.get(node), self._tile(node)
        nodes = found.nodes if found is not None else tile.nodes if tile is not None else (node,)
        operands = tuple(filter(is_float, _read(nodes)))
        if node in self.tapped:
            return nodes, tuple(o for o in operands if o in self.tapped), ()
        inputs = tile.inputs if tile is not None else tuple(o for o in operands if o in self.active)
        return nodes, inputs, tuple(o for o in operands if o in self.tapped)

    # -- patterns

    def _merged_affines(self) -> dict[fx.Node, Affine]:
        kept = set(self._program.outputs)
        found = (find_affine(node, self.active) for node in self._program.graph.nodes if self._reached.is_step(node))
        merged = (merge(a, self.active, kept) for a in found if a is not None)
        return {a.nodes[-1]: a for a in merged}

    def _is_affine(self, node: fx.Node) -> bool:
        return node in self._affines

    def _tile(self, node: fx.Node) -> Tile | None:
        if node not in self._tiles:
            self._tiles[node] = self._match(node) if self._reached.is_step(node) else None
        return self._tiles[node]

    def _match(self, node: fx.Node) -> Tile | None:
        if node in self._affines or not isinstance(node.meta.get("val"), Tensor) or "signal" in node.meta:
            return None
        patterns = (softmax, normalization, activation)
        return next((tile for pattern in patterns if (tile := pattern(node, self._reached))), None)

    # -- layers

    def _layer(self, node: fx.Node, siblings: list[Layer], depth: float, counts: Counter[str]) -> Layer:
        nodes, inputs, taps = self._operands(node)
        found, tile = self._affines.get(node), self._tile(node)
        if found is not None:
            nature = Nature(Kind.CONVOLUTION if found.convolution else Kind.DENSE, linear=True)
        elif tile is not None:
            nature = Nature(tile.kind, axes=tile.axes)
        elif node.meta.get("signal") in self.active | {None}:
            nature = nature_of(node, inputs)
        else:  # a gate that modulates a constant
            nature = Nature(Kind.PRODUCT, shares=(1.0,))
        role, signals = self._role(node, nature, inputs)
        scopes = nodes[0].meta["scopes"]
        operation = operation_name(nodes[0]) if tile is None else tile.operation
        return Layer(
            kind=nature.kind,
            name=scopes[-1] if scopes else _numbered(_parameter_name(found) or operation, counts),
            operation=operation,
            modules=tuple(scopes),
            module_types=tuple(self._program.module_types[path] for path in scopes),
            depth=depth,
            linear=nature.linear,
            nonnegative=all(n in self._nonnegative for n in inputs),
            siblings=siblings,
            nodes=nodes,
            inputs=inputs,
            taps=taps,
            outputs=_outputs(node),
            affine=found,
            role=role,
            signals=signals,
            shares=nature.shares,
            axes=nature.axes,
            sums=() if tile is None else tile.sums,
            detached=() if tile is not None else tuple(o for o in _read(nodes) if o in self._detached),
            keeps_zero=nature.kind is Kind.ACTIVATION and len(inputs) == 1 and keeps_zero(nodes, inputs[0]),
            is_tap=node in self.tapped,
        )

    def _role(self, node: fx.Node, nature: Nature, inputs: tuple[fx.Node, ...]) -> tuple[Role, tuple[fx.Node, ...]]:
        if nature.kind in (Kind.NORMALIZATION, Kind.BATCH_NORM):
            return Role.NONE, inputs[:1]
        if nature.kind is Kind.ATTENTION:
            value: Any = node.args[2]
            return Role.NONE, (value,) if value in inputs else ()
        if nature.kind is Kind.QUOTIENT:
            return Role.NONE, tuple(n for n in inputs if n is not node.args[1])
        if nature.kind is not Kind.PRODUCT or node in self.tapped:
            return Role.NONE, ()
        if node.meta.get("signal") not in self.active | {None}:
            return Role.RECURRENT, ()
        added = [n for n, share in zip(inputs, nature.shares, strict=True) if share == 1]
        role, signals = self._roles.of(node, [n for n in inputs if n not in added])
        return role, (*signals, *added) if signals else ()


def _read(nodes: tuple[fx.Node, ...]) -> dict[fx.Node, None]:
    """What some nodes read, other than one another."""
    return dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in nodes)


def _numbered(name: str, counts: Counter[str]) -> str:
    counts[name] += 1
    return f"{name}@{counts[name] - 1}" if counts[name] > 1 else name


def _outputs(node: fx.Node) -> tuple[fx.Node | None, ...]:
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return (node,)
    outputs: list[fx.Node | None] = [None] * len(value)
    for user in node.users:
        if user.target is operator.getitem and is_float(user):
            outputs[user.args[1]] = user  # type: ignore[call-overload]
    return tuple(outputs)


def _parameter_name(found: Affine | None) -> str | None:
    if found is None:
        return None
    node = found.weight_node
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.meta.get("path")
