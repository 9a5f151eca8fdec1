"""One step from the input to the output: what selectors and rules see of it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from lrpfunc import _tree as tree
from lrpfunc._layers.affine import Affine
from lrpfunc._ops.call import of
from lrpfunc._ops.operator import Kind as Kind


class Role(enum.StrEnum):
    """What a product is for, told by where its operands come from."""

    NONE = ""
    GATE = "Gate"
    ROUTER = "Router"
    RECURRENT = "Recurrent"
    SCAN = "Scan"


STRUCTURAL = frozenset({Kind.SELECT, Kind.WINNER, Kind.SCALE})
"""Kinds that only move or scale what they are given; composites do not see them."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One step from the explained input to the output: an operation, or several that are explained as one.

    Selectors and rules see these attributes; the nodes are the walk's.

    Attributes:
        kind: What the layer is.
        name: The module's path, with `@k` for its call `k > 0`; in a function without modules the path of the
            layer's parameter, or the operation's name, likewise numbered.
        operation: The name of the torch operation, such as `"conv2d"`.
        modules: The paths of all modules around the operation, from the outside in.
        module_types: Their classes.
        depth: The share of the way through the dense layers and convolutions, from 0 to 1.
        linear: Whether the layer is affine in its inputs, so that it needs no rule.
        nonnegative: Whether the input is known to be non-negative.
        siblings: All layers on a path from the explained input to the output, in order of execution.
        role: What a product is for.
        signals: The inputs that carry the signal, where others modulate it: the value beside attention weights, what
            a gate lets through. Empty where that cannot be told.
        shares: What each input of a product, quotient, statistic or attention counts for when all operands share.
        axes: The axes that a softmax sums over.
        sums: Of a softmax over segments, what it adds up and the nodes that give each element its segment's sum.
        detached: Operands that depend on the input through `detach` alone: constants, though their values are not.
        keeps_zero: Whether an activation is 0 at 0, and has a derivative there.
    """

    kind: Kind
    name: str
    operation: str
    modules: tuple[str, ...]
    module_types: tuple[type, ...]
    depth: float
    linear: bool
    nonnegative: bool
    siblings: Sequence[Layer]
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    taps: tuple[fx.Node, ...]
    outputs: tuple[fx.Node | None, ...]
    affine: Affine | None
    role: Role = Role.NONE
    signals: tuple[fx.Node, ...] = ()
    shares: tuple[float, ...] = ()
    axes: tuple[int, ...] = ()
    sums: tuple[fx.Node, ...] = ()
    detached: tuple[fx.Node, ...] = ()
    keeps_zero: bool = False
    is_tap: bool = False

    @property
    def output(self) -> fx.Node:
        """The one output of a layer that has one."""
        (output,) = (node for node in self.outputs if node is not None)
        return output

    @property
    def operands(self) -> int:
        """How many tensors the operation reads, parameters included."""
        return len({node for inner in self.nodes for node in inner.all_input_nodes} - set(self.nodes))

    @property
    def places(self) -> int:
        """How many operands the inputs are: more than there are inputs in `x * x`."""
        operands = tree.leaves([(node.args, node.kwargs) for node in self.nodes])
        return sum(operands.count(node) for node in self.inputs)

    @property
    def competes_with_constants(self) -> bool:
        """Whether tensors that do not depend on the explained input may win a comparison."""
        node = self.nodes[-1]
        competing = (node.args[place] for place in of(node).operands if place < len(node.args))
        return any(isinstance(operand, fx.Node) and operand not in self.inputs for operand in competing)

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(node.meta["val"].shape) for node in self.inputs)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return next(tuple(node.meta["val"].shape) for node in self.outputs if node is not None)

    def __repr__(self) -> str:
        shapes = ", ".join(map(str, self.input_shapes))
        return f"{self.name}   {self.operation}   {shapes} -> {self.output_shape}"
