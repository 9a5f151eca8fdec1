"""Sizes that a program leaves open.

What is recorded for sentences of 9 tokens is wrong for 5: it reshapes to 9. So a program is for the sizes that it was
recorded with, until one differs. Then the function is recorded once more, with a symbol in its place. For

    def model_fn(table, x):                                       # `x` of shape (s0, 8)
        return x * 2 + table[: len(x)]                            # `table` of shape (32, 8)

that is

    mul = aten.mul.Tensor(x, 2)
    slice_1 = aten.slice.Tensor(table, 0, 0, s0)
    add = aten.add.Tensor(mul, slice_1)

Whatever looks at the size on the way leaves a guard, here `s0 <= 32`, or `s0 == 9` where a loop in Python has run over
it. The program serves every size that its guards allow, and no other. Sizes of 0 and 1 are never open: they broadcast.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lrpfunc._ops.symbols import bounds_of, hint
from lrpfunc._torch import FakeTensorMode, map_arg, open_sizes, python_code

logger = logging.getLogger("lrpfunc")

Dim = tuple[int, int]
"""A tensor, by its place among those given, and one of its dimensions."""


class Shapes:
    """The symbols of a program, and for which sizes it is right.

    Args:
        mode: Where its tensors without data are made.

    Attributes:
        environment: What torch knows of the symbols. It learns more whenever the program is analysed further.
    """

    def __init__(self, mode: FakeTensorMode):
        self.environment: Any = mode.shape_env
        self._mode = mode
        self._given: list[tuple[int, Tensor, tuple[int, ...]]] = []
        self._symbols: list[tuple[Any, Dim]] = []
        self._is_of_use = True
        self._known = -1  # how many guards there were
        self._holds: Callable[..., bool] = lambda *_: False

    @property
    def symbols(self) -> list[Any]:
        """One for each open size."""
        return [symbol for symbol, _ in self._symbols]

    def open(self, place: int, like: Tensor, dims: Collection[int]) -> Tensor:
        """A tensor without data like the one at a place, in whose `dims` the sizes are symbols."""
        order = layout(like)
        sizes = open_sizes(self._mode, [hint(size) for size in like.shape], dims, f"given_{place}")
        with self._mode:
            dense = torch.empty([sizes[d] for d in order], dtype=like.dtype, device=like.device)
        fake = dense.permute([order.index(d) for d in range(like.ndim)])
        self._given.append((place, fake, order))
        self._symbols += [(sizes[d].node.expr, (place, d)) for d in dims]
        return fake

    def sizes(self, given: Sequence[Tensor]) -> list[int]:
        """The value of each symbol, for these tensors."""
        return [given[place].shape[dim] for _, (place, dim) in self._symbols]

    def batch(self, output: Tensor) -> Any:
        """The symbol of the number of samples, `None` if that is fixed."""
        size = output.shape[0] if output.ndim else 0
        return size.node.expr if isinstance(size, torch.SymInt) and size.node.expr in self.symbols else None

    def fit(self, given: Sequence[Tensor]) -> bool:
        """Whether the program is right for the sizes of these tensors."""
        if not self._is_of_use:
            return False
        if len(self.environment.guards) != self._known:
            self._known, self._holds = len(self.environment.guards), self._compiled()
        return bool(self._holds(*self.sizes(given), [given[place].shape for place, *_ in self._given]))

    def arranged(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, those with open sizes without gaps in memory."""
        tensors = list(given)
        for place, _, order in self._given:
            if not _is_dense(tensors[place], order):
                tensors[place] = tensors[place].contiguous()
        return tensors

    def closed(self) -> list[Dim]:
        """The sizes that the recording fixes after all."""
        replace = self.environment.replace
        return [dim for symbol, dim in self._symbols if not self._is_of_use or replace(symbol).is_number]

    def give_up(self, error: Exception) -> None:
        """Leaves the program to nobody: something that is made of it needs numbers for sizes."""
        logger.info("no size is left open any more: %s: %s", type(error).__name__, error)
        self._is_of_use = False

    def _compiled(self) -> Callable[..., bool]:
        """What has to hold, as one expression of Python."""
        bounds = {symbol: bounds_of(self.environment, symbol) for symbol in self.symbols}
        conditions = [f"{low} <= {symbol}" for symbol, (low, _) in bounds.items() if low is not None]
        conditions += [f"{symbol} <= {high}" for symbol, (_, high) in bounds.items() if high is not None]
        conditions += [f"({python_code(guard.expr)})" for guard in self.environment.guards]
        for index, (_, fake, _) in enumerate(self._given):
            sizes = (size.node.expr if isinstance(size, torch.SymInt) else size for size in fake.shape)
            conditions += [f"shapes[{index}][{d}] == {_code(size)}" for d, size in enumerate(sizes)]
        names = "".join(f"{symbol}, " for symbol in self.symbols)
        return eval(f"lambda {names}shapes: {' and '.join(conditions) or 'True'}", {"math": math, "torch": torch})


def _code(size: Any) -> str:
    return str(size) if isinstance(size, int) else f"({python_code(size)})"


def layout(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor from the slowest to the fastest in memory; as usual if there are gaps in it."""
    plain = tuple(range(tensor.ndim))
    if tensor.is_contiguous():
        return plain
    order = sorted(plain, key=lambda d: (-tensor.stride(d), d))
    return tuple(order) if _is_dense(tensor, order) else plain


def _is_dense(tensor: Tensor, order: Sequence[int]) -> bool:
    """Whether its elements lie side by side, in that order of dimensions."""
    expected = 1
    for d in reversed(order):
        if tensor.shape[d] != 1 and tensor.stride(d) != expected:
            return False
        expected *= tensor.shape[d]
    return True


def inlined(graph: fx.Graph) -> None:
    """Puts sizes themselves in the place of operations that compute them: what a program has are tensors."""
    sizes = {node: node.meta["val"] for node in graph.nodes if node.op == "call_function" and _is_size(node)}
    for node in graph.nodes:
        if not sizes.keys().isdisjoint(node.all_input_nodes):
            node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda operand: sizes.get(operand, operand))
    for node in reversed(sizes):
        graph.erase_node(node)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
