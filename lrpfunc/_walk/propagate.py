"""The walk: relevance from the output back to the input, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, fx

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.graph import Graph
from lrpfunc._layers.layer import Layer
from lrpfunc.rules._message import Message, Multiplier, add
from lrpfunc.rules._plumbing import several
from lrpfunc.rules._rule import Rule
from lrpfunc.rules.elementwise import Pass
from lrpfunc.rules.generic import Gradient

Observer = Callable[[BoundLayer, Rule, dict[fx.Node, Message], tuple[Message | None, ...]], None]


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

    def collect(nodes: Iterable[fx.Node | None]) -> dict[fx.Node, Message]:
        met = {n: add((m for m, _ in arriving[n]), values[n]) for n in nodes if n in arriving}
        arrived.update(met)
        return met

    for node, message in start:
        arriving.setdefault(node, []).append((message, None))
    for layer in reversed(graph.layers):
        messages = collect(layer.outputs)
        if not messages:
            continue
        bound = BoundLayer(layer, values, exact, _rectified(layer, arriving, rules, values))
        if len(layer.outputs) == 1:
            results = rules[layer].apply(bound, messages[layer.output])
        else:
            results = several(bound, rules[layer], messages)
        if observe is not None:
            observe(bound, rules[layer], messages, results)
        # A parameter that is explained taps the layer: it takes nothing from what goes on to the inputs.
        for node, message in (*zip(layer.inputs, results, strict=True), *_tapped(bound, messages)):
            if message is not None:
                arriving.setdefault(node, []).append((message, layer))
    collect([node for node in arriving if node not in arrived])
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


def _tapped(layer: BoundLayer, messages: dict[fx.Node, Message]) -> list[tuple[fx.Node, Message]]:
    taps = layer.layer.taps
    if not taps:
        return []
    cotangents = [_multiplier(layer, node, messages) for node in layer.layer.outputs if node is not None]
    return [(n, Multiplier(m)) for n, m in zip(taps, layer.vjp(*cotangents, wrt=taps), strict=True)]


def _multiplier(layer: BoundLayer, node: fx.Node, messages: dict[fx.Node, Message]) -> Tensor:
    value = layer.values[node]
    return messages[node].multiplier(value) if node in messages else value.new_zeros(value.shape)


# --------------------------------------------------------------------------------------------------------------
# Errors
