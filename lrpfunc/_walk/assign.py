"""Which rule serves which layer."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._capture.cache import Cache
from lrpfunc._capture.environment import Environment
from lrpfunc._capture.isolation import isolated
from lrpfunc._capture.watch import Watch
from lrpfunc._errors import (
    NoPathError,
    RelevanceWarning,
    RuleError,
    UncoveredLayerError,
    UnusedRuleWarning,
    opaque,
    warn,
)
from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.graph import Graph
from lrpfunc._layers.layer import STRUCTURAL, Kind, Layer
from lrpfunc._layers.select import names_something
from lrpfunc.composites import Composite, attn_lrp
from lrpfunc.rules._plumbing import default_rule
from lrpfunc.rules._rule import Rule
from lrpfunc.rules.generic import Gradient


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which rule serves which layer.

    Attributes:
        composite: Where the rules come from.
        chosen: Of each layer that relevance comes to, the place of its entry, or the rule of a layer without one.
        key: Equal for two composites that differ in the numbers inside tensors at most.
        tensors: Those tensors.
        stable: Whether it may be used again: not if a selector read a number inside a tensor.
    """

    composite: Composite
    chosen: Mapping[Layer, int | Rule]
    key: Hashable
    tensors: list[Tensor]
    stable: bool

    @cached_property
    def rules(self) -> dict[Layer, Rule]:
        entries = self.composite.entries
        return {layer: entries[c][1] if isinstance(c, int) else c for layer, c in self.chosen.items()}


def assign(graph: Graph, composite: Composite) -> Assignment:
    """The rule of every layer: the composite's, or the exact propagation of what is linear."""
    reads = Environment(composite, transformed=True)
    chosen = graph.assigned.get(reads.key)
    watch = Watch()
    if chosen is None:
        with watch:
            chosen = _chosen(graph, composite)
            _warn_of_unused(graph, composite, chosen)
            _warn_of_probabilities(graph, composite, chosen)
        if not watch.reads:
            graph.assigned.put(reads.key, chosen)
    return Assignment(composite, chosen, reads.key, reads.tensors, stable=not watch.reads)


def _chosen(graph: Graph, composite: Composite) -> dict[Layer, int | Rule]:
    chosen: dict[Layer, int | Rule] = {}
    rules: dict[Layer, Rule] = {}
    uncovered: list[Layer] = []
    objections: list[str] = []
    needed = set(graph.program.outputs)
    for layer in reversed(graph.layers):
        if needed.isdisjoint(layer.outputs):
            continue  # relevance stops before it
        hidden = layer.kind in STRUCTURAL or layer.is_tap
        rule = None if hidden else composite.rule_for(layer)
        place = None if rule is None else composite.place_for(layer)
        if rule is None:
            rule = Gradient() if composite.cotangent or layer.is_tap else default_rule(layer)
        elif reason := _objection(rule, layer):
            shown = rule if place is None else tree.named(composite, "rules")[place]
            objections.append(f"    {layer}\n        {shown!r}: {reason}")
        if rule is None:
            uncovered.append(layer)
        else:
            rules[layer] = rule
            chosen[layer] = rule if place is None else place
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
        raise _uncovered(uncovered, graph.program.outputs)
    if custom := Environment(*rules.values(), transformed=True).custom:
        raise opaque(custom[0].__name__)
    softmaxes = [layer for layer in rules if layer.kind not in STRUCTURAL]
    if {layer.kind for layer in softmaxes} == {Kind.SOFTMAX} and needed.isdisjoint({*graph.starts, *graph.sources}):
        raise _stopped_at_once(softmaxes[0])
    return chosen


_warned: Cache[bool] = Cache(1024)


def _warn_of_unused(graph: Graph, composite: Composite, chosen: Mapping[Layer, int | Rule]) -> None:
    """Warns of each entry that somebody wrote for this net, and that does nothing in it.

    An entry for all layers of a kind may be meant for many nets, of which this one has no such layer.
    """
    used = {place for place in chosen.values() if isinstance(place, int)}
    layers = [layer for layer in graph.layers if layer.kind not in STRUCTURAL and not layer.is_tap]
    for place, selector in enumerate(composite.selectors):
        if place in used or composite.is_general(place):
            continue
        taken = [layer for layer in layers if selector(layer)]
        earlier = sorted({i for layer in taken if isinstance(i := chosen.get(layer), int)})
        if earlier and all(map(composite.is_general, earlier)):
            shown = ", ".join(f"rules[{i}]" for i in earlier)
            why = f"{shown} before it takes what it selects. The first entry that matches decides: put yours in front"
        elif not taken and names_something(selector):
            names = list(dict.fromkeys(layer.name for layer in layers))
            why = f"its selector matches none of the layers {', '.join(names[:12])}{', ...' if names[12:] else ''}"
        else:
            continue
        text = f"rules[{place}] serves no layer: {why}\n\n    ({selector!r}, {tree.named(composite, 'rules')[place]!r})"
        _warn_once(text, UnusedRuleWarning)


def _warn_of_probabilities(graph: Graph, composite: Composite, chosen: Mapping[Layer, int | Rule]) -> None:
    """Warns where relevance starts at a softmax: it says how sure the model is as well, and often little else."""
    last = _softmax_at_the_end(chosen, graph.program.outputs)
    if last is not None and not composite.cotangent:
        text = f"relevance starts at a softmax\n\n    {last}\n\n{_logits_instead(last)}"
        _warn_once(text, RelevanceWarning)


def _warn_once(text: str, category: type[Warning]) -> None:
    if _warned.get(text) is None:
        _warned.put(text, True)
        warn(text, category)


def _softmax_at_the_end(layers: Iterable[Layer], outputs: Sequence[fx.Node]) -> Layer | None:
    return next((layer for layer in layers if layer.kind is Kind.SOFTMAX and layer.output in outputs), None)


def _logits_instead(last: Layer) -> str:
    return (
        "Explain its logits instead, which say what speaks for a class and not only how sure the model is. Let the "
        "model function return them:\n\n"
        f"    return logits  # not logits.{last.operation}(-1)"
    )


def _objection(rule: Rule, layer: Layer) -> str | None:
    count = sum(node is not None for node in layer.outputs)
    if count > 1 and not rule.several_outputs:
        return (
            f"relevance comes to {count} outputs of this operation, and the rule takes a message of one. Of the rules "
            "that serve several, lrpfunc.Gradient() serves any operation; a rule of your own says "
            "`several_outputs = True` and takes `propagate(layer, *messages)`"
        )
    return rule.objection(layer)


def _uncovered(layers: list[Layer], outputs: Sequence[fx.Node]) -> UncoveredLayerError:
    columns = [
        (layer.name, layer.operation, f"{', '.join(map(str, layer.input_shapes))} -> {layer.output_shape}")
        for layer in layers
    ]
    widths = [max(len(row[i]) for row in columns) for i in (0, 1)]
    table = "\n".join(f"    {n:<{widths[0]}}   {o:<{widths[1]}}   {shapes}" for n, o, shapes in columns)
    verb = "is" if len(layers) == 1 else "are"
    last = _softmax_at_the_end(layers, outputs)
    instead = f"\n\nThe last, {last.name}, is the output. {_logits_instead(last)}" if last else ""
    return UncoveredLayerError(
        f"{_counted(len(layers), 'layer')} {verb} not linear and no rule covers {'it' if verb == 'is' else 'them'}:\n\n"
        f"{table}\n\nRelevance would be lost or invented there. Add rules in front of yours, for example\n\n"
        f"    rules = {_covering(layers)} + rules" + instead
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
    others = [layer for layer in layers if attn_lrp().rule_for(layer) is None]
    entries = ", ".join(dict.fromkeys(f"({_selector(layer, layers)}, lrp.{_serving(layer)}())" for layer in others))
    if len({layer.operation for layer in others}) == len({layer.operation for layer in layers}):
        return f"[{entries}]"
    return f"[{entries}] + lrp.attn_lrp()" if others else "lrp.attn_lrp()"


def _selector(layer: Layer, uncovered: list[Layer]) -> str:
    """One for the layers like this that no rule covers, and no other."""
    alike = [other for other in layer.siblings if other.operation == layer.operation and other.kind not in STRUCTURAL]
    if all(other in uncovered for other in alike):
        return f"lrp.operation({layer.operation!r})"
    return f"lambda layer: (layer.kind, layer.operation) == ({str(layer.kind)!r}, {layer.operation!r})"


def _serving(layer: Layer) -> str:
    """`Gradient` where the operation has one, and `Stop`, which holds it constant."""
    seen = {node: node.meta["val"] for inner in layer.nodes for node in inner.all_input_nodes}
    cotangents = [node.meta["val"] for node in layer.outputs if node is not None]
    try:
        isolated(lambda: BoundLayer(layer, seen).vjp(*cotangents))
    except Exception:  # whatever kind of error an operation of somebody else's has for that
        return "Stop"
    return "Gradient"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
