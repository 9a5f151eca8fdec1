"""The walk: relevance from the output back to the input, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, fx

from lrpfunc._environment import Environment
from lrpfunc._errors import NoPathError, RuleError, UncoveredLayerError, opaque
from lrpfunc._graph import Graph
from lrpfunc._layer import STRUCTURAL, BoundLayer, Kind, Layer
from lrpfunc._message import Message, Multiplier, add
from lrpfunc.composites import Composite, attn_lrp
from lrpfunc.rules import Gradient, Pass, Rule
from lrpfunc.rules._plumbing import default_rule, several

Observer = Callable[[BoundLayer, Rule, dict[fx.Node, Message], tuple[Message | None, ...]], None]


def assign(graph: Graph, composite: Composite) -> dict[Layer, Rule]:
    """The rule of every layer: the composite's, or the exact propagation of what is linear."""
    rules: dict[Layer, Rule] = {}
    uncovered: list[Layer] = []
    objections: list[str] = []
    needed = set(graph.program.outputs)
    for layer in reversed(graph.layers):
        if needed.isdisjoint(layer.outputs):
            continue  # relevance stops before it
        rule = None if layer.kind in STRUCTURAL or layer.is_tap else composite.rule_for(layer)
        if rule is None:
            rule = Gradient() if composite.cotangent or layer.is_tap else default_rule(layer)
        elif reason := _objection(rule, layer):
            objections.append(f"    {layer}\n        {rule!r}: {reason}")
        if rule is None:
            uncovered.append(layer)
        else:
            rules[layer] = rule
        needed.update(layer.inputs if rule is None else rule.receivers(layer), layer.taps)
    uncovered.reverse()
    objections.reverse()
    if objections:
        raise RuleError(
            f"{_counted(len(objections), 'layer')} cannot be served by the rule the composite gives:\n\n"
            + "\n".join(objections)
            + "\n\nNarrow the selector, for example `lrpfunc.name('features*') & lrpfunc.Convolution`"
        )
    if uncovered:
        raise _uncovered(uncovered)
    if custom := Environment(*rules.values(), transformed=True).custom:
        raise opaque(custom[0].__name__)
    softmaxes = [layer for layer in rules if layer.kind not in STRUCTURAL]
    if {layer.kind for layer in softmaxes} == {Kind.SOFTMAX} and needed.isdisjoint({*graph.starts, *graph.sources}):
        raise _stopped_at_once(softmaxes[0])
    return rules


def _objection(rule: Rule, layer: Layer) -> str | None:
    if len(layer.outputs) > 1 and type(rule).pull is Rule.pull:
        return "the operation has several outputs, and the rule has no `pull` for them, as lrpfunc.Gradient() has"
    return rule.objection(layer)


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


def _uncovered(layers: list[Layer]) -> UncoveredLayerError:
    columns = [
        (layer.name, layer.operation, f"{', '.join(map(str, layer.input_shapes))} -> {layer.output_shape}")
        for layer in layers
    ]
    widths = [max(len(row[i]) for row in columns) for i in (0, 1)]
    table = "\n".join(f"    {n:<{widths[0]}}   {o:<{widths[1]}}   {shapes}" for n, o, shapes in columns)
    verb = "is" if len(layers) == 1 else "are"
    return UncoveredLayerError(
        f"{_counted(len(layers), 'layer')} {verb} not linear and no rule covers {'it' if verb == 'is' else 'them'}:\n\n"
        f"{table}\n\nRelevance would be lost or invented there. Add rules in front of yours, for example\n\n"
        f"    rules = {_covering(layers)} + rules"
    )


def _stopped_at_once(softmax: Layer) -> NoPathError:
    return NoPathError(
        f"the output is a softmax\n\n    {softmax}\n\nand the rules stop all relevance there, as those of cp_lrp() do "
        "for attention weights. Explain the logits: return them in place of the softmax, or let relevance through:\n\n"
        "    rules = [(lrp.Softmax, lrp.TaylorSoftmax())] + rules"
    )


def _covering(layers: list[Layer]) -> str:
    """What to put in front of the rules."""
    if all(layer.kind is Kind.ACTIVATION for layer in layers):
        return "[(lrp.Activation, lrp.Pass())]"
    others = dict.fromkeys(layer.operation for layer in layers if attn_lrp().rule_for(layer) is None)
    entries = ", ".join(f"(lrp.operation({name!r}), lrp.Gradient())" for name in others)
    if len(others) == len({layer.operation for layer in layers}):
        return f"[{entries}]"
    return f"[{entries}] + lrp.attn_lrp()" if others else "lrp.attn_lrp()"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
