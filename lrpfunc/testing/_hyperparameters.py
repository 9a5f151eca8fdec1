"""The tensors inside rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrpfunc.composites import Composite, as_composite
from lrpfunc.rules import Rule
from lrpfunc.rules._message import Stabilizer

T = TypeVar("T")


def hyperparameters(rules: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The floating-point tensors inside rules, and a function that puts others in their place."""
    found: list[Tensor] = []

    def note(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value)
        return value

    if rules is None:
        return [], lambda tensors: None
    composite = as_composite(rules)
    _mapped(composite, note)

    def rebuild(tensors: Sequence[Tensor]) -> Composite:
        given = iter(tensors)
        is_held = lambda value: isinstance(value, Tensor) and value.is_floating_point()  # noqa: E731
        return _mapped(composite, lambda value: next(given) if is_held(value) else value)

    return found, rebuild


def with_tensors(rules: T) -> T:
    """A rule or a composite with a tensor for each number that may be one, so that it can be differentiated.

    Zeros stay what they are, since an exact 0 may select what is computed.

    Args:
        rules: A rule or a composite.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import with_tensors
        >>> with_tensors(lrp.Epsilon(0.5))
        Epsilon(epsilon=tensor(0.5000, dtype=torch.float64), zero_params=None)
    """
    return _mapped(rules, lambda v: torch.tensor(v, dtype=torch.float64) if isinstance(v, float) and v else v, True)


def _mapped(value: Any, change: Callable[[Any], Any], tensorial: bool = False) -> Any:
    """`value` with the numbers and tensors in it changed; `tensorial`, only those that may be tensors."""
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, change, tensorial) for item in value]
        same = all(item is old for item, old in zip(items, value, strict=True))
        return value if same else type(value)(items)
    if not (isinstance(value, (Composite, Rule, Stabilizer)) and dataclasses.is_dataclass(value)):
        return change(value)
    everything = not tensorial or isinstance(value, Composite)
    fields = [f for f in dataclasses.fields(value) if f.init and (everything or "Tensor" in str(f.type))]
    mapped = {f.name: _mapped(getattr(value, f.name), change, tensorial) for f in fields}
    changed = {name: new for name, new in mapped.items() if new is not getattr(value, name)}
    return dataclasses.replace(value, **changed) if changed else value
