"""Passes over the forward pass and the walk as one graph, and the cut between them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.fx.graph import _BoxedCodeGen

from lrpfunc._kinds import finite, nonnegative
from lrpfunc._operations import SELECT, aten, call, copied, is_random, operation_name
from lrpfunc._simplify import Program
from lrpfunc._torch import map_arg


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


def join(
    program: Program, leaves: Sequence[tuple[fx.Node, int | None]], traced: fx.GraphModule, shared: Sequence[fx.Node]
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
        joint.inputs.append(forward[node])
    for node in program.graph.nodes:
        if node.op == "call_function":
            forward[node] = _written(graph, node, forward)
            joint.early.add(forward[node])
    joint.outputs = [forward[node] for node in (*program.outputs, *program.aux)]

    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    starts = len(program.outputs)
    joint.start = [graph.placeholder(f"start_{i}") for i in range(starts)]
    tensors = [graph.placeholder(f"rule_{i}") for i in range(len(placeholders) - len(leaves) - starts)]
    joint.inputs += tensors
    joint.early.update(joint.inputs)
    given = [
        forward[node] if place is None else graph.call_function(operator.getitem, (forward[node], place))
        for node, place in leaves
    ]
    copies = dict(zip(placeholders, [*given, *joint.start, *tensors], strict=True))
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            joint.constants[node.target] = getattr(traced, node.target)
        if node.op in ("call_function", "get_attr"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].target = _SUBSTITUTES.get(node.target, node.target)
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    results = [copies[node] for node in output.args[0]]
    joint.relevance = results[: len(results) - len(shared)]
    joint.evaluated = list(zip(map(forward.__getitem__, shared), results[len(joint.relevance) :], strict=True))
    _return(joint, (*joint.outputs, *results))
    return joint


_SUBSTITUTES: dict[Any, Any] = {
    # A trace has the strides of what it saw.
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    # Torch has no derivative of it.
    aten.copy.default: copied,
}


class _Written:
    """An operation that runs under a mode, or takes an argument that code cannot spell."""

    def __init__(self, node: fx.Node):
        self._node = node
        self._args = node.args, node.kwargs
        self._operands = list(node.all_input_nodes)
        self.__name__ = self.__qualname__ = operation_name(node)

    def __call__(self, *tensors: Any) -> Any:
        args, kwargs = map_arg(self._args, dict(zip(self._operands, tensors, strict=True)).__getitem__)
        return call(self._node, args, kwargs)


def _written(graph: fx.Graph, node: fx.Node, forward: dict[fx.Node, fx.Node]) -> fx.Node:
    if node.meta["no_grad"] or node.meta["autocast"] or operation_name(node) in ("overwrite", "fused"):
        return graph.call_function(_Written(node), tuple(forward[n] for n in node.all_input_nodes))
    return graph.node_copy(node, forward.__getitem__)


# --------------------------------------------------------------------------------------------------------------
# Passes


def simplify(joint: Joint) -> None:
    """Drops what is not needed, and computes once what is computed several times."""
    _drop_dead(joint)
    _merge_repeated(joint)
    _keep_what_is_computed(joint)
    _fold(joint)
    _drop_dead(joint)


def _drop_dead(joint: Joint) -> None:
    for node in reversed(joint.graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users and not is_random(node):
            joint.early.discard(node)
            joint.graph.erase_node(node)


def _return(joint: Joint, results: Iterable[fx.Node]) -> None:
    for node in reversed(joint.graph.nodes):
        if node.op == "output":
            joint.graph.erase_node(node)
    joint.graph.output(tuple(results))


def _merge_repeated(joint: Joint) -> None:
    """Common subexpressions; random numbers are never shared, and the forward pass stays as it was written."""
    seen: dict[Any, fx.Node] = {}
    for node in joint.graph.nodes:
        if node.op != "call_function" or isinstance(node.target, _Written) or is_random(node):
            continue
        first = seen.setdefault((node.target, _hashable(node.args), _hashable(node.kwargs)), node)
        if first is not node and node not in joint.early:
            _replace(joint, node, first)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in value.items())
    return value if isinstance(value, fx.Node) else (type(value), repr(value))  # 1, 1.0 and True are not the same


def _replace(joint: Joint, old: fx.Node, new: fx.Node) -> None:
    """Puts `new` wherever `old` stands; what nobody uses any more drops out later."""
    old.replace_all_uses_with(new)
    joint.outputs = [new if node is old else node for node in joint.outputs]
    joint.relevance = [new if node is old else node for node in joint.relevance]
    joint.evaluated = [(node, new if value is old else value) for node, value in joint.evaluated]


def _keep_what_is_computed(joint: Joint) -> None:
    """Makes the forward pass keep what the walk would compute once more.

    An operation may compute more than its output, for example the indices of a maximum. Its VJP, as it was traced,
    computes all that anew.
    """
    for node, value in joint.evaluated:
        if value in joint.early:
            continue
        steps = _steps(joint, value)
        known = (operand for step in steps for operand in step.all_input_nodes if operand in joint.early)
        if any(node < n for n in known) or not any(_is_used_beyond(step, steps) for step in steps if step is not value):
            _replace(joint, value, node)
            continue
        for step in steps:
            node.prepend(step)
        joint.early.update(steps)
        joint.forward = {key: value if copy is node else copy for key, copy in joint.forward.items()}
        _replace(joint, node, value)
    _return(joint, (*joint.outputs, *joint.relevance))


def _is_used_beyond(step: fx.Node, steps: Sequence[fx.Node]) -> bool:
    views = operation_name(step) in SELECT
    return not views and any(user not in steps and user.op != "output" and user.users for user in step.users)


def _steps(joint: Joint, value: fx.Node) -> list[fx.Node]:
    """What computes `value` from the forward pass, in order."""
    found: set[fx.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if node not in joint.early and node not in found:
            if node.op != "call_function":
                return []
            found.add(node)
            pending.extend(node.all_input_nodes)
    return [node for node in joint.graph.nodes if node in found]


def _fold(joint: Joint) -> None:
    """Uses what is known of activations: that they are finite, not negative, or a ReLU's."""
    facts = _Facts(
        {joint.forward[node] for node in finite(joint.program)},
        {joint.forward[node] for node in nonnegative(joint.program)},
    )
    for node in joint.graph.nodes:
        if node.op == "call_function" and node not in joint.early:
            with joint.graph.inserting_before(node):
                simpler = _simpler(node, facts)
            if simpler is not None:
                _replace(joint, node, simpler)


@dataclass(frozen=True)
class _Facts:
    finite: set[fx.Node]
    nonnegative: set[fx.Node]


def _simpler(node: fx.Node, facts: _Facts) -> fx.Node | None:
    match node.target, node.args:
        case aten.where.self, (condition, _, fx.Node() as kept):
            never_infinite = kept in facts.finite and _is(condition, aten.isinf.default, kept)
            never_negative = kept in facts.nonnegative and _is(condition, aten.lt.Scalar, kept, 0)
            return kept if never_infinite or never_negative else None
        case aten.mul.Tensor, (fx.Node() as x, 1):
            return x
        case aten.mul.Tensor, (fx.Node() as x, fx.Node() as masked):
            for z, m in ((x, masked), (masked, x)):
                if m.target is not aten.threshold_backward.default:
                    continue
                if m.args[1] is z or _is(m.args[1], aten.relu.default, z):
                    return node.graph.call_function(aten.mul.Tensor, (m.args[1], m.args[0]))
    return None


def _is(node: Any, target: Any, *args: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target and node.args == args


# --------------------------------------------------------------------------------------------------------------
# The cut


@dataclass(frozen=True, eq=False)
class Programs:
    """What a joint graph is cut into. Each takes a list of tensors, empties it, and returns a tuple.

    Attributes:
        prepare: From the bound inputs to what the forward pass makes of them alone.
        forward: From that and the other inputs to the outputs and what the walk needs.
        walk: From that and the start to relevance.
    """

    prepare: Callable[[list[Tensor]], tuple[Tensor, ...]]
    forward: Callable[[list[Tensor]], tuple[Tensor, ...]]
    walk: Callable[[list[Tensor]], tuple[Tensor, ...]]


def cut(joint: Joint, bound: int, reuse: bool) -> Programs:
    """Cuts the graph where the inputs that are not bound begin, and where relevance starts.

    Args:
        joint: The graph.
        bound: How many of the inputs, from the first, are bound.
        reuse: Whether the forward pass also computes what does not depend on the start.
    """
    steps = [node for node in joint.graph.nodes if node.op in ("call_function", "get_attr")]
    first = _behind(joint, joint.inputs[:bound], lambda node: not is_random(node)) if bound else set()
    early = _behind(joint, first | joint.early, _keeps(reuse))
    late = [node for node in steps if node not in early]
    saved = _read(late, joint.relevance, early)
    middle = [node for node in steps if node in early and node not in first]
    prepared = _read(middle, [*joint.outputs, *saved], first)
    return Programs(
        _program(joint, joint.inputs[:bound], [node for node in steps if node in first], prepared),
        _program(joint, [*prepared, *joint.inputs[bound:]], middle, [*joint.outputs, *saved]),
        _program(joint, [*saved, *joint.start], late, joint.relevance),
    )


def _keeps(reuse: bool) -> Callable[[fx.Node], bool]:
    return lambda node: node.target is operator.getitem or (reuse and not is_random(node))


def _behind(
    joint: Joint,
    inputs: Iterable[fx.Node],
    takes: Callable[[fx.Node], bool],
) -> set[fx.Node]:
    """The `inputs` and what is made of them alone, among the nodes that `takes` takes."""
    found = set(inputs)
    for node in joint.graph.nodes:
        made = node.op in ("call_function", "get_attr") and found.issuperset(node.all_input_nodes)
        if made and takes(node):
            found.add(node)
    return found


def _read(steps: Iterable[fx.Node], results: Iterable[fx.Node], among: set[fx.Node]) -> list[fx.Node]:
    read = [*(node for step in steps for node in step.all_input_nodes), *results]
    return list(dict.fromkeys(node for node in read if node in among))


def _program(
    joint: Joint, inputs: Sequence[fx.Node], steps: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> Callable[[list[Tensor]], tuple[Tensor, ...]]:
    graph = fx.Graph()
    graph.set_codegen(_BoxedCodeGen())  # takes a list, and empties it, so that each tensor is freed after its last use
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in steps:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    constants = {str(node.target): joint.constants[str(node.target)] for node in steps if node.op == "get_attr"}
    return fx.GraphModule(constants, graph).forward
