"""Where `layers=` asks for relevance."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from lrpfunc._api.options import Globs
from lrpfunc._capture.module import ModelFunction
from lrpfunc._errors import LayerNotFoundError
from lrpfunc._layers.graph import Entry, Graph


def selected(graph: Graph, globs: tuple[str, ...]) -> list[Entry]:
    """The entries that the globs name: those of modules, and what attention has inside where a glob says so."""
    offered = [entry for entry in graph.entries if any(entry[1])]
    for glob in globs:
        found = [name for name, _, _ in offered if fnmatchcase(name, glob)]
        later_calls = glob.endswith("@*")  # of which there may be none
        if not (found or later_calls or any(_asks(glob, name) for name, _, _ in graph.inner)):
            raise not_found(glob, [name for name, _, _ in (*offered, *graph.inner)])
    merged = {layer.nodes[-1] for layer in graph.layers if len(layer.nodes) > 1}
    taken: dict[fx.Node | None, str] = {}
    selected = []
    for name, leaves, spec in offered:
        if not any(fnmatchcase(name, glob) for glob in globs):
            continue
        # A convolution and the batch norm merged into it have one relevance, under the first of their names; the
        # container that ends with them has an entry of its own.
        earlier = taken.setdefault(leaves[0], name)
        if leaves[0] in merged and earlier != name and not earlier.startswith(f"{name}."):
            continue
        selected.append((name, leaves, spec))
    return selected + [entry for entry in graph.inner if any(_asks(glob, entry[0]) for glob in globs)]


def _asks(glob: str, name: str) -> bool:
    """Whether a glob asks for what attention has inside: `*` for every module is not meant to."""
    part = name.rpartition(".")[2].partition("@")[0]
    return part in glob and fnmatchcase(name, glob)


def named(layers: Globs, model_fn: Callable[..., Any]) -> str | tuple[str, ...] | None:
    """What `layers=` was given, with the names of modules in their places."""
    if layers is None or isinstance(layers, str):
        return layers
    given = (layers,) if isinstance(layers, nn.Module) else layers
    globs = [(layer,) if isinstance(layer, str) else _calls(layer, model_fn) for layer in given]
    return tuple(glob for group in globs for glob in group)


def _calls(module: nn.Module, model_fn: Callable[..., Any]) -> tuple[str, str]:
    """The globs for the first call of a module, and for later ones."""
    known = model_fn.module.named_modules() if isinstance(model_fn, ModelFunction) else ()
    name = next((name for name, child in known if child is module and name), None)
    if name is None:
        raise LayerNotFoundError(
            f"layers= was given a {type(module).__name__} that is no submodule of what the model function was made of. "
            "Pass modules of the one that from_module was called with, or names"
        )
    return name, f"{name}@*"


def not_found(glob: str, names: list[str]) -> LayerNotFoundError:
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return LayerNotFoundError(
        f"layers={glob!r} matches no layer that depends on the explained input. The names are {shown or 'none'}. A "
        "glob matches whole names: write '*conv1' for 'layer1.0.conv1'"
    )
