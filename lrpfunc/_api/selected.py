"""Where `layers=` asks for relevance."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import fx

from lrpfunc._capture.program import Program
from lrpfunc._errors import LayerNotFoundError
from lrpfunc._layers.graph import Graph


def named_nodes(program: Program, globs: tuple[str, ...], integers: list[fx.Node]) -> list[fx.Node]:
    """Where explaining starts when the input is made of integers: the outputs of the modules that were named."""
    named = [leaf for name, leaves, _ in program.modules if matches(name, globs) for leaf in leaves if leaf is not None]
    behind = set(integers)
    for node in program.graph.nodes:
        if any(n in behind for n in node.all_input_nodes):
            behind.add(node)
    found = [node for node in named if node in behind]
    if not found:
        raise not_found(globs, [name for name, _, _ in program.modules])
    return found


def matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def selected(graph: Graph, globs: tuple[str, ...]) -> list[tuple[str, list[fx.Node | None], Any]]:
    offered = [(name, leaves, spec) for name, leaves, spec in graph.entries if any(leaves)]
    for glob in globs:
        if glob.endswith("@*"):  # later calls, of which there may be none
            continue
        if not any(fnmatchcase(name, glob) for name, _, _ in offered):
            raise not_found((glob,), [name for name, _, _ in offered])
    merged = {layer.nodes[-1] for layer in graph.layers if len(layer.nodes) > 1}
    taken: dict[fx.Node | None, str] = {}
    selected = []
    for name, leaves, spec in offered:
        if not matches(name, globs):
            continue
        # A convolution and the batch norm merged into it have one relevance, under the first of their names; the
        # container that ends with them has an entry of its own.
        earlier = taken.setdefault(leaves[0], name)
        if leaves[0] in merged and earlier != name and not earlier.startswith(f"{name}."):
            continue
        selected.append((name, leaves, spec))
    return selected


def not_found(globs: tuple[str, ...], names: list[str]) -> LayerNotFoundError:
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return LayerNotFoundError(
        f"layers={globs[0] if len(globs) == 1 else list(globs)!r} matches no layer that depends on the explained "
        f"input. The names are {shown or 'none'}. A glob matches whole names: write '*conv1' for 'layer1.0.conv1'"
    )
