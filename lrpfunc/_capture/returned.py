"""What a model function returns beside tensors: kept with its program, and given out at each call."""

from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrpfunc import _tree as tree
from lrpfunc._capture.environment import Environment
from lrpfunc._capture.memory import IsForeign
from lrpfunc._errors import CaptureError


class Returned(NamedTuple):
    """What a model function returned, less the tensors.

    Attributes:
        leaves: `None` for a tensor; of anything else, itself and whether each call gets a copy.
        spec: How they stand together.
        copied: Whether each call gets a copy of what the nodes of `spec` hold.
    """

    leaves: list[tuple[Any, bool] | None]
    spec: Any
    copied: bool = False

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """The same with these tensors in it."""
        found = iter(tensors)
        leaves = [next(found) if leaf is None else _given(*leaf) for leaf in self.leaves]
        return tree.unflatten(leaves, _given(self.spec, self.copied))


def _given(value: Any, copied: bool) -> Any:
    return copy.deepcopy(value) if copied else value


def returned(value: Any, before: Environment, is_foreign: IsForeign) -> Returned:
    """Keeps what a model function returned while it was traced, at which time `before` was all that it could read.

    Calls must not share what the caller may change, nor may a tensor of the trace, which has no numbers, come out.
    """
    leaves, spec = tree.flatten(value)
    kept = [None if isinstance(leaf, Tensor) else _kept(leaf, before, is_foreign) for leaf in leaves]
    contexts = [context for _, context in tree.foreign(spec)]
    copied = [_kept(context, before, is_foreign)[1] for context in contexts]
    return Returned(kept, spec, any(copied))


def _kept(value: Any, before: Environment, is_foreign: IsForeign) -> tuple[Any, bool]:
    """What to keep of `value`, and whether each call gets a copy of it."""
    inside = Environment(value, transformed=True)
    if any(isinstance(obj, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)) for obj in inside.met()):
        if before.has(value) and not any(map(is_foreign, inside.met())):
            return value, False  # an object of the user's own, as it is
        raise CaptureError(
            f"the model function returns an object of type {type(value).__name__} with a tensor inside, where a trace "
            "cannot follow it: torch's pytree does not know the type. Return the tensors in a tuple, a list or a dict, "
            'such as `return output, {"hidden": state.hidden}`, or make the type known, if it is a dataclass:\n\n'
            f"    torch.export.register_dataclass({type(value).__name__})"
        )
    if before.has(value) or isinstance(value, (type, types.ModuleType)):
        return value, False
    try:
        if inside.unknown or (isinstance(value, types.FunctionType) and value.__closure__):
            raise TypeError("what it will do depends on what is in it")
        kept = copy.deepcopy(value)
    except Exception as error:  # whatever the author of a class thought fit
        raise CaptureError(
            f"the model function returns an object of type {type(value).__name__}, and each call should have one of "
            f"its own, but it cannot be copied: {error}. The model function runs only when it is recorded. Return what "
            "the object is made of, in a tuple, a list or a dict"
        ) from error
    return kept, kept is not value
