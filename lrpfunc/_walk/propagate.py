"""The walk: relevance from the output back to the input, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import fx

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.graph import Graph
from lrpfunc._layers.layer import Layer
from lrpfunc.rules._message import Message, Multiplier, add, in_form
from lrpfunc.rules._rule import Rule
from lrpfunc.rules.elementwise import Pass
from lrpfunc.rules.generic import Gradient

Step = Callable[[Layer, Rule, Sequence[Sequence[Message]], fx.Node | None], Sequence[Message | None]]
"""From the messages that came to each output of a layer to one for each of its inputs and taps.

Told, too, of the node whose value is 0 wherever relevance is: the output of the ReLU that alone sent it.
"""

Observer = Callable[[BoundLayer, Rule, Sequence[Message | None], Sequence[Message | None]], None]
"""Told of each layer, its rule, the messages that came to its outputs and those that go on to its inputs."""


def propagate(
    graph: Graph, rules: Mapping[Layer, Rule], start: Iterable[tuple[fx.Node, Message]], step: Step
) -> dict[fx.Node, list[Message]]:
    """Walks back from the messages at the outputs; gives the messages that came by each node."""
    arriving: dict[fx.Node, list[tuple[Message, Layer | None]]] = {}
    for node, message in start:
        arriving.setdefault(node, []).append((message, None))
    for layer in reversed(graph.layers):
        incoming = [_messages(arriving, node) for node in layer.outputs if node is not None]
        if not any(incoming):
            continue
        results = step(layer, rules[layer], incoming, _rectified(layer, arriving, rules))
        for node, message in zip((*layer.inputs, *layer.taps), results, strict=True):
            if message is not None:
                arriving.setdefault(node, []).append((message, layer))
    return {node: _messages(arriving, node) for node in arriving}


def _messages(arriving: Mapping[fx.Node, list[tuple[Message, Layer | None]]], node: fx.Node) -> list[Message]:
    return [message for message, _ in arriving.get(node, ())]


def _rectified(
    layer: Layer, arriving: Mapping[fx.Node, list[tuple[Message, Layer | None]]], rules: Mapping[Layer, Rule]
) -> fx.Node | None:
    """The output of the ReLU that alone sent a message, if that is 0 wherever the ReLU is off."""
    if len(layer.outputs) != 1 or len(arriving[layer.output]) != 1:
        return None
    ((message, sender),) = arriving[layer.output]
    if sender is None or sender.operation != "relu" or not isinstance(message, Multiplier):
        return None
    return sender.output if isinstance(rules[sender], (Pass, Gradient)) else None


def take(
    layer: BoundLayer, rule: Rule, incoming: Sequence[Sequence[Message]], observe: Observer | None = None
) -> list[Message | None]:
    """A step, on numbers."""
    messages = [add(came, y) if came else None for came, y in zip(incoming, layer.outputs, strict=True)]
    results = rule.apply(layer, messages)
    if observe is not None:
        observe(layer, rule, messages, results)
    # A parameter that is explained taps the layer: it takes nothing from what goes on to the inputs.
    return [*results, *_tapped(layer, messages)]


def _tapped(layer: BoundLayer, messages: Sequence[Message | None]) -> list[Message]:
    taps = layer.layer.taps
    if not taps:
        return []
    cotangents = [message.value for message in in_form(messages, layer.outputs, "multiplier")]
    return [Multiplier(m) for m in layer.vjp(*cotangents, wrt=taps)]
