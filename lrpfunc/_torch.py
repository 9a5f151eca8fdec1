"""What lrpfunc uses of torch that torch does not type or export, in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg as map_arg


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a torch.func transform that is running has wrapped the tensor."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.is_functorch_wrapped_tensor(tensor)


def inside_transform() -> bool:
    """Whether a torch.func transform is running in this thread."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None


def vjp(function: Callable[..., Any], *primals: Tensor) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp` without an auxiliary output."""
    output, pullback, *_ = torch.func.vjp(function, *primals)
    return output, pullback


def jvp(function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """The directional derivative alone."""
    return torch.func.jvp(function, primals, tangents)[1]
