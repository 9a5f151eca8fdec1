"""What of the arguments is explained."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from lrpfunc import _tree as tree
from lrpfunc._api.options import Options
from lrpfunc._errors import InputError


class Explained:
    """The leaves of the arguments that `argnums` names, checked.

    Attributes:
        positions: For each leaf its place among all tensor leaves, `None` for integers explained at `layers=`.
        integers: The places of the integer leaves.
        parameters: Whether each leaf is part of the parameters: argument 0, while others carry data.
        others: The places of the floating-point leaves of all arguments but 0.
        spec: The structure of what is explained.
    """

    def __init__(self, args: tuple[Any, ...], options: Options):
        argnums = options.argnums
        for number in options.numbers:
            if not -len(args) <= number < len(args):
                raise InputError(
                    f"argnums={argnums} names argument {number}, but the function was called with {len(args)} "
                    f"positional arguments. For a function f(x) without parameters write argnums=0, and "
                    "pass inputs by position"
                )
        numbers = tuple(number % len(args) for number in options.numbers)
        places = self._places(args)
        self.others = tuple(
            place
            for n, group in enumerate(places[1:], 1)
            for leaf, place in group
            if place is not None and _floating(leaf)
        )
        explained = tuple(args[number] for number in numbers)
        self.spec = tree.structure(explained[0] if isinstance(argnums, int) else explained)
        self.positions: list[int | None] = []
        self.integers: list[int] = []
        self.parameters: list[bool] = []
        for number in numbers:
            paths = [path for path, _ in tree.flatten_with_path(args[number])[0]]
            for path, (leaf, place) in zip(paths, places[number], strict=True):
                self._add(leaf, place, number, tree.path_name(path), bool(options.globs))

    @property
    def key(self) -> Hashable:
        """All of it."""
        return tuple(self.positions), tuple(self.integers), tuple(self.parameters), self.others, self.spec

    @staticmethod
    def _places(args: tuple[Any, ...]) -> list[list[tuple[Any, int | None]]]:
        """For each argument its leaves, and the place of each tensor leaf among all."""
        count = 0
        places = []
        for arg in args:
            group: list[tuple[Any, int | None]] = []
            for leaf in tree.leaves(arg):
                group.append((leaf, count if isinstance(leaf, Tensor) else None))
                count += isinstance(leaf, Tensor)
            places.append(group)
        return places

    def _add(self, leaf: Any, place: int | None, number: int, path: str, has_layers: bool) -> None:
        where = f"argument {number}" + (f" at `{path}`" if path else "")
        if place is not None and _floating(leaf):
            self.positions.append(place)
            self.parameters.append(number == 0 and bool(self.others))
            return
        if place is not None and not leaf.is_complex() and has_layers:
            self.positions.append(None)
            self.integers.append(place)
            return
        if place is None and leaf is None:
            self.positions.append(None)
            return
        kind = f"a tensor of {leaf.dtype}" if place is not None else f"{leaf!r}, which is no tensor"
        raise InputError(
            f"relevance cannot be given to {where}: it is {kind}, and relevance is a floating-point number for each "
            "element. For images write x.float(); for token ids explain the embeddings instead, "
            "with layers='name.of.the.embedding'" + self._suggest_argnums(number)
        )

    def _suggest_argnums(self, number: int) -> str:
        return "; to explain another argument, set argnums" if number == 1 else ""


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
