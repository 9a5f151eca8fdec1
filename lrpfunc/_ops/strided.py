"""Operators that count places in memory, as what they do to the elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrpfunc._errors import CaptureError
from lrpfunc._ops.call import argument_of
from lrpfunc._ops.symbols import has_open_sizes
from lrpfunc._torch import aten, disable_current_modes

Size = Sequence[Any]
"""Numbers, or open sizes."""

Layout = tuple[Size, Any]
"""The strides of a tensor, and where it starts in memory."""


def as_strided(x: Tensor, size: Size, stride: Size, storage_offset: int | None = None, *, layout: Layout) -> Tensor:
    """What torch's would be if `x` had that layout, whichever it has."""
    return x.reshape(-1)[_places(x.shape, layout, size, stride, storage_offset, x.device)]


def as_strided_scatter(
    x: Tensor, source: Tensor, size: Size, stride: Size, storage_offset: int | None = None, *, layout: Layout
) -> Tensor:
    """The same for the write. Torch's has a wrong derivative, and no batching rule."""
    places = _places(x.shape, layout, size, stride, storage_offset, x.device)
    return x.reshape(-1).index_put((places,), source).reshape(x.shape)


def _places(
    shape: Size, layout: Layout, size: Size, stride: Size, offset: int | None, device: torch.device | str
) -> Tensor:
    """Which elements of a tensor, counted in their order, lie in those places of memory; -1 where none does."""
    strides, start = layout
    first = start if offset is None else offset
    memory = torch.full((1 + max(start + _reach(shape, strides), first + _reach(size, stride)),), -1, device=device)
    elements = torch.arange(math.prod(shape), device=device).reshape(shape)
    memory = memory.index_put((start + _steps(shape, strides, device),), elements)
    return memory[first + _steps(size, stride, device)]


def _steps(shape: Size, strides: Size, device: torch.device | str) -> Tensor:
    """How far in memory each element is from the first."""
    steps = torch.zeros((), dtype=torch.int64, device=device)
    for n, step in zip(shape, strides, strict=True):
        steps = steps.unsqueeze(-1) + step * torch.arange(n, device=device)
    return steps


def _reach(shape: Size, strides: Size) -> int:
    return sum(max(n - 1, 0) * step for n, step in zip(shape, strides, strict=True))


def free_of_layout(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The operation that does the same on tensors that lie in memory in another way than those that were seen.

    A trace is specialised to the strides it saw. What runs, or its derivative, may choose another kernel, with others.

    Args:
        target: The operation.
        args: Its arguments, nodes with what was seen.
        kwargs: The same.

    Returns:
        The operation, and its keyword arguments.

    Raises:
        CaptureError: If it reaches beyond what its operand holds.
    """
    if target in (aten.view.default, aten._unsafe_view.default):
        return aten.reshape.default, kwargs
    if target in _ON_MEMORY:
        seen = args[0].meta["val"]
        layout = seen.stride(), seen.storage_offset()
        size, stride, offset = (
            argument_of(target, args, kwargs, name) for name in ("size", "stride", "storage_offset")
        )
        if _reads_beyond(seen, size, stride, offset):
            raise CaptureError(
                f"as_strided reads memory beyond the tensor of shape {tuple(seen.shape)} that it is called on, such as "
                "more of what that is a view of. Call it on the whole tensor"
            )
        return _ON_MEMORY[target], {**kwargs, "layout": layout}
    return target, kwargs


def _reads_beyond(seen: Tensor, size: Size, stride: Size, offset: int | None) -> bool:
    """Whether some of those places in memory hold nothing of a tensor."""
    layout = seen.stride(), seen.storage_offset()
    if has_open_sizes(seen) or any(isinstance(n, torch.SymInt) for n in (*size, *stride, offset)):
        # Whatever the sizes are, if the tensor has no gaps: what is compared here becomes a guard.
        first, reach = layout[1] if offset is None else offset, _reach(seen.shape, layout[0])
        has_gaps = math.prod(seen.shape) != reach + 1
        return bool(has_gaps or first < layout[1] or first + _reach(size, stride) > layout[1] + reach)
    with disable_current_modes():
        return bool((_places(seen.shape, layout, size, stride, offset, "cpu") < 0).any())


_ON_MEMORY: dict[Any, Any] = {
    aten.as_strided.default: as_strided,
    aten.as_strided_scatter.default: as_strided_scatter,
}
