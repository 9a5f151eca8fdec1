"""The walk of a net with many layers alike, laid together from pieces that are traced once.

A trace of a whole walk takes as long as the net is deep. But deep nets repeat their layers, and what a rule makes of a
layer depends on the layer, on the form of the messages, and on shapes, not on where in the net it stands. In

    for w in weights:  # 40 of them, all 16 x 16
        x = torch.relu(x @ w)

there are 80 layers and a handful of pieces, such as that of `Epsilon` for a product, whose placeholders are the values
that it reads and the message at its output:

    x, w, z, relu, message                              # relu: where that is off, there is no relevance
    mul = aten.mul.Tensor(relu, message)
    add = aten.add.Tensor(relu, 1e-06)
    div = aten.div.Tensor(mul, add)
    t = aten.t.default(w)
    mm = aten.mm.default(div, t)
    return mm                                           # a multiplier

The walk itself goes as it always does (`_walk.propagate`), but what it hands on from layer to layer are nodes of a
graph in place of tensors, and a step copies the piece into that graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._layers.affine import Affine
from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.graph import Graph
from lrpfunc._layers.layer import Layer
from lrpfunc._lower.retrace import Traced, retrace
from lrpfunc._ops.symbols import OpenGraph, hashable
from lrpfunc._torch import map_arg
from lrpfunc._walk.assign import Assignment
from lrpfunc._walk.forward import relevance, walk
from lrpfunc._walk.propagate import take
from lrpfunc.rules._message import Message, Multiplier, Relevance
from lrpfunc.rules._rule import Combination, Rule

_FEW = 40
"""In nets of fewer layers one trace of all is as fast."""

_FORMS = (Relevance, Multiplier)


class Elsewhere(Exception):
    """A rule reads a value that its layer has nothing to do with."""


class _Values(dict[fx.Node, Any]):
    """Those that a piece is given."""

    def __missing__(self, node: fx.Node) -> Any:
        raise Elsewhere(node.name)


_WHERE = ("name", "modules", "depth", "siblings", "detached")
"""What a layer says of its place in the net. Rules of a user's own may look at it."""


def repeats(graph: Graph) -> bool:
    """Whether it pays to trace each kind of layer once."""
    if len(graph.layers) < _FEW:
        return False
    return 2 * len({_Reads(layer).key for layer in graph.layers}) < len(graph.layers)


def pieced(
    graph: Graph,
    rules: Assignment,
    form: type[Message],
    evaluate: Callable[[BoundLayer], Tensor],
    shared: Sequence[Layer],
    exact: bool,
) -> Traced:
    """The walk as operations: what a trace of all of it would be, but for repeated operations.

    Args:
        graph: The layers.
        rules: Their rules.
        form: The form of the messages that relevance starts with.
        evaluate: How the walk would compute the output of a layer.
        shared: The layers for which it is to be returned as well, after the relevance.
        exact: Whether the walk must have all derivatives.

    Raises:
        Elsewhere: If a rule reads what no piece of its layer is given.
    """
    laid = _Laid(graph, rules, evaluate, set(shared), exact)
    arrived = walk(graph, rules, [form(node) for node in laid.start], laid.step)  # type: ignore[call-arg]
    results = [laid.relevance(node, arrived) for node in graph.requested]
    evaluated = [laid.evaluated.get(layer) or laid.evaluate(layer) for layer in shared]
    laid.graph.output((*results, *evaluated))
    return Traced(laid.graph, laid.constants, laid.stable)


class _Reads:
    """The nodes that a layer's rule may read, and a key: equal for layers that differ in the numbers there alone."""

    def __init__(self, layer: Layer, *others: fx.Node):
        own = [n for node in layer.nodes for n in (*node.all_input_nodes, node)]
        self.nodes = list(dict.fromkeys((*own, *layer.inputs, *filter(None, layer.outputs), *layer.taps, *others)))
        self._places = {node: place for place, node in enumerate(self.nodes)}
        calls = [(n.target, self.local((n.args, n.kwargs)), n.meta["no_grad"], n.meta["autocast"]) for n in layer.nodes]
        facts = [self._fact(getattr(layer, field.name)) for field in fields(layer) if field.name not in _WHERE]
        self.key: Hashable = (tuple(calls), tuple(facts), tuple(_described(n.meta["val"]) for n in self.nodes))

    def local(self, value: Any) -> Any:
        return map_arg(hashable(value), lambda node: ("node", self._places[node]))

    def _fact(self, fact: Any) -> Any:
        if isinstance(fact, Affine):
            return tuple(self._fact(getattr(fact, field.name)) for field in fields(fact))
        return self.local(fact)


def _described(value: Any) -> Hashable:
    return tuple(_kind(leaf) if isinstance(leaf, Tensor) else hashable(leaf) for leaf in tree.leaves(value))


def _kind(tensor: Tensor) -> Hashable:
    strides = hashable(tensor.stride()) if tensor.layout is torch.strided else tensor.layout
    return hashable(tensor.shape), strides, tensor.dtype, tensor.device


@dataclass(frozen=True)
class _Piece:
    """Operations, and the form of each result: that of a message, `Tensor`, or `None` where there is none."""

    traced: Traced
    forms: Sequence[Any]


def _form(message: Message) -> Hashable:
    return type(message), _kind(message.value.meta["val"])  # type: ignore[attr-defined]


class _Laid:
    """The graph that pieces are laid into. Its placeholders are those of a trace of the whole walk."""

    def __init__(
        self,
        graph: Graph,
        rules: Assignment,
        evaluate: Callable[[BoundLayer], Tensor],
        shared: set[Layer],
        exact: bool,
    ):
        self._layers = graph
        self._rules = rules
        self._evaluate = evaluate
        self._shared = shared
        self._exact = exact
        self._pieces: dict[Hashable, _Piece] = {}
        self.graph = OpenGraph()
        self.constants: dict[str, Tensor] = {}
        self.stable = True
        self.evaluated: dict[Layer, fx.Node] = {}
        program = graph.program
        self._given = {node: tree.map(self._placeholder, node.meta["val"]) for node in program.nodes}
        self.start: list[Any] = [self._placeholder(node.meta["val"]) for node in program.outputs]
        self._lifted = [self._placeholder(tensor) for tensor in rules.tensors]

    def _placeholder(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = self.graph.placeholder(f"given_{len(self.graph.nodes)}")
        node.meta["val"] = value
        return node

    # -- steps

    def step(
        self, layer: Layer, rule: Rule, incoming: Sequence[Sequence[Message]], rectified: fx.Node | None
    ) -> Sequence[Message | None]:
        reads = _Reads(layer, *([] if rectified is None else [rectified]))
        shares = layer in self._shared
        came = tuple(tuple(map(_form, group)) for group in incoming)
        chosen = self._rules.chosen[layer]
        rule_key = chosen if isinstance(chosen, int) else repr(chosen)
        place = None if _is_ours(rule) else layer
        key = (rule_key, place, reads.key, reads.local(rectified), came, shares)

        def taken(values: Mapping[fx.Node, Any], messages: Sequence[Sequence[Message]]) -> list[Any]:
            bound = BoundLayer(layer, values, self._exact, None if rectified is None else values[rectified])
            return [*take(bound, rule, messages), *([self._evaluate(bound)] if shares else [])]

        results = self._lay(key, taken, reads.nodes, incoming)
        if shares:
            self.evaluated[layer] = results.pop()
        return results

    def relevance(self, node: fx.Node, arrived: Mapping[fx.Node, Sequence[Message]]) -> fx.Node:
        """The relevance of a node that is asked for."""
        attention = self._layers.fused.get(node)
        place = node if attention is None else attention.layer.output
        reads = [node] if attention is None else _Reads(attention.layer).nodes
        came = arrived.get(place, ())
        key = ("relevance", node if attention else _described(node.meta["val"]), tuple(map(_form, came)))
        (result,) = self._lay(
            key,
            lambda values, messages: [relevance(self._layers, node, self._rules, values, {place: messages[0]})],
            reads,
            [came],
        )
        return result

    def evaluate(self, layer: Layer) -> fx.Node:
        """How the walk would compute the output of a layer that it does not come to."""
        reads = _Reads(layer)
        (result,) = self._lay(
            ("evaluated", reads.key),
            lambda values, _: [self._evaluate(BoundLayer(layer, values, self._exact))],
            reads.nodes,
            [],
        )
        return result

    def _lay(
        self,
        key: Hashable,
        function: Callable[[Mapping[fx.Node, Any], Sequence[Sequence[Message]]], list[Any]],
        reads: Sequence[fx.Node],
        incoming: Sequence[Sequence[Message]],
    ) -> list[Any]:
        """The results of a function of values and messages, whose piece is traced unless it is known."""
        messages = [message for group in incoming for message in group]
        if key not in self._pieces:
            self._pieces[key] = self._traced(function, reads, incoming)
        piece = self._pieces[key]
        given = [leaf for node in reads for leaf in tree.leaves(self._given[node]) if isinstance(leaf, fx.Node)]
        laid = self._copied(piece.traced, [*given, *(message.value for message in messages), *self._lifted])
        return [
            None if form is None else next(laid) if form is Tensor else form(next(laid))  # type: ignore[call-arg]
            for form in piece.forms
        ]

    def _traced(self, function: Any, reads: Sequence[fx.Node], incoming: Sequence[Sequence[Message]]) -> _Piece:
        values, spec = tree.flatten([node.meta["val"] for node in reads])
        places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        forms: list[Any] = []

        def traced(tensors: list[Tensor], start: list[Tensor]) -> list[Tensor]:
            filled = dict(zip(places, tensors, strict=True))
            known = tree.unflatten([filled.get(i, value) for i, value in enumerate(values)], spec)
            rest = iter(start)
            messages = [[type(m)(next(rest)) for m in group] for group in incoming]  # type: ignore[call-arg]
            results = function(_Values(zip(reads, known, strict=True)), messages)
            forms[:] = [None if result is None else type(result) for result in results]
            return [result if isinstance(result, Tensor) else result.value for result in results if result is not None]

        start = [message.value.meta["val"] for group in incoming for message in group]  # type: ignore[attr-defined]
        piece = retrace(traced, [values[place] for place in places], start, self._rules.composite)
        self.stable &= piece.stable
        return _Piece(piece, [Tensor if form not in (None, *_FORMS) else form for form in forms])

    def _copied(self, traced: Traced, given: Sequence[Any]) -> Any:
        copies = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), given, strict=True))
        for node in traced.graph.nodes:
            if node.op in ("call_function", "get_attr"):
                copies[node] = self.graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":
                name = f"constant_{len(self.constants)}"
                copies[node].target, self.constants[name] = name, traced.constants[node.target]
        return iter([copies[node] for node in traced.graph.output_node().args[0]])  # type: ignore[union-attr]


def _is_ours(rule: Rule) -> bool:
    if isinstance(rule, Combination):
        return all(_is_ours(term) for _, term in rule.terms)
    return type(rule).__module__.startswith(f"{Rule.__module__.rpartition('.')[0]}.")
