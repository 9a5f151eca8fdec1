"""Equality of small immutable descriptions that may carry tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

from torch import Tensor


def _comparable(value: Any) -> Hashable:
    # Numbers compare by value. Comparing tensors by value would synchronise with the device and fail under
    # vmap and grad, so they compare by identity.
    if isinstance(value, Tensor):
        return ("tensor", id(value))
    if isinstance(value, (tuple, list)):
        return tuple(map(_comparable, value))
    return value


class Description:
    """A frozen dataclass with this base compares and hashes numbers by value and tensors by identity."""

    def _fields(self) -> tuple[Hashable, ...]:
        return tuple(_comparable(getattr(self, field.name)) for field in dataclasses.fields(self) if field.compare)  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._fields() == other._fields()  # type: ignore[union-attr]

    def __hash__(self) -> int:
        return hash((type(self), self._fields()))
