"""Pytrees: the only importer of a pytree library.

Arguments and outputs are flattened by torch's registry, which is what `make_fx` and `torch.func` see.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch.utils._pytree import key_get, keystr
from torch.utils._pytree import tree_flatten as flatten
from torch.utils._pytree import tree_flatten_with_path as flatten_with_path
from torch.utils._pytree import tree_leaves as leaves
from torch.utils._pytree import tree_map as map
from torch.utils._pytree import tree_map_only as map_only
from torch.utils._pytree import tree_structure as structure
from torch.utils._pytree import tree_unflatten as unflatten

__all__ = [
    "flatten",
    "flatten_with_path",
    "foreign",
    "key_get",
    "keystr",
    "leaves",
    "map",
    "map_only",
    "path_name",
    "structure",
    "unflatten",
]


def path_name(path: Any) -> str:
    """The path of a leaf, with dots: `"encoder.0.weight"`."""
    return ".".join(str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry)))) for entry in path)


_OWN = frozenset({None, dict, OrderedDict, list, tuple})


def foreign(spec: Any) -> list[tuple[Any, Any]]:
    """The type and context of each node that is none of Python's plain containers."""
    found: list[tuple[Any, Any]] = []
    pending = [spec]
    while pending:
        node = pending.pop()
        if node.type not in _OWN:
            found.append((node.type, node.context))
        if node.num_nodes > 1 + node.num_leaves or node.type not in _OWN:
            pending += node.children()
    return found
