"""Pytrees: the only importer of a pytree library.

Arguments and outputs are flattened by torch's registry, which is what `make_fx` and `torch.func` see.
"""

from __future__ import annotations

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
