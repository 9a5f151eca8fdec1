"""One call of a model function, captured: its graph, and the tensors it is called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from lrpfunc._arguments import Argnums, Explained, path_name
from lrpfunc._capture import Cache, Trace, capture
from lrpfunc._errors import CaptureError, InputError, LayerNotFoundError, NoPathError
from lrpfunc._graph import Graph, build_graph
from lrpfunc._layer import Layer
from lrpfunc._operations import is_random
from lrpfunc._simplify import Program, functional
from lrpfunc.composites import Composite

Globs = str | Sequence[str] | None


class _Built:
    """A captured program, and the graphs built on it, one for each choice of what is explained."""

    def __init__(self, trace: Trace):
        self.program = functional(trace)
        self.graphs: Cache[Graph] = Cache(16)


_cache: Cache[_Built] = Cache(128)


@dataclass(eq=False)
class Call:
    """A model function, the rules to explain it by, and the tensors of one call.

    Attributes:
        arguments: The tensors among the arguments.
        closed: The tensors that the function closes over.
        explained: The nodes of what is explained and its structure; `None` for an integer.
        selected: What `layers=` asked for: name, nodes and the structure of the module's output.
    """

    graph: Graph
    composite: Composite
    arguments: list[Tensor]
    closed: list[Tensor]
    explained: tuple[list[fx.Node | None], Any]
    selected: list[tuple[str, list[fx.Node | None], Any]]

    @property
    def program(self) -> Program:
        return self.graph.program

    def output(self, tensors: Sequence[Tensor]) -> Any:
        return _rebuild(tensors, *self.program.output_spec)

    def aux(self, tensors: Sequence[Tensor]) -> Any:
        return _rebuild(tensors, *self.program.aux_spec)

    @property
    def requested(self) -> tuple[fx.Node, ...]:
        """The nodes whose relevance is asked for."""
        leaves = [*self.explained[0], *(leaf for _, leaves, _ in self.selected for leaf in leaves)]
        return tuple(leaf for leaf in leaves if leaf is not None)

    def answer(self, relevance: Sequence[Tensor]) -> Any:
        """What `attribute` returns, from the relevance of the nodes requested."""
        found = iter(relevance)

        def shaped(leaves: list[fx.Node | None], spec: Any) -> Any:
            return pytree.tree_unflatten([None if leaf is None else next(found) for leaf in leaves], spec)

        explained = shaped(*self.explained)
        if not self.selected:
            return explained
        return explained, {name: shaped(leaves, spec) for name, leaves, spec in self.selected}


def _rebuild(tensors: Sequence[Tensor], leaves: list[Any], spec: Any) -> Any:
    found = iter(tensors)
    return pytree.tree_unflatten([next(found) if leaf is None else leaf[0] for leaf in leaves], spec)


def capture_call(
    model_fn: Callable[..., Any],
    composite: Composite,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    argnums: Argnums,
    has_aux: bool,
    layers: Globs,
    inline_functions: bool,
) -> Call:
    """Captures the model function, unless it has been, and finds what is explained in it."""
    globs = (layers,) if isinstance(layers, str) else tuple(layers or ())
    explained = Explained(args, argnums, bool(globs))
    built, leaves, closed = capture(
        model_fn, args, kwargs, has_aux=has_aux, inline=inline_functions, build=_Built, cache=_cache
    )
    key = (*map(tuple, (explained.positions, explained.integers, explained.parameters)), explained.others, globs)
    graph = built.graphs.get(key)
    if graph is None:
        _name_inputs(built.program, args)
        graph = _build_graph(built.program, explained, globs)
        built.graphs.put(key, graph)
    return Call(graph, composite, leaves, closed, (graph.sources, explained.spec), _selected(graph, globs))


def _name_inputs(program: Program, args: tuple[Any, ...]) -> None:
    """Writes the path of each parameter on its placeholder, for layers that have no module."""
    if args:
        paths = pytree.tree_flatten_with_path(args[0])[0]
        tensors = [(path_name(path), leaf) for path, leaf in paths if isinstance(leaf, Tensor)]
        for node, (path, _) in zip(program.inputs, tensors, strict=False):
            node.meta["path"] = path or None


def _build_graph(program: Program, explained: Explained, globs: tuple[str, ...]) -> Graph:
    _check_output(program)
    sources = [None if place is None else program.inputs[place] for place in explained.positions]
    taps = [n for n, is_tap in zip([s for s in sources if s], explained.parameters, strict=True) if is_tap]
    data = [n for n in sources if n is not None and n not in taps]
    if taps and not data:
        data = [program.inputs[place] for place in explained.others]
    if explained.integers:
        data += _named_nodes(program, globs, [program.inputs[place] for place in explained.integers])
    graph = build_graph(program, data, taps, sources)
    if misread := [layer for layer in graph.layers if _takes_as_input(layer)]:
        raise InputError(
            "argument 0 is taken to be parameters, because another argument has floating-point tensors, but the layer"
            f"\n\n    {misread[0]}\n\ntakes it as its input. Parameters come first: for a function of several inputs "
            "without parameters write\n\n"
            "    lrpfunc.attribute(lambda _, x, y: f(x, y), rules, argnums=(1, 2))(None, x, y)"
        )
    if random := [layer for layer in graph.layers if any(map(is_random, layer.nodes))]:
        raise CaptureError(
            f"the layer\n\n    {random[0]}\n\ndraws random numbers inside, so that relevance would belong to another "
            "draw than the output. Call module.eval(), or write its dropout with torch.nn.functional.dropout"
        )
    if not any(node in graph.on_path for node in (*data, *taps)):
        raise NoPathError(
            "the output does not depend on what should be explained, or only through operations that stop "
            "derivatives (detach, no_grad, comparisons, rounding). Check argnums, and that the model function does not "
            "detach its input"
        )
    return graph


def _takes_as_input(layer: Layer) -> bool:
    """Whether explained parameters stand where a layer expects data, beside a weight of its own."""
    node = layer.nodes[0]
    has_weight = layer.operation == "linear" or layer.operation.startswith("conv")
    return layer.is_tap and has_weight and node.args[0] in layer.inputs


def _check_output(program: Program) -> None:
    for leaf in program.output_spec[0]:
        if leaf is not None and leaf[0] is not None:
            raise InputError(
                f"the output is {type(leaf[0]).__name__}, or has one, where relevance cannot start: it starts at "
                "tensors, in containers that torch's pytree knows. Pick them, for example\n\n"
                "    model_fn, params = lrpfunc.from_module(module, output=lambda out: out.logits)"
            )
    for node in program.outputs:
        value = node.meta["val"]
        if not value.is_floating_point():
            raise InputError(
                f"the output has a tensor of {value.dtype} and shape {tuple(value.shape)}, where relevance, a "
                "floating-point number, cannot start. Return the scores before argmax or a comparison, and other "
                "results as aux, with has_aux=True"
            )


def _named_nodes(program: Program, globs: tuple[str, ...], integers: list[fx.Node]) -> list[fx.Node]:
    """Where explaining starts when the input is made of integers: the outputs of the modules that were named."""
    named = [
        leaf for name, leaves, _ in program.modules if _matches(name, globs) for leaf in leaves if leaf is not None
    ]
    behind = set(integers)
    for node in program.graph.nodes:
        if any(n in behind for n in node.all_input_nodes):
            behind.add(node)
    found = [node for node in named if node in behind]
    if not found:
        raise _not_found(globs, [name for name, _, _ in program.modules])
    return found


# --------------------------------------------------------------------------------------------------------------
# layers=


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _selected(graph: Graph, globs: tuple[str, ...]) -> list[tuple[str, list[fx.Node | None], Any]]:
    offered = [(name, leaves, spec) for name, leaves, spec in graph.entries if any(leaves)]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name, _, _ in offered):
            raise _not_found((glob,), [name for name, _, _ in offered])
    merged = {layer.nodes[-1] for layer in graph.layers if len(layer.nodes) > 1}
    taken: dict[fx.Node | None, str] = {}
    selected = []
    for name, leaves, spec in offered:
        if not _matches(name, globs):
            continue
        # A convolution and the batch norm merged into it have one relevance, under the first of their names; the
        # container that ends with them has an entry of its own.
        earlier = taken.setdefault(leaves[0], name)
        if leaves[0] in merged and earlier != name and not earlier.startswith(f"{name}."):
            continue
        selected.append((name, leaves, spec))
    return selected


def _not_found(globs: tuple[str, ...], names: list[str]) -> LayerNotFoundError:
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return LayerNotFoundError(
        f"layers={globs[0] if len(globs) == 1 else list(globs)!r} matches no layer that depends on the explained "
        f"input. The names are {shown or 'none'}. A glob matches whole names: write '*conv1' for 'layer1.0.conv1'"
    )
