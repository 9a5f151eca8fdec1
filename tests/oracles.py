"""What results are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def largest_difference(ours: Any, theirs: Any) -> float:
    """The largest difference between two pytrees of tensors, over the largest magnitude."""
    leaves = pytree.tree_leaves(ours), pytree.tree_leaves(theirs)
    pairs = [(a.detach(), b.detach()) for a, b in zip(*leaves, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    scale = max(float(b.abs().max()) for _, b in pairs)
    # The maximum of tensors keeps a NaN, Python's own drops it.
    return float(torch.stack([(a - b).abs().max().double() for a, b in pairs]).max()) / (scale or 1.0)


def plain_vjp(fn: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp` without an auxiliary output."""
    output, pullback, *_ = torch.func.vjp(fn, *primals)
    return output, pullback


def finite_difference_error(fn: Callable[[Any], Tensor], at: Any, seed: int = 0, step: float = 3e-5) -> float:
    """The relative error of `torch.func.grad(fn)` along a random direction, against finite differences.

    Richardson's extrapolation of two central differences leaves an error of fourth order in the step. Where both are
    zero nothing was compared, a derivative that is lost everywhere would pass, and the error is infinite.
    """
    leaves, spec = pytree.tree_flatten(at)
    generator = torch.Generator().manual_seed(seed)
    direction = [torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator) for leaf in leaves]

    def along(t: float) -> float:
        moved = [leaf.detach() + t * d for leaf, d in zip(leaves, direction, strict=True)]
        return float(fn(pytree.tree_unflatten(moved, spec)).detach())

    def central(h: float) -> float:
        return (along(h) - along(-h)) / (2 * h)

    numeric = (4 * central(step / 2) - central(step)) / 3
    gradients = pytree.tree_leaves(torch.func.grad(fn)(at))
    exact = sum(float((g * d).sum().detach()) for g, d in zip(gradients, direction, strict=True))
    scale = max(abs(numeric), abs(exact))
    return abs(numeric - exact) / scale if scale else float("inf")
