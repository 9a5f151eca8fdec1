"""Pytrees: the only importer of pytree libraries, which are torch's and optree.

Arguments and outputs are flattened by torch's registry, which is what `make_fx` and `torch.func` see. Rules are in
both: optree names the tensors in them as code, such as `rules[0].gamma`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

import optree
import optree.registry
from torch.utils._pytree import GetAttrKey as AttributeKey
from torch.utils._pytree import SequenceKey as IndexKey
from torch.utils._pytree import key_get, keystr
from torch.utils._pytree import register_pytree_node as register_container
from torch.utils._pytree import tree_flatten as flatten
from torch.utils._pytree import tree_flatten_with_path as flatten_with_path
from torch.utils._pytree import tree_leaves as leaves
from torch.utils._pytree import tree_map as map
from torch.utils._pytree import tree_map_only as map_only
from torch.utils._pytree import tree_structure as structure
from torch.utils._pytree import tree_unflatten as unflatten

__all__ = [
    "AttributeKey",
    "Code",
    "IndexKey",
    "NAMESPACE",
    "Key",
    "flatten",
    "flatten_with_path",
    "foreign",
    "key_get",
    "keystr",
    "leaves",
    "map",
    "map_only",
    "named",
    "named_leaves",
    "names",
    "path_name",
    "register",
    "register_container",
    "structure",
    "unflatten",
]

NAMESPACE = "lrpfunc"
"""Of optree: there dictionaries keep their order, as in torch's registry, where optree sorts them otherwise."""

_ordered = optree.dict_insertion_ordered(True, namespace=NAMESPACE)  # kept: when it goes, they are sorted again
_ordered.__enter__()

# NOTE: [every namespace] TorchOpt, like other users of optree, flattens in the default namespace, where what is
# registered in another is a leaf. The types are our own, so that there is nobody whose namespace they could be wrong
# in: they are registered for all, ours included. The name that optree has for that is not exported.
_EVERYWHERE: Any = vars(optree.registry)["__GLOBAL_NAMESPACE"]


class Key(Hashable, Protocol):
    """Where a child is in its parent; printed, the code that goes there.

    Torch's keys are such, and `torch.export` knows no others.
    """

    def get(self, parent: Any, /) -> Any: ...


class _Entry(optree.PyTreeEntry):
    """A `Key` for optree."""

    def __call__(self, obj: Any, /) -> Any:
        return self.entry.get(obj)

    def codify(self, node: str = "", /) -> str:
        return f"{node}{self.entry}"


def register(
    cls: type,
    flatten: Callable[[Any], tuple[Sequence[tuple[Key, Any]], Any]],
    unflatten: Callable[[Iterable[Any], Any], Any],
) -> None:
    """Makes a class a pytree for torch and optree, its children and their order the same for both.

    Args:
        cls: The class.
        flatten: The children of an object, each with its key, and its structure.
        unflatten: The object of such children and such a structure.
    """

    def children(obj: Any) -> tuple[list[Any], Any]:
        keyed, structure = flatten(obj)
        return [child for _, child in keyed], structure

    def entries(obj: Any) -> tuple[list[Any], Any, tuple[Key, ...]]:
        keyed, structure = flatten(obj)
        return [child for _, child in keyed], structure, tuple(key for key, _ in keyed)

    register_container(cls, children, unflatten, flatten_with_keys_fn=lambda obj: tuple(flatten(obj)))  # pyright: ignore[reportArgumentType]
    optree.register_pytree_node(
        cls,
        entries,  # pyright: ignore[reportArgumentType]
        lambda structure, children: unflatten(children, structure),
        path_entry_type=_Entry,
        namespace=_EVERYWHERE,
    )


def names(tree: Any, root: str) -> list[str]:
    """The leaves as code that begins with `root`: `["rules[0].gamma"]`."""
    return [a.codify(root) for a in optree.tree_accessors(tree, none_is_leaf=True, namespace=NAMESPACE)]


class Code(str):
    """A text that prints without quotation marks."""

    __repr__ = str.__str__


def named(tree: Any, root: str) -> Any:
    """The tree with its leaves' names in their places, to print it."""
    return unflatten([Code(name) for name in names(tree, root)], structure(tree))


def named_leaves(trees: dict[str, Any]) -> list[tuple[str, Any]]:
    """The leaves of some trees by their names, which begin with those of the trees: `"rules[0].gamma"`.

    Arguments may be of types that torch knows and optree does not, so the names are torch's.
    """
    return [(name + keystr(path), leaf) for name, tree in trees.items() for path, leaf in flatten_with_path(tree)[0]]


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
