"""Pytrees of numbers: how they are made, cut and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrpfunc import _tree as tree

ROUNDING = 1e-9
"""What two ways to compute the same numbers in float64 may differ by, relative to the largest."""

CANCELLED = 1e-4
"""Numbers below are compared as if they were as large: behind a layer norm of one feature all of it is rounding."""


class PropertyError(AssertionError):
    """A property does not hold; what a rule raises itself is something else."""


def require_float64(*trees: Any) -> None:
    """Refuses other floating-point tensors, whose rounding hides what is looked for."""
    for path, leaf in tree.flatten_with_path(dict(zip(("params", "x"), trees, strict=True)))[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype is not torch.float64:
            raise ValueError(
                f"{tree.keystr(path)} is {leaf.dtype}, and rounding would hide what is wrong: give the parameters "
                "and the input in float64, with .double()"
            )


def split(params: Any) -> tuple[Any, Any]:
    """A dictionary of parameters without, and of nothing but, the running statistics among them."""
    if not isinstance(params, dict):
        return params, {}
    statistics = {name: value for name, value in params.items() if "running_" in str(name)}
    return {name: value for name, value in params.items() if name not in statistics}, statistics


def joined(trained: Any, statistics: Any) -> Any:
    return {**trained, **statistics} if statistics else trained


def probe(output: Tensor) -> Tensor:
    """Numbers of either sign, shaped like the output."""
    return torch.linspace(-1, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)


def scaled(values: Any, factors: Sequence[float]) -> Any:
    """The tensors of a tree, each stacked with itself; those of floating-point numbers times the factors."""

    def stack(leaf: Tensor) -> Tensor:
        return torch.stack([factor * leaf if leaf.is_floating_point() else leaf for factor in factors])

    return tree.map_only(Tensor, stack, values)


def sample(values: Any, i: int) -> Any:
    """The tensors of a tree cut to one sample; those without dimensions stay."""
    return tree.map_only(Tensor, lambda leaf: leaf[i : i + 1] if leaf.ndim else leaf, values)


def samples(values: Any) -> int:
    """How many samples the tensors of a tree have in common, 0 if they do not agree."""
    counts = {len(leaf) for leaf in tree.leaves(values) if isinstance(leaf, Tensor) and leaf.ndim}
    return counts.pop() if len(counts) == 1 else 0


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max()) if ours.numel() else 0.0


def identical(ours: Tensor, theirs: Tensor) -> bool:
    """Whether all numbers are the same, NaN and NaN included."""
    return torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)


def close(ours: Any, theirs: Any, tolerance: float, what: tuple[str, str], scales: Any = ()) -> None:
    """Asserts that two trees of numbers agree; `what` they are."""
    pairs = list(zip(tree.leaves(ours), tree.leaves(theirs), strict=True))
    magnitudes = [leaf.abs().max() for leaf in (*tree.leaves(theirs), *tree.leaves(scales)) if leaf.numel()]
    scale = max([float(m.detach()) for m in magnitudes], default=0.0)
    worst = torch.tensor([difference(a.detach(), b.detach()) for a, b in pairs]).max() if pairs else torch.tensor(0)
    if worst.isnan():
        wrong = [name for name, values in zip(what, (ours, theirs), strict=True) if _is_nan(values)]
        raise PropertyError(f"{' and '.join(wrong)} {'are' if len(wrong) > 1 else 'is'} NaN")
    if not worst <= tolerance * max(scale, CANCELLED):
        raise PropertyError(f"{' and '.join(what)} differ by {float(worst):.3g}, and the largest number is {scale:.3g}")


def _is_nan(values: Any) -> bool:
    # The difference of two infinities is NaN, too.
    return any(bool((leaf - leaf).isnan().any()) for leaf in tree.leaves(values))
