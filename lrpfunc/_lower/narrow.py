"""What the walk needs of a forward pass, for some of its samples alone.

A program with an open batch says of each tensor which dimension that is. For `torch.relu(x @ w)`, where `x` has shape
`(s0, 8)`, the walk is given

    relu: (s0, 3)    w: (8, 3)    s0: 5            for rows 0 and 4:    relu[[0, 4]]    w    s0: 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrpfunc._ops.symbols import evaluated


def narrowed(
    saved: Sequence[Any], likes: Sequence[Any], batch: Any, sizes: dict[Any, int], rows: Tensor
) -> list[Any] | None:
    """The same for some of the samples, `None` where it is not clear which dimension they are.

    Args:
        saved: What the walk needs for all of them: tensors, and open sizes.
        likes: For each a tensor without numbers that is like it, or the expression of a size; `None` if nobody knows.
        batch: The symbol of the number of samples.
        sizes: The value of each symbol.
        rows: Which of the samples.
    """
    result = []
    for value, like in zip(saved, likes, strict=True):
        if isinstance(value, Tensor):
            part = _rows_of(value, like, batch, sizes[batch], rows)
        else:
            part = None if like is None else evaluated(like, sizes | {batch: len(rows)})
        if part is None:
            return None
        result.append(part)
    return result


def _rows_of(tensor: Tensor, like: Any, batch: Any, count: int, rows: Tensor) -> Tensor | None:
    if not isinstance(like, Tensor):
        return None
    sizes = [size.node.expr if isinstance(size, torch.SymInt) else None for size in like.shape]
    dims = [d for d, size in enumerate(sizes) if size is not None and batch in size.free_symbols]
    if not dims:
        return tensor
    size = sizes[dims[0]]
    if len(dims) > 1 or batch in (size / batch).free_symbols:  # samples beside samples, or halves of them
        return None
    if size == batch:
        return tensor.index_select(dims[0], rows)
    # Samples and something else in one dimension, such as positions.
    return tensor.unflatten(dims[0], (count, -1)).index_select(dims[0], rows).flatten(dims[0], dims[0] + 1)
