"""Vector-Jacobian products of matrix products, from their operands alone: without the forward pass a VJP runs first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Transpose = Callable[[int, Tensor, tuple[Any, ...]], Tensor]


def _linear(position: int, s: Tensor, args: tuple[Any, ...]) -> Tensor:
    x, weight, *_ = args
    if position == 0:
        return s @ weight
    return s.reshape(-1, s.shape[-1]).mT @ x.reshape(-1, x.shape[-1])


def _matmul(position: int, s: Tensor, args: tuple[Any, ...]) -> Tensor:
    left, right = args[:2]
    return (s @ right.mT).sum_to_size(left.shape) if position == 0 else (left.mT @ s).sum_to_size(right.shape)


_TRANSPOSES: dict[str, tuple[Transpose, int, int]] = {
    # with the least dimensions of the two factors for which the formula holds
    "linear": (_linear, 1, 2),
    "matmul": (_matmul, 2, 2),
    "mm": (_matmul, 2, 2),
    "bmm": (_matmul, 3, 3),
}


def transpose_of(name: str, args: tuple[Any, ...], position: int) -> Callable[[Tensor], Tensor] | None:
    """What pulls a cotangent back to the factor at `position`, or `None` for an operation that is not known here."""
    if name not in _TRANSPOSES or position > 1 or len(args) < 2:
        return None
    formula, *least = _TRANSPOSES[name]
    factors = args[:2]
    if any(not isinstance(t, Tensor) or t.ndim < n for t, n in zip(factors, least, strict=True)):
        return None
    if factors[0].dtype != factors[1].dtype:
        return None
    return lambda s: formula(position, s, args)
