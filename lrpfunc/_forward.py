"""A forward pass that was run, and the walk back from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lrpfunc._call import Call
from lrpfunc._layer import Layer
from lrpfunc._message import Message, Multiplier
from lrpfunc._propagate import Observer, assign, propagate
from lrpfunc.rules import Rule


@dataclass(eq=False)
class Forward:
    """A forward pass that was run.

    Attributes:
        outputs: The tensors of the output.
        aux: Those of the auxiliary output.
        pull: From the messages at the outputs to the relevance of the nodes that the call requests.
    """

    outputs: list[Tensor]
    aux: list[Tensor]
    pull: Callable[[Sequence[Message]], list[Tensor]]


def op_by_op(call: Call) -> Forward:
    """The forward pass and the walk as they are written, one operation and one rule at a time."""
    rules = assign(call.graph, call.composite)
    values = call.program.run(call.arguments, call.closed)

    def pull(start: Sequence[Message]) -> list[Tensor]:
        return relevance(call, walk(call, rules, values, start), values)

    return Forward([values[n] for n in call.program.outputs], [values[n] for n in call.program.aux], pull)


def walk(
    call: Call,
    rules: Mapping[Layer, Rule],
    values: Mapping[fx.Node, Any],
    start: Sequence[Message],
    *,
    exact: bool = True,
    observe: Observer | None = None,
) -> dict[fx.Node, Message]:
    """The message at every node, from those at the tensors of the output."""
    if call.composite.cotangent:
        start = [Multiplier(message.value) for message in start]
    return propagate(call.graph, rules, values, zip(call.program.outputs, start, strict=True), exact, observe)


def relevance(call: Call, arrived: Mapping[fx.Node, Message], values: Mapping[fx.Node, Any]) -> list[Tensor]:
    """The relevance of the nodes that the call requests; in a cotangent composite, the cotangent there."""
    results = []
    for node in call.requested:
        value, message = values[node], arrived.get(node)
        if message is None:
            results.append(value.new_zeros(value.shape))
        else:
            form = message.multiplier if call.composite.cotangent else message.relevance
            results.append(form(value).to(value.dtype))
    return results
