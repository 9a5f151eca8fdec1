"""Fused operations whose insides need rules of their own, written out.

The forward pass still runs the fused operation; the walk goes through what is written here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from lrpfunc._capture.default import default
from lrpfunc._capture.inplace import writes
from lrpfunc._capture.program import is_float
from lrpfunc._capture.state import State
from lrpfunc._ops.call import operation_name
from lrpfunc._ops.functions import as_computed, fused
from lrpfunc._torch import aten


class Emit(Protocol):
    """Adds an operation to the graph; a product's `signal` is the operand that carries the relevance."""

    def __call__(self, target: Any, *args: Any, signal: fx.Node | None = None, **kwargs: Any) -> fx.Node: ...


Written = tuple[fx.Node | None, ...]
"""The outputs of an operation, written out; `None` for one that tells of the computation, and has no derivative."""

Expansion = Callable[..., Written | None]
_State = tuple[fx.Node, ...]
_Cell = Callable[[Emit, fx.Node, _State, Sequence[fx.Node]], _State]


def _glu(emit: Emit, x: fx.Node, dim: int = -1) -> Written:
    half = x.meta["val"].shape[dim] // 2
    value = emit(aten.slice.Tensor, x, dim, 0, half)
    gate = emit(aten.sigmoid.default, emit(aten.slice.Tensor, x, dim, half, 2 * half))
    return (emit(aten.mul.Tensor, value, gate),)


def _cosine_similarity(emit: Emit, x: fx.Node, y: fx.Node, dim: int = 1, eps: float = 1e-8) -> Written:
    shape = list(torch.broadcast_shapes(x.meta["val"].shape, y.meta["val"].shape))
    x, y = (t if list(t.meta["val"].shape) == shape else emit(aten.expand.default, t, shape) for t in (x, y))

    def normalized(t: fx.Node) -> fx.Node:
        norm = emit(aten.linalg_vector_norm.default, t, 2.0, [dim], True)
        return emit(aten.div.Tensor, t, emit(aten.clamp_min.default, norm, eps))

    return (emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, normalized(x), normalized(y)), [dim]),)


def _pairwise_distance(
    emit: Emit, x: fx.Node, y: fx.Node, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Written:
    difference = emit(aten.add.Tensor, emit(aten.sub.Tensor, x, y), eps)
    return (emit(aten.linalg_vector_norm.default, difference, p, [-1], keepdim),)


def _and_mean(spread: Any) -> Expansion:
    """`var_mean` and `std_mean`, in each of their overloads."""

    def expansion(emit: Emit, x: fx.Node, *args: Any, **kwargs: Any) -> Written:
        given = dict(zip(("dim", "unbiased", "keepdim"), args, strict=False)) | kwargs
        if isinstance(given.get("dim"), bool):  # `var_mean(x, unbiased)`
            return emit(spread.default, x, *args), emit(aten.mean.default, x)
        dims = given.get("dim")
        dims = list(range(x.meta["val"].ndim)) if dims is None else dims
        overload = spread.dim if "unbiased" in given else spread.correction
        mean = emit(aten.mean.dim, x, dims, given.get("keepdim", False))
        return emit(overload, x, *args, **kwargs), mean

    return expansion


# --------------------------------------------------------------------------------------------------------------
# Recurrent networks


def _part(emit: Emit, x: fx.Node, index: int, parts: int) -> fx.Node:
    size = x.meta["val"].shape[-1] // parts
    return emit(aten.slice.Tensor, x, -1, index * size, (index + 1) * size)


def _hidden(emit: Emit, h: fx.Node, weights: Sequence[fx.Node]) -> fx.Node:
    """What the state adds to the pre-activations; `weights` are those of the state and its bias."""
    return emit(aten.linear.default, h, *weights[:2])


def _lstm_cell(emit: Emit, x: fx.Node, state: _State, weights: Sequence[fx.Node]) -> _State:
    h, c = state
    gates = emit(aten.add.Tensor, x, _hidden(emit, h, weights))
    i, f, o = (emit(aten.sigmoid.default, _part(emit, gates, k, 4)) for k in (0, 1, 3))
    g = emit(aten.tanh.default, _part(emit, gates, 2, 4))
    kept, new = emit(aten.mul.Tensor, f, c, signal=c), emit(aten.mul.Tensor, i, g, signal=g)
    c = emit(aten.add.Tensor, kept, new)
    squashed = emit(aten.tanh.default, c)
    h = emit(aten.mul.Tensor, o, squashed, signal=squashed)
    return (h if len(weights) < 3 else emit(aten.linear.default, h, weights[2])), c


def _gru_cell(emit: Emit, x: fx.Node, state: _State, weights: Sequence[fx.Node]) -> _State:
    (h,) = state
    inner = _hidden(emit, h, weights)
    r, z = (
        emit(aten.sigmoid.default, emit(aten.add.Tensor, _part(emit, x, k, 3), _part(emit, inner, k, 3)))
        for k in (0, 1)
    )
    recalled = _part(emit, inner, 2, 3)
    recalled = emit(aten.mul.Tensor, r, recalled, signal=recalled)
    n = emit(aten.tanh.default, emit(aten.add.Tensor, _part(emit, x, 2, 3), recalled))
    new = emit(aten.mul.Tensor, emit(aten.rsub.Scalar, z, 1), n, signal=n)
    return (emit(aten.add.Tensor, new, emit(aten.mul.Tensor, z, h, signal=h)),)


def _plain_cell(activation: Any) -> _Cell:
    def cell(emit: Emit, x: fx.Node, state: _State, weights: Sequence[fx.Node]) -> _State:
        return (emit(activation, emit(aten.add.Tensor, x, _hidden(emit, state[0], weights))),)

    return cell


def _one_step(cell: _Cell) -> Expansion:
    """A cell called by itself, as `torch.nn.LSTMCell` does."""

    def expansion(
        emit: Emit, x: fx.Node, hx: Any, w_ih: fx.Node, w_hh: fx.Node, b_ih: Any = None, b_hh: Any = None
    ) -> Written:
        state = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
        return cell(emit, emit(aten.linear.default, x, w_ih, b_ih), state, (w_hh, b_hh))

    return expansion


def _sequence(cell: _Cell) -> Expansion:
    """All steps of all layers and directions, as `torch.nn.LSTM` takes them."""

    def expansion(
        emit: Emit,
        x: fx.Node,
        hx: Any,
        params: Any,
        has_biases: Any,
        num_layers: Any,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool = False,
    ) -> Written | None:
        if not isinstance(params, (list, tuple)) or (dropout and train):
            return None  # a packed sequence, or random numbers drawn inside
        starts = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
        directions = 2 if bidirectional else 1
        count = len(params) // (num_layers * directions)
        ends: list[_State] = []
        x = emit(aten.transpose.int, x, 0, 1) if batch_first else x
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                own = params[index * count : (index + 1) * count]
                state = tuple(emit(aten.select.int, start, 0, index) for start in starts)
                states = _steps(emit, cell, x, state, own, has_biases, backwards=direction == 1)
                outputs.append(emit(aten.stack.default, [h for h, *_ in (states[::-1] if direction else states)], 0))
                ends.append(states[-1])
            x = outputs[0] if directions == 1 else emit(aten.cat.default, outputs, -1)
        finals = [emit(aten.stack.default, list(parts), 0) for parts in zip(*ends, strict=True)]
        return (emit(aten.transpose.int, x, 0, 1) if batch_first else x), *finals

    return expansion


def _steps(
    emit: Emit, cell: _Cell, x: fx.Node, state: _State, params: Sequence[fx.Node], has_biases: bool, backwards: bool
) -> list[_State]:
    """The states after each step, in the order of the steps."""
    w_ih, w_hh, *rest = params
    b_ih, b_hh = rest[:2] if has_biases else (None, None)
    projection = rest[2:] if has_biases else rest
    pre = emit(aten.linear.default, x, w_ih, b_ih)
    steps = range(x.meta["val"].shape[0])
    states = []
    for t in reversed(steps) if backwards else steps:
        state = cell(emit, emit(aten.select.int, pre, 0, t), state, (w_hh, b_hh, *projection))  # type: ignore[arg-type]
        states.append(state)
    return states


_CELLS: dict[str, _Cell] = {
    "lstm": _lstm_cell,
    "gru": _gru_cell,
    "rnn_tanh": _plain_cell(aten.tanh.default),
    "rnn_relu": _plain_cell(aten.relu.default),
}

EXPANSIONS: dict[str, Expansion] = {
    "glu": _glu,
    "cosine_similarity": _cosine_similarity,
    "pairwise_distance": _pairwise_distance,
    "var_mean": _and_mean(aten.var),
    "std_mean": _and_mean(aten.std),
    **{name: _sequence(cell) for name, cell in _CELLS.items()},
    **{f"{name}_cell": _one_step(cell) for name, cell in _CELLS.items()},
}
"""By the name of the operation: the nodes of its outputs, or `None` where it cannot be written out."""


def expand(state: State, node: fx.Node) -> None:
    """A fused operation, and beside it what it does, written out."""
    args, kwargs = state.operands(node)
    is_written = is_float(node) and not writes(node)
    outputs = EXPANSIONS[operation_name(node)](state.emit_new, *args, **kwargs) if is_written else None
    default(state, node) if outputs is None else define_written(state, node, outputs)


def define_written(state: State, node: fx.Node, outputs: Written) -> None:
    """Says that an operation is what it computes, and to relevance those outputs, which were written out."""
    args, kwargs = state.operands(node)
    value = node.meta["val"]
    whole = state.emit(fused, (node.target, *args), kwargs, value)
    likes = (value,) if isinstance(value, Tensor) else value
    new = []
    for index, (written, like) in enumerate(zip(outputs, likes, strict=True)):
        if written is None:
            result = state.emit(operator.getitem, (state.emit(node.target, args, kwargs, value), index), None, like)
            new.append(state.emit(aten.detach.default, (result,), None, like))
        else:
            new.append(state.emit(as_computed, (written, whole, index), None, like))
    state.define(node, new[0] if isinstance(value, Tensor) else tuple(new))
