"""A forward pass that was run, and the walk back from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.graph import Graph
from lrpfunc._layers.layer import Layer
from lrpfunc._walk.assign import Assignment
from lrpfunc._walk.propagate import Observer, Step, propagate, take
from lrpfunc._walk.rows import within_all
from lrpfunc.rules._message import Message, Multiplier, add
from lrpfunc.rules._rule import Rule


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward pass that was run.

    Attributes:
        output: What the model function returned.
        aux: Its auxiliary output.
        pull: From the messages at the tensors of the output to the answer.
        rows: From the messages at some of the samples, and their places, to the answer for them.
        is_random: Whether another run draws other numbers.
    """

    output: Any
    aux: Any
    pull: Callable[[Sequence[Message]], Any]
    rows: Callable[[Sequence[Message], Tensor], Any]
    is_random: bool


def op_by_op(graph: Graph, rules: Assignment, tensors: Sequence[Tensor]) -> Forward:
    """The forward pass and the walk as they are written, one operation and one rule at a time."""
    program = graph.program
    values = program.run(tensors)

    def pull(start: Sequence[Message]) -> Any:
        arrived = walk(graph, rules, start, on_numbers(values))
        return graph.answer([relevance(graph, node, rules, values, arrived) for node in graph.requested])

    output = program.output([values[node] for node in program.outputs])
    aux = program.aux_output([values[node] for node in program.aux])
    return Forward(output, aux, pull, partial(within_all, graph, pull, output), program.is_random)


def walk(graph: Graph, rules: Assignment, start: Sequence[Message], step: Step) -> dict[fx.Node, list[Message]]:
    """The messages that came by each node, from those at the tensors of the output."""
    if rules.composite.cotangent:
        start = [Multiplier(message.value) for message in start]
    return propagate(graph, rules.rules, zip(graph.program.outputs, start, strict=True), step)


def on_numbers(values: Mapping[fx.Node, Any], *, exact: bool = True, observe: Observer | None = None) -> Step:
    """Takes each step on the values of one forward pass."""

    def step(
        layer: Layer, rule: Rule, incoming: Sequence[Sequence[Message]], rectified: fx.Node | None
    ) -> Sequence[Message | None]:
        bound = BoundLayer(layer, values, exact, None if rectified is None else values[rectified])
        return take(bound, rule, incoming, observe)

    return step


def relevance(
    graph: Graph,
    node: fx.Node,
    rules: Assignment,
    values: Mapping[fx.Node, Any],
    arrived: Mapping[fx.Node, Sequence[Message]],
) -> Tensor:
    """The relevance of a node that is asked for; in a cotangent composite, the cotangent there."""
    attention = graph.fused.get(node)
    came = arrived.get(node if attention is None else attention.layer.output, ())
    if attention is None:
        value = values[node]
        message = add(came, value) if came else None
    else:  # the weights are no value of the program, and get what they would get if it were written out
        product = attention.bound(values)
        value = product.inputs[0]
        message = rules.rules[attention.layer].apply(product, [add(came, product.output)])[0] if came else None
    if message is None:
        return value.new_zeros(value.shape)
    form = message.multiplier if rules.composite.cotangent else message.relevance
    return form(value).to(value.dtype)
