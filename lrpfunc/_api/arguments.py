"""What of the arguments is explained."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from lrpfunc import _tree as tree
from lrpfunc._api.options import Options
from lrpfunc._capture.module import ModelFunction
from lrpfunc._errors import InputError


class Explained:
    """The leaves of the arguments that `argnums` or `argnames` names, checked.

    Attributes:
        positions: For each leaf its place among all tensor leaves, `None` for integers explained at `layers=`.
        integers: The places of the integer leaves.
        parameters: Whether each leaf is part of the parameters: argument 0, while others carry data.
        others: The places of the floating-point leaves of all positional arguments but 0.
        spec: The structure of what is explained.
    """

    def __init__(self, model_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options):
        given: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
        chosen = tuple(_argument(argument, model_fn, given) for argument in options.explained)
        places = _places(given)
        self.others = tuple(
            place for n in range(1, len(args)) for leaf, place in places[n] if place is not None and _floating(leaf)
        )
        explained = tuple(given[argument] for argument in chosen)
        self.spec = tree.structure(explained[0] if options.is_single else explained)
        self.positions: list[int | None] = []
        self.integers: list[int] = []
        self.parameters: list[bool] = []
        for argument in chosen:
            paths = [path for path, _ in tree.flatten_with_path(given[argument])[0]]
            for path, (leaf, place) in zip(paths, places[argument], strict=True):
                self._add(leaf, place, argument, tree.path_name(path), bool(options.globs))

    @property
    def key(self) -> Hashable:
        """All of it."""
        return tuple(self.positions), tuple(self.integers), tuple(self.parameters), self.others, self.spec

    def _add(self, leaf: Any, place: int | None, argument: int | str, path: str, has_layers: bool) -> None:
        if place is not None and _floating(leaf):
            self.positions.append(place)
            self.parameters.append(argument == 0 and bool(self.others))
            return
        if place is not None and not leaf.is_complex() and has_layers:
            self.positions.append(None)
            self.integers.append(place)
            return
        if place is None and leaf is None:
            self.positions.append(None)
            return
        where = f"argument {argument!r}" + (f" at `{path}`" if path else "")
        kind = f"a tensor of {leaf.dtype}" if place is not None else f"{reprlib.repr(leaf)}, which is no tensor"
        raise InputError(
            f"relevance cannot be given to {where}: it is {kind}, and relevance is a floating-point number for each "
            f"element. {_way_out(leaf)}" + ("; to explain another argument, set argnums" if argument == 1 else "")
        )


def signature_of(model_fn: Callable[..., Any]) -> inspect.Signature | None:
    """What a model function takes, if that is known; one made by `from_module` takes parameters before the rest."""
    try:
        if not isinstance(model_fn, ModelFunction):
            return inspect.signature(model_fn)
        signature = inspect.signature(model_fn.module.forward)
        params = inspect.Parameter("params", inspect.Parameter.POSITIONAL_ONLY)
        return signature.replace(parameters=[params, *signature.parameters.values()])
    except (TypeError, ValueError):
        return None


def _names(model_fn: Callable[..., Any]) -> list[str]:
    """Those of the positional arguments."""
    signature = signature_of(model_fn)
    parameters = () if signature is None else signature.parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _argument(argument: int | str, model_fn: Callable[..., Any], given: dict[int | str, Any]) -> int | str:
    """Where an argument that is asked for stands: it may be given by position or by name, whichever it is asked by."""
    count = sum(isinstance(place, int) for place in given)
    if isinstance(argument, int) and -count <= argument < count:
        return argument % count
    if argument in given:
        return argument
    names = _names(model_fn)
    if isinstance(argument, int):
        if 0 <= argument < len(names) and names[argument] in given:
            return names[argument]
        tensors = [name for name, value in given.items() if isinstance(name, str) and isinstance(value, Tensor)]
        raise InputError(
            f"argnums={argument} names argument {argument}, but the function was called with {count} positional "
            "arguments. "
            + (
                f"To explain one that is given by its name, write argnames={tensors[0]!r}"
                if tensors
                else "The parameters come first: relevance_fn(params, x). For a function f(x) without parameters write "
                "argnums=0"
            )
        )
    if argument in names[:count]:
        return names.index(argument)
    shown = ", ".join(repr(name) for name in (*names[:count], *(name for name in given if isinstance(name, str))))
    raise InputError(f"argnames={argument!r} names no argument of the call, which has {shown or 'none with a name'}")


def _places(given: dict[int | str, Any]) -> dict[int | str, list[tuple[Any, int | None]]]:
    """For each argument its leaves, and the place of each tensor leaf among all."""
    count = 0
    places: dict[int | str, list[tuple[Any, int | None]]] = {}
    for name, value in given.items():
        places[name] = []
        for leaf in tree.leaves(value):
            places[name].append((leaf, count if isinstance(leaf, Tensor) else None))
            count += isinstance(leaf, Tensor)
    return places


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _way_out(leaf: Any) -> str:
    """What to write where relevance was asked of something that takes none."""
    if not isinstance(leaf, Tensor):
        return "Make it a tensor, for example torch.as_tensor(x), or return_tensors='pt' in a tokenizer"
    if leaf.is_complex():
        return "Take a real view of it inside of the model function: explain torch.view_as_real(x)"
    return (
        "For images write x.float(); for token ids say at which layers, such as the embedding: layers='*embed*', or "
        "layers='*' for all of them"
    )
