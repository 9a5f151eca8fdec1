"""A functional program as a list of layers, before any number is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._capture.cache import Cache
from lrpfunc._capture.decompose import written_out
from lrpfunc._capture.program import Program
from lrpfunc._layers.attention import Attention, attentions
from lrpfunc._layers.cover import Cover
from lrpfunc._layers.layer import Kind, Layer
from lrpfunc._torch import nothing

Entry = tuple[str, list[fx.Node | None], Any]
"""A name that `layers=` may ask for, the nodes of the tensors there, and their structure."""


@dataclass(frozen=True, eq=False)
class Graph:
    """The layers between what is explained and the output.

    Attributes:
        program: The whole forward pass.
        sources: The nodes of the explained leaves, `None` for an integer leaf.
        spec: Their structure.
        on_path: The nodes from which relevance may come to what is explained.
        starts: The nodes at which relevance ends its way: those leaves, or the layers explained in their place.
        layers: In order of execution.
        entries: Where `layers=` may ask for relevance; a node is `None` where there is none.
        inner: Where it may inside of attention, by names that no module has.
        fused: The fused attentions, by the nodes that stand for their weights.
        selected: Where it does.
        assigned: Which rule serves which layer, for each composite.
        programs: The forward pass and the walk as flat programs, for each assignment.
        apart: Of which assignments the walk for some samples alone is that for all, or is not.
        balanced: Of which assignments somebody has seen whether relevance explodes, or is lost.
    """

    program: Program
    sources: list[fx.Node | None]
    spec: Any
    on_path: set[fx.Node]
    starts: list[fx.Node]
    layers: list[Layer]
    entries: list[Entry]
    inner: list[Entry]
    fused: dict[fx.Node, Attention]
    selected: Sequence[Entry] = ()
    assigned: Cache[Any] = field(default_factory=lambda: Cache(16))
    programs: Cache[Any] = field(default_factory=lambda: Cache(16))
    apart: Cache[bool] = field(default_factory=lambda: Cache(16))
    balanced: Cache[bool] = field(default_factory=lambda: Cache(16))

    @cached_property
    def requested(self) -> tuple[fx.Node, ...]:
        """The nodes whose relevance is asked for."""
        leaves = [*self.sources, *(leaf for _, leaves, _ in self.selected for leaf in leaves)]
        return tuple(leaf for leaf in leaves if leaf is not None)

    def answer(self, relevance: Sequence[Tensor]) -> Any:
        """What `attribute` returns, from the relevance of the nodes requested."""
        found = iter(relevance)

        def shaped(leaves: list[fx.Node | None], spec: Any) -> Any:
            return tree.unflatten([nothing() if leaf is None else next(found) for leaf in leaves], spec)

        explained = shaped(self.sources, self.spec)
        if not self.selected:
            return explained
        return explained, {name: shaped(leaves, spec) for name, leaves, spec in self.selected}


def build_graph(
    program: Program, data: Sequence[fx.Node], taps: Sequence[fx.Node], sources: list[fx.Node | None], spec: Any
) -> Graph:
    """The layers that depend on `data`, or on parameters that are explained themselves, the `taps`."""
    program, cover, layers, new = _written_out(program, data, taps)
    entries = _entries(program, layers, cover.needed & cover.active)
    found = list(attentions(layers))
    fused = {attention.weights: attention for attention in found if attention.product is not None}
    starts = list(dict.fromkeys(new[node] for node in data))
    sources = [node and new[node] for node in sources]
    return Graph(program, sources, spec, cover.needed, starts, layers, entries, _inner(found), fused)


_Covered = tuple[Program, Cover, list[Layer], dict[fx.Node, Any]]


def _written_out(program: Program, data: Sequence[fx.Node], taps: Sequence[fx.Node]) -> _Covered:
    """The program with what is not linear written out, as long as that makes layers that can be explained.

    An operation of which some piece cannot be explained stays whole, under its own name.
    """
    whole: set[fx.Node] = set()
    while True:
        stuck: set[fx.Node] = set()
        found = _attempt(program, data, taps, whole, stuck)
        if not stuck:
            return found
        whole |= stuck


def _attempt(
    program: Program, data: Sequence[fx.Node], taps: Sequence[fx.Node], whole: set[fx.Node], stuck: set[fx.Node]
) -> _Covered:
    """The same, adding to `stuck` the operations that turn out to have such a piece."""
    new: dict[fx.Node, Any] = {node: node for node in program.graph.nodes}
    copied: dict[fx.Node, fx.Node] = {}  # what a node of a later program was in the first

    def origin(node: fx.Node) -> Any:
        first = node.meta.get("piece_of", (node,))[0]
        return copied.get(first, first)

    while True:
        cover = Cover(program, {new[node] for node in data}, {new[node] for node in taps})
        layers = cover.layers()
        hard = [n for layer in layers if _is_hard(layer) for n in layer.nodes if origin(n) not in whole]
        if not hard:
            return program, cover, layers, new
        program, now = written_out(program, hard)
        stuck.update(origin(node) for node in hard if _is_same(now[node], node))
        if stuck:
            return program, cover, layers, new
        copied.update({copy: origin(node) for node, copy in now.items() if _is_same(copy, node)})
        new = {node: now[value] for node, value in new.items() if isinstance(value, fx.Node) and value in now}


def _is_same(new: Any, node: fx.Node) -> bool:
    return isinstance(new, fx.Node) and new.target is node.target


def _is_hard(layer: Layer) -> bool:
    return layer.kind is Kind.NON_LINEAR and not layer.is_tap


# --------------------------------------------------------------------------------------------------------------
# Where relevance may be asked for


def _entries(program: Program, layers: list[Layer], needed: set[fx.Node]) -> list[Entry]:
    # Inside a merged layer, or an activation of several operations, there is no relevance but at its end.
    ends = {
        node: layer.output
        for layer in layers
        if len(layer.nodes) > 1 and (layer.affine is not None or layer.kind is Kind.ACTIVATION)
        for node in layer.nodes
    }

    def place(node: fx.Node | None) -> fx.Node | None:
        if node is None or node in needed:
            return node
        return ends.get(node)

    if program.modules:
        return [(name, [place(leaf) for leaf in leaves], spec) for name, leaves, spec in program.modules]
    leaf_spec = tree.structure(0)
    return [(layer.name, [layer.output], leaf_spec) for layer in layers if len(layer.outputs) == 1 and not layer.is_tap]


def _inner(found: list[Attention]) -> list[Entry]:
    entries: list[Entry] = []
    names: Counter[str] = Counter()
    for attention in found:
        base = attention.layer.name
        number = f"@{names[base]}" if names[base] else ""  # a module may have several
        names[base] += 1
        entries.append((f"{base}.weights{number}", [attention.weights], tree.structure(0)))
        entries.append((f"{base}.heads{number}", [attention.layer.output], tree.structure(0)))
    return entries
