"""Objects with tensors inside as pytrees: the tensors are their children, everything else is their structure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrpfunc import _tree as tree
from lrpfunc._capture.identity import attributes
from lrpfunc.rules._equality import Description

_LEAVES = "_leaves_of_tree"
"""Where an object remembers which parts of it are leaves, if something else than a tensor stands there."""


class Parametric(Description):
    """A description that is a pytree, and so is every class that derives from it.

    A class is registered when it is made, before a dataclass decorator has seen it, and once more if that makes it
    anew to give it slots; which attributes it has is asked of each object. Both registries keep it from then on.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        tree.register(cls, _flatten, _unflatten)


@dataclass(frozen=True)
class Structure:
    """What an object is, but for its children.

    Attributes:
        cls: Its class.
        attributes: The containers that its attributes are made of.
        others: What is no child inside these, in order, and `None` for each child.
        held: The places of the children.
    """

    cls: type
    attributes: Any
    others: tuple[Any, ...]
    held: tuple[int, ...]

    def __hash__(self) -> int:  # numbers and functions of any kind may be among the others
        return hash((self.cls, self.held))


@dataclass(frozen=True)
class Place(tree.AttributeKey):
    """Where a child is: an attribute, or a way through containers in one, of which `name` is the code."""

    path: tuple[Any, ...]

    @classmethod
    def of(cls, path: Any) -> Place:
        first, *rest = path
        return cls(f"{first.key}{tree.keystr(tuple(rest))}", (tree.AttributeKey(first.key), *rest))

    def get(self, obj: Any) -> Any:
        return tree.key_get(obj, self.path)


def _flatten(obj: Parametric) -> tuple[list[tuple[Place, Any]], Structure]:
    leaves, spec = tree.flatten_with_path(_attributes(obj), is_leaf=lambda value: isinstance(value, Parametric))
    # Whoever maps over a tree puts other things into it, such as the None of a gradient or the axes of a `vmap`. They
    # stay its leaves, or it would not have the structure of the tree that it was made of.
    held = vars(obj).get(_LEAVES)
    if held is None:
        held = tuple(i for i, (_, leaf) in enumerate(leaves) if isinstance(leaf, (Tensor, Parametric)))
    others = tuple(None if i in held else leaf for i, (_, leaf) in enumerate(leaves))
    children = [(Place.of(leaves[i][0]), leaves[i][1]) for i in held]
    return children, Structure(type(obj), spec, others, held)


def _unflatten(children: Iterable[Any], structure: Structure) -> Parametric:
    """The object with other children, made without its checks: whatever they are, they need not be tensors."""
    leaves = list(structure.others)
    for place, child in zip(structure.held, children, strict=True):
        leaves[place] = child
    obj = object.__new__(structure.cls)
    for name, value in tree.unflatten(leaves, structure.attributes).items():
        object.__setattr__(obj, name, value)
    if not all(isinstance(leaves[i], (Tensor, Parametric)) for i in structure.held):
        object.__setattr__(obj, _LEAVES, structure.held)
    return obj


def _attributes(obj: Parametric) -> dict[str, Any]:
    """All that the object holds, but for what a `cached_property` has computed from it."""
    cls, found = type(obj), dict(attributes(obj))
    fields = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    names = dict.fromkeys([*(name for name in fields if name in found), *found])  # slots have an order of their own
    cached = functools.cached_property
    return {n: found[n] for n in names if n != _LEAVES and not isinstance(getattr(cls, n, None), cached)}
