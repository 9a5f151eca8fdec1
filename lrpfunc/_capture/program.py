"""A model function as a graph without side effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._capture.cache import Cache
from lrpfunc._capture.numbers import Number
from lrpfunc._capture.returned import Returned
from lrpfunc._capture.shapes import Shapes
from lrpfunc._ops.call import call, is_random
from lrpfunc._torch import constant, map_arg


@dataclass(eq=False)
class Program:
    """A model function as a graph without side effects.

    Each call node's `meta` has `val`, a fake tensor like its result, `scopes`, the modules around it from the outside
    in, and `no_grad` and `autocast`, what it was written under.

    Attributes:
        inputs: The placeholders of the tensor arguments.
        closed: The placeholders of the closed-over tensors: each an index into the environment, or a constant.
        numbers: Numbers in tensors that became part of it: it is for those alone.
        modules: `(name, leaves, spec)` of every module's output, in order of execution; a leaf is a node or `None`.
        module_types: The class of each, by its name.
        shapes: Which sizes it leaves open, `None` if it is for those that it was recorded with.
        graphs: What was recognised in the program, for each choice of what is explained.
    """

    graph: fx.Graph
    inputs: list[fx.Node]
    closed: list[tuple[fx.Node, int | Tensor]]
    outputs: list[fx.Node]
    output_spec: Returned
    aux: list[fx.Node]
    aux_spec: Returned
    modules: list[tuple[str, list[fx.Node | None], Any]]
    numbers: list[Number]
    module_types: dict[str, type]
    shapes: Shapes | None = None
    graphs: Cache[Any] = field(default_factory=lambda: Cache(16))

    @cached_property
    def is_random(self) -> bool:
        """Whether another run draws other numbers."""
        return any(node.op == "call_function" and is_random(node) for node in self.graph.nodes)

    @property
    def nodes(self) -> list[fx.Node]:
        """All that has a value, in order: the inputs, and the operations."""
        operations = (node for node in self.graph.nodes if node.op == "call_function")
        return [*self.placeholders, *operations]

    @property
    def placeholders(self) -> list[fx.Node]:
        """The inputs, in the order of the tensors that the program is run on."""
        return [*self.inputs, *(node for node, _ in self.closed)]

    def run(self, tensors: Sequence[Tensor]) -> dict[fx.Node, Any]:
        """The value of every node: the forward pass, as the model wrote it."""
        values: dict[fx.Node, Any] = dict(zip(self.placeholders, tensors, strict=True))
        for node in self.graph.nodes:
            if node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = call(node, args, kwargs)
        return values

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is right for the sizes of these arguments."""
        return self.shapes is None or self.shapes.fit(tensors)

    def arranged(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The arguments, laid out in memory as the program takes them."""
        return tensors if self.shapes is None else self.shapes.arranged(tensors)

    def sizes(self, tensors: Sequence[Tensor]) -> list[int]:
        """The open sizes, for the tensors that the program is run on."""
        return [] if self.shapes is None else self.shapes.sizes(tensors)

    def enclosed(self, environment: Sequence[Tensor]) -> list[Tensor]:
        """The closed-over tensors, of which the environment has those that are read anew at each call."""
        return constant(environment[source] if isinstance(source, int) else source for _, source in self.closed)

    def output(self, tensors: Sequence[Tensor]) -> Any:
        """What the model function returned, with these tensors in it."""
        return self.output_spec.rebuilt(tensors)

    def aux_output(self, tensors: Sequence[Tensor]) -> Any:
        """Its auxiliary output, likewise."""
        return self.aux_spec.rebuilt(tensors)


def is_float(node: fx.Node) -> bool:
    leaves = tree.leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves)
