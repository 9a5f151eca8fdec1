"""Rules whose numbers are tensors."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch

from lrpfunc.composites import Composite
from lrpfunc.rules._pytree import Parametric

T = TypeVar("T")


def with_tensors(rules: T) -> T:
    """A rule or a composite with a tensor for each number that may be one, so that it can be differentiated.

    Numbers are part of a rule's structure, and tensors its leaves: `torch.func.grad` takes the result as an argument.
    Zeros stay what they are, since an exact 0 may select what is computed.

    Args:
        rules: A rule or a composite.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import with_tensors
        >>> with_tensors(lrp.Epsilon(0.5))
        Epsilon(epsilon=tensor(0.5000, dtype=torch.float64), zero_params=None)
    """
    return _with_tensors(rules)


def _with_tensors(value: Any) -> Any:
    if isinstance(value, float) and value:
        return torch.tensor(value, dtype=torch.float64)
    if isinstance(value, (tuple, list)):
        items = list(map(_with_tensors, value))
        return type(value)(items) if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if isinstance(value, Composite):
        names = ["entries"]
    elif isinstance(value, Parametric) and dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if f.init and "Tensor" in str(f.type)]
    else:
        return value
    new = {name: _with_tensors(getattr(value, name)) for name in names}
    changed = {name: part for name, part in new.items() if part is not getattr(value, name)}
    return dataclasses.replace(value, **changed) if changed else value
