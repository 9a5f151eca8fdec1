"""The forward pass and the walk as one graph.

For `torch.relu(x @ w)`, explained by `gradient()`, the program and the trace of the walk (see `retrace`) become

    w, x = placeholders
    matmul = aten.matmul.default(x, w)                                      # early: the program, as it was written
    relu_0 = aten.relu.default(matmul)
    start = placeholder
    relu = aten.relu.default(matmul)                                        # late: the trace, on the program's nodes
    threshold_backward = aten.threshold_backward.default(start, relu, 0)
    mm = aten.mm.default(x, w)
    t = aten.t.default(w)
    mm_1 = aten.mm.default(threshold_backward, t)
    relu_1 = aten.relu.default(matmul)
    return relu_0, mm_1, relu_1

Early and late are told apart from here on: what the model computes runs as it wrote it, to the bit, and what the walk
computes may be changed. `relu_1` is how the walk would compute a layer of the program. It is returned for `passes`
alone, which compares it with `relu_0`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from lrpfunc._capture.program import Program
from lrpfunc._capture.state import with_sizes
from lrpfunc._lower.retrace import Traced
from lrpfunc._lower.sizes import Sizes
from lrpfunc._ops.call import call, operation_name
from lrpfunc._ops.functions import copied
from lrpfunc._ops.strided import free_of_layout
from lrpfunc._ops.symbols import hashable
from lrpfunc._torch import aten, map_arg


@dataclass(eq=False)
class Joint:
    """One graph of the forward pass, as the model wrote it, and the walk, as it was traced.

    Attributes:
        inputs: The placeholders of the arguments, the closed-over tensors and the tensors in rules.
        start: Those of the messages that relevance starts with.
        forward: The nodes of the forward pass, by those of the program.
        early: What the forward pass computes, and the inputs.
        outputs: The output's tensors and the auxiliary output's.
        relevance: What the walk is for.
        evaluated: Nodes of the forward pass, and what computes the same in the trace.
        constants: Tensors that the trace holds.
        sizes: Nodes for open sizes, and what each is.
    """

    program: Program
    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: list[fx.Node] = field(default_factory=list)
    start: list[fx.Node] = field(default_factory=list)
    forward: dict[fx.Node, fx.Node] = field(default_factory=dict)
    early: set[fx.Node] = field(default_factory=set)
    outputs: list[fx.Node] = field(default_factory=list)
    relevance: list[fx.Node] = field(default_factory=list)
    evaluated: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[fx.Node, Any] = field(default_factory=dict)


def join(
    program: Program, leaves: Sequence[tuple[fx.Node, int | None]], traced: Traced, shared: Sequence[fx.Node]
) -> Joint:
    """The forward pass followed by the trace.

    Args:
        program: The forward pass.
        leaves: Which values the first placeholders of the trace stand for: a node, and a place in its result if that
            has several. The start follows, and then the tensors in rules.
        traced: The trace, which returns relevance and then the `shared` operations.
        shared: The nodes of the program that were traced too.
    """
    joint = Joint(program)
    graph, forward = joint.graph, joint.forward
    for node in (*program.inputs, *(node for node, _ in program.closed)):
        forward[node] = graph.placeholder(node.name)
        forward[node].meta = dict(node.meta)
        joint.inputs.append(forward[node])
    sizes = Sizes(graph, program.shapes.symbols if program.shapes else ())
    for node in program.graph.nodes:
        if node.op == "call_function":
            forward[node] = _written(graph, node, forward, sizes)
            joint.early.add(forward[node])
    joint.outputs = [forward[node] for node in (*program.outputs, *program.aux)]

    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    starts = len(program.outputs)
    joint.start = [graph.placeholder(f"start_{i}") for i in range(starts)]
    tensors = [graph.placeholder(f"rule_{i}") for i in range(len(placeholders) - len(leaves) - starts)]
    joint.inputs += [*tensors, *sizes.inputs]
    joint.early.update(joint.inputs)
    given = [forward[node] if place is None else _item(graph, forward[node], place) for node, place in leaves]
    joint.constants = dict(traced.constants)
    copies = dict(zip(placeholders, [*given, *joint.start, *tensors], strict=True))
    for node in traced.graph.nodes:
        if node.op in ("call_function", "get_attr"):
            target, kwargs = free_of_layout(node.target, node.args, node.kwargs)
            target = copied if target is aten.copy.default else target  # of which torch has no derivative
            copies[node] = _copy(graph, node, copies, sizes, target, kwargs)
    joint.early.update(sizes.nodes)
    joint.sizes = sizes.expressions
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    results = [copies[node] for node in output.args[0]]
    joint.relevance = results[: len(results) - len(shared)]
    joint.evaluated = list(zip(map(forward.__getitem__, shared), results[len(joint.relevance) :], strict=True))
    returns(joint, (*joint.outputs, *results))
    return joint


def _item(graph: fx.Graph, several: fx.Node, place: int) -> fx.Node:
    item = graph.call_function(operator.getitem, (several, place))
    item.meta["val"] = several.meta["val"][place]
    return item


_UNSPEAKABLE = ("overwrite", "fused")


class Written:
    """An operation that runs under a mode, or takes an argument that code cannot spell.

    Args:
        node: The operation.
        operands: What it is called with: the nodes that it reads, and then the open sizes among its arguments.
    """

    def __init__(self, node: fx.Node, operands: Sequence[Any]):
        self.node = node
        self._args = node.args, node.kwargs
        self._operands = list(operands)
        self.__name__ = self.__qualname__ = operation_name(node)

    @property
    def key(self) -> Any:
        """What equal operations have in common."""
        if operation_name(self.node) in _UNSPEAKABLE:
            return self
        places = {operand: place for place, operand in enumerate(self._operands)}
        args = map_arg(hashable(self._args), places.__getitem__)
        return self.node.target, args, self.node.meta["no_grad"], self.node.meta["autocast"]

    def __call__(self, *tensors: Any) -> Any:
        known = dict(zip(self._operands, tensors, strict=True))
        args, kwargs = with_sizes(map_arg(self._args, known.__getitem__), lambda size: known[size.node.expr])
        return call(self.node, args, kwargs)


def _written(graph: fx.Graph, node: fx.Node, forward: dict[fx.Node, fx.Node], sizes: Sizes) -> fx.Node:
    if not (node.meta["no_grad"] or node.meta["autocast"] or operation_name(node) in _UNSPEAKABLE):
        return _copy(graph, node, forward, sizes, node.target, node.kwargs)
    found: dict[Any, Any] = {}
    with_sizes((node.args, node.kwargs), lambda size: found.setdefault(size.node.expr, sizes.spelled_size(size)))
    operands = [forward[n] for n in node.all_input_nodes]
    new = graph.call_function(Written(node, [*node.all_input_nodes, *found]), (*operands, *found.values()))
    new.meta = dict(node.meta)
    return new


def _copy(
    graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], sizes: Sizes, target: Any, kwargs: dict[str, Any]
) -> fx.Node:
    """A copy of a node, with nodes in place of the open sizes among its arguments."""
    args, kwargs = map_arg(sizes.spelled((node.args, kwargs)), lambda n: copies.get(n, n))  # type: ignore[assignment]
    new = graph.create_node(node.op, target, args, kwargs, node.name, node.type)
    new.meta = dict(node.meta)
    return new


def returns(joint: Joint, results: Iterable[fx.Node]) -> None:
    """Makes the graph return `results`."""
    for node in reversed(joint.graph.nodes):
        if node.op == "output":
            joint.graph.erase_node(node)
    joint.graph.output(tuple(results))
