"""A forward pass that was run, and the walk back from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lrpfunc._layers.attention import Attention
from lrpfunc._layers.graph import Graph
from lrpfunc._walk.assign import Assignment
from lrpfunc._walk.propagate import Observer, propagate
from lrpfunc.rules._message import Message, Multiplier


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward pass that was run.

    Attributes:
        output: What the model function returned.
        aux: Its auxiliary output.
        pull: From the messages at the tensors of the output to the answer.
        is_random: Whether another run draws other numbers.
    """

    output: Any
    aux: Any
    pull: Callable[[Sequence[Message]], Any]
    is_random: bool


def op_by_op(graph: Graph, rules: Assignment, tensors: Sequence[Tensor]) -> Forward:
    """The forward pass and the walk as they are written, one operation and one rule at a time."""
    program = graph.program
    values = program.run(tensors)

    def pull(start: Sequence[Message]) -> Any:
        return graph.answer(relevance(graph, rules, values, walk(graph, rules, values, start)))

    output = program.output([values[node] for node in program.outputs])
    aux = program.aux_output([values[node] for node in program.aux])
    return Forward(output, aux, pull, program.is_random)


def walk(
    graph: Graph,
    rules: Assignment,
    values: Mapping[fx.Node, Any],
    start: Sequence[Message],
    *,
    exact: bool = True,
    observe: Observer | None = None,
) -> dict[fx.Node, Message]:
    """The message at every node, from those at the tensors of the output."""
    if rules.composite.cotangent:
        start = [Multiplier(message.value) for message in start]
    return propagate(graph, rules.rules, values, zip(graph.program.outputs, start, strict=True), exact, observe)


def relevance(
    graph: Graph, rules: Assignment, values: Mapping[fx.Node, Any], arrived: Mapping[fx.Node, Message]
) -> list[Tensor]:
    """The relevance of the nodes that are asked for; in a cotangent composite, the cotangent there."""
    results = []
    for node in graph.requested:
        if node in graph.fused:
            value, message = _weights(graph.fused[node], rules, values, arrived)
        else:
            value, message = values[node], arrived.get(node)
        if message is None:
            results.append(value.new_zeros(value.shape))
        else:
            form = message.multiplier if rules.composite.cotangent else message.relevance
            results.append(form(value).to(value.dtype))
    return results


def _weights(
    attention: Attention, rules: Assignment, values: Mapping[fx.Node, Any], arrived: Mapping[fx.Node, Message]
) -> tuple[Tensor, Message | None]:
    """The weights of fused attention, and the message that they would get if it were written out."""
    layer = attention.bound(values)
    message = arrived.get(attention.layer.output)
    if message is None:
        return layer.inputs[0], None
    return layer.inputs[0], rules.rules[attention.layer].apply(layer, [message])[0]
