"""The walk: relevance from the output back to the input, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.graph import Graph
from lrpfunc._layers.layer import Layer
from lrpfunc.rules._message import Message, Multiplier, add, in_form
from lrpfunc.rules._rule import Rule
from lrpfunc.rules.elementwise import Pass
from lrpfunc.rules.generic import Gradient

Observer = Callable[[BoundLayer, Rule, Sequence[Message | None], Sequence[Message | None]], None]
"""Told of each layer, its rule, the messages that came to its outputs and those that go on to its inputs."""


def propagate(
    graph: Graph,
    rules: Mapping[Layer, Rule],
    values: Mapping[fx.Node, Any],
    start: Iterable[tuple[fx.Node, Message]],
    exact: bool,
    observe: Observer | None = None,
) -> dict[fx.Node, Message]:
    """Walks back from the messages at the outputs; gives the message at every node it came by."""
    arriving: dict[fx.Node, list[tuple[Message, Layer | None]]] = {}
    arrived: dict[fx.Node, Message] = {}

    def collect(node: fx.Node) -> Message | None:
        if node in arriving:
            arrived[node] = add((message for message, _ in arriving[node]), values[node])
        return arrived.get(node)

    for node, message in start:
        arriving.setdefault(node, []).append((message, None))
    for layer in reversed(graph.layers):
        messages = [collect(node) for node in layer.outputs if node is not None]
        if not any(messages):
            continue
        bound = BoundLayer(layer, values, exact, _rectified(layer, arriving, rules, values))
        results = rules[layer].apply(bound, messages)
        if observe is not None:
            observe(bound, rules[layer], messages, results)
        # A parameter that is explained taps the layer: it takes nothing from what goes on to the inputs.
        for node, message in (*zip(layer.inputs, results, strict=True), *_tapped(bound, messages)):
            if message is not None:
                arriving.setdefault(node, []).append((message, layer))
    for node in [node for node in arriving if node not in arrived]:
        collect(node)
    return arrived


def _rectified(
    layer: Layer,
    arriving: Mapping[fx.Node, list[tuple[Message, Layer | None]]],
    rules: Mapping[Layer, Rule],
    values: Mapping[fx.Node, Any],
) -> Tensor | None:
    """The output of the ReLU that alone sent a message, if that is 0 wherever the ReLU is off."""
    if len(layer.outputs) != 1 or len(arriving[layer.output]) != 1:
        return None
    ((message, sender),) = arriving[layer.output]
    if sender is None or sender.operation != "relu" or not isinstance(message, Multiplier):
        return None
    return values[sender.output] if isinstance(rules[sender], (Pass, Gradient)) else None


def _tapped(layer: BoundLayer, messages: Sequence[Message | None]) -> list[tuple[fx.Node, Message]]:
    taps = layer.layer.taps
    if not taps:
        return []
    cotangents = [message.value for message in in_form(messages, layer.outputs, "multiplier")]
    return [(n, Multiplier(m)) for n, m in zip(taps, layer.vjp(*cotangents, wrt=taps), strict=True)]
