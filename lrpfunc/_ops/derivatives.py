"""Derivatives of functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrpfunc import _tree as tree


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp` without an auxiliary output."""
    output, pullback, *_ = torch.func.vjp(function, *primals)
    return output, pullback


def jvp(function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """The derivative in a direction, as the VJP of the VJP: more operations have that than forward derivatives."""
    output, pullback = vjp(function, *primals)
    cotangent = tree.map(torch.zeros_like, output)
    return vjp(pullback, cotangent)[1](tangents)[0]
