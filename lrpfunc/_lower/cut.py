"""Where the joint graph is cut: between what is bound and what is not, and where relevance starts.

For `torch.relu(x) @ w` with `ZPlus()` and `Pass()`, after `attribute(...).bind(w)`, the operations fall into

    prepare: w -> w, positive, t, zero                 # once for the bound arguments
        sign = aten.sign.default(w)
        add = aten.add.Tensor(sign, 0.5)
        positive = aten.threshold_backward.default(w, add, 0)
        t = aten.t.default(positive)
        zero = aten.scalar_tensor.default(0)

    forward: w, positive, t, zero, x -> output | output, relu, positive, t, x, zero
        relu = aten.relu.default(x)
        output = aten.matmul.default(relu, w)

    walk: output, relu, positive, t, x, zero, start -> relevance
        mul = aten.mul.Tensor(output, start)
        mm = aten.mm.default(relu, positive)
        ...

What stands behind the bar is saved for the walk. An operation of the walk goes to `prepare` if that has its operands,
and else stays in the walk, though it may not depend on the start, like `mm`: its result would take memory until the
walk comes to it. Only if the walk will be taken several times, `reuse` moves it to the forward pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lrpfunc._lower.joint import Joint
from lrpfunc._lower.memory import reuse_memory
from lrpfunc._ops.call import is_random
from lrpfunc._torch import BoxedCodeGen, aten


@dataclass(frozen=True, eq=False)
class Programs:
    """What a joint graph is cut into. Each takes a list of tensors, and of open sizes, empties it, and returns a tuple.

    Attributes:
        prepare: From the bound inputs to what the forward pass makes of them alone.
        forward: From that and the other inputs to the outputs and what the walk needs.
        walk: From that and the start to relevance, with every derivative.
        frugal: The same without derivatives. It writes into tensors that are no longer needed.
        saved: What the walk is given of the forward pass: a tensor without numbers like each, or the expression of an
            open size.
    """

    prepare: fx.GraphModule
    forward: Callable[[list[Any]], tuple[Tensor, ...]]
    walk: Callable[[list[Any]], tuple[Tensor, ...]]
    frugal: Callable[[list[Any]], tuple[Tensor, ...]]
    saved: list[Any]


def cut(joint: Joint, bound: int, *, reuse: bool, exact: bool) -> Programs:
    """Cuts the graph where the inputs that are not bound begin, and where relevance starts.

    Args:
        joint: The graph.
        bound: How many of the inputs, from the first, are bound.
        reuse: Whether the forward pass also computes what does not depend on the start.
        exact: Whether the walk may be differentiated.
    """
    steps = [node for node in joint.graph.nodes if node.op in ("call_function", "get_attr")]
    first = _behind(joint, joint.inputs[:bound], lambda node: not is_random(node)) if bound else set()
    steps += _clones(joint, first)
    early = _behind(joint, first | joint.early, _keeps(reuse))
    late = [node for node in steps if node not in early]
    saved = _read(late, joint.relevance, early)
    middle = [node for node in steps if node in early and node not in first]
    prepared = _read(middle, [*joint.outputs, *saved], first)
    prepare = _program(joint, joint.inputs[:bound], [node for node in steps if node in first], prepared)
    forward = _program(joint, [*prepared, *joint.inputs[bound:]], middle, [*joint.outputs, *saved])
    walk = _program(joint, [*saved, *joint.start], late, joint.relevance) if exact else None
    reuse_memory(joint, first)
    frugal = _program(joint, [*saved, *joint.start], late, joint.relevance)
    likes = [joint.sizes.get(node, node.meta.get("val")) for node in saved]
    return Programs(prepare, forward.forward, (walk or frugal).forward, frugal.forward, likes)


def _clones(joint: Joint, kept: set[fx.Node]) -> list[fx.Node]:
    """Gives copies of what is kept from call to call in place of it, where it is returned."""
    returned = list(dict.fromkeys(node for node in (*joint.outputs, *joint.relevance) if node in kept))
    clones = {node: joint.graph.call_function(aten.clone.default, (node,)) for node in returned}
    joint.early.update(clones.values())
    joint.outputs = [clones.get(node, node) for node in joint.outputs]
    joint.relevance = [clones.get(node, node) for node in joint.relevance]
    return list(clones.values())


def recompute(joint: Joint, segments: int) -> None:
    """Makes the walk compute the forward pass anew, segment by segment, from what one hands to the next.

    In two segments, `a = f(x); b = g(a); c = h(b); d = k(c)` hands `b` on. That is saved with `x`; where the walk needs
    `a` or `c`, it has `f(x)` or `h(b)` of its own. Random numbers are handed on too: they are drawn once.

    Args:
        joint: The graph.
        segments: Into how many parts the forward pass is divided.
    """
    steps = [node for node in joint.graph.nodes if node in joint.early and node.op == "call_function"]
    size = -(-len(steps) // segments)
    segment = {node: index // size for index, node in enumerate(steps)}
    handed = {n for n in steps if is_random(n) or any(segment.get(user, segment[n]) != segment[n] for user in n.users)}
    copies: dict[fx.Node, fx.Node] = {}

    def anew(node: fx.Node) -> fx.Node:
        if node in handed or node not in segment:
            return node
        if node not in copies:
            copies[node] = joint.graph.node_copy(node, anew)
        return copies[node]

    for node in [node for node in joint.graph.nodes if node.op == "call_function" and node not in joint.early]:
        with joint.graph.inserting_before(node):
            for operand in node.all_input_nodes:
                node.replace_input_with(operand, anew(operand))


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
) -> fx.GraphModule:
    graph = fx.Graph()
    graph.set_codegen(BoxedCodeGen())  # takes a list, and empties it, so that each tensor is freed after its last use
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in steps:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    constants = {str(node.target): joint.constants[str(node.target)] for node in steps if node.op == "get_attr"}
    return fx.GraphModule(constants, graph)
