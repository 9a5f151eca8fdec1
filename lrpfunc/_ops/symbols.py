"""Sizes that a recording leaves open: symbols, as arguments of its operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from lrpfunc._torch import FakeTensor


class OpenGraph(fx.Graph):
    """A graph in which symbolic sizes may stand for arguments; torch's warns of each."""

    def create_node(
        self, op: str, target: Any, args: Any = None, kwargs: Any = None, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        node = super().create_node(op, target, (), {}, name, type_expr)
        node.args, node.kwargs = args or (), kwargs or {}
        return node


def hashable(value: Any) -> Any:
    """The arguments of a node as a dictionary's key."""
    if isinstance(value, (list, tuple)):
        return tuple(map(hashable, value))
    if isinstance(value, dict):
        return tuple((key, hashable(item)) for key, item in value.items())
    return value if isinstance(value, fx.Node) else (type(value), repr(value))  # 1, 1.0 and True are not the same


def environment_of(tensors: Iterable[Any]) -> Any:
    """What knows of the symbolic sizes of tensors without data, `None` if they have none."""
    sizes = (size for tensor in tensors if isinstance(tensor, FakeTensor) for size in tensor.shape)
    return next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)


def has_open_sizes(tensor: Tensor) -> bool:
    """Whether some size is a symbol, of ours or of a compiler's."""
    return any(isinstance(size, torch.SymInt) for size in tensor.shape)


def hint(size: Any) -> Any:
    """What an open size is where it was recorded; asking for it closes nothing."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def is_unknown(size: Any) -> bool:
    """Whether a number was read out of a tensor that has none while it is recorded."""
    return isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) and size.node.hint is None


def bounds_of(environment: Any, symbol: Any) -> tuple[int | None, int | None]:
    """The least and the greatest value that a symbolic size may have."""
    bounds = environment.var_to_range[symbol]
    return tuple(int(end) if end.is_Integer else None for end in (bounds.lower, bounds.upper))  # type: ignore[return-value]


def evaluated(expression: Any, sizes: dict[Any, int]) -> int:
    """An expression of symbolic sizes, with numbers for its symbols."""
    return int(expression.xreplace(sizes))
