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
from lrpfunc._ops.functions import as_computed, batch_norm_eval, batch_norm_train, fused
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
# Functions of several operands


def _lerp(emit: Emit, start: fx.Node, end: fx.Node, weight: Any) -> Written:
    step = emit(aten.mul.Tensor, emit(aten.sub.Tensor, end, start), weight)
    return (emit(aten.add.Tensor, start, step),)


def _copysign(emit: Emit, x: Any, sign: fx.Node) -> Written | None:
    """The sign of a tensor carries no relevance."""
    return (emit(aten.copysign.Tensor, x, emit(aten.detach.default, sign)),) if isinstance(x, fx.Node) else None


def _logaddexp(emit: Emit, x: fx.Node, y: fx.Node) -> Written:
    shape = list(torch.broadcast_shapes(x.meta["val"].shape, y.meta["val"].shape))
    both = [emit(aten.expand.default, operand, shape) for operand in (x, y)]
    return (emit(aten.logsumexp.default, emit(aten.stack.default, both, 0), [0]),)


def _addbmm(emit: Emit, x: fx.Node, *factors: fx.Node, beta: float = 1, alpha: float = 1) -> Written:
    product = emit(aten.sum.dim_IntList, emit(aten.bmm.default, *factors), [0])
    product = product if alpha == 1 else emit(aten.mul.Tensor, product, alpha)
    if beta == 0:
        return (product,)
    return (emit(aten.add.Tensor, product, x, alpha=beta),)


def _cdist(emit: Emit, x: fx.Node, y: fx.Node, p: float = 2.0, *_: Any) -> Written:
    difference = emit(aten.sub.Tensor, emit(aten.unsqueeze.default, x, -2), emit(aten.unsqueeze.default, y, -3))
    return (emit(aten.linalg_vector_norm.default, difference, p, [-1]),)


def _pdist(emit: Emit, x: fx.Node, p: float = 2.0) -> Written:
    n = x.meta["val"].shape[0]
    pairs = emit(aten.triu_indices.default, n, n, 1, device=x.meta["val"].device)
    first, second = (emit(aten.index_select.default, x, 0, emit(aten.select.int, pairs, 0, k)) for k in (0, 1))
    return (emit(aten.linalg_vector_norm.default, emit(aten.sub.Tensor, first, second), p, [-1]),)


def _of_prefixes(reduction: Callable[[Emit, fx.Node, int], fx.Node]) -> Expansion:
    """What accumulates along an axis, as reductions of more and more of it; each element has its share in each."""

    def expansion(emit: Emit, x: fx.Node, dim: int, dtype: Any = None) -> Written | None:
        if dtype is not None:
            x = emit(aten.to.dtype, x, dtype)
        if x.meta["val"].ndim == 0:
            return (emit(aten.clone.default, x),)
        sizes = range(1, x.meta["val"].shape[dim] + 1)
        reduced = [reduction(emit, emit(aten.slice.Tensor, x, dim, 0, size), dim) for size in sizes]
        return (emit(aten.stack.default, reduced, dim),) if reduced else None

    return expansion


def _prod(emit: Emit, x: fx.Node, dim: int) -> fx.Node:
    return emit(aten.prod.dim_int, x, dim)


def _logsumexp(emit: Emit, x: fx.Node, dim: int) -> fx.Node:
    return emit(aten.logsumexp.default, x, [dim])


def _layer_norm(
    emit: Emit, x: fx.Node, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Written | None:
    """With parameters that depend on the explained input."""
    if weight is None and bias is None:
        return None
    y = emit(aten.layer_norm.default, x, shape, None, None, eps)
    y = y if weight is None else emit(aten.mul.Tensor, y, weight)
    return (y if bias is None else emit(aten.add.Tensor, y, bias),)


def _group_norm(
    emit: Emit, x: fx.Node, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Written | None:
    if weight is None and bias is None:
        return None
    return (_per_channel(emit, emit(aten.group_norm.default, x, groups, None, None, eps), weight, bias),)


def _batch_norm(emit: Emit, x: fx.Node, weight: Any, bias: Any, *rest: Any) -> Written | None:
    if weight is None and bias is None:
        return None
    plain = emit(batch_norm_eval if len(rest) > 1 else batch_norm_train, x, None, None, *rest)
    return (_per_channel(emit, plain, weight, bias),)


def _per_channel(emit: Emit, y: fx.Node, weight: Any, bias: Any) -> fx.Node:
    shape = [-1] + [1] * (y.meta["val"].ndim - 2)
    y = y if weight is None else emit(aten.mul.Tensor, y, emit(aten.reshape.default, weight, shape))
    return y if bias is None else emit(aten.add.Tensor, y, emit(aten.reshape.default, bias, shape))


def _prelu(emit: Emit, x: fx.Node, weight: fx.Node) -> Written:
    like, slopes = x.meta["val"], weight.meta["val"]
    if slopes.ndim < like.ndim:
        channels = [1, -1] + [1] * (like.ndim - 2) if like.ndim > 1 else [-1] * like.ndim
        weight = emit(aten.reshape.default, weight, channels)
    return (emit(aten.where.self, emit(aten.gt.Scalar, x, 0), x, emit(aten.mul.Tensor, x, weight)),)


def _put(emit: Emit, x: fx.Node, index: fx.Node, source: fx.Node, accumulate: bool = False) -> Written:
    flat, places, values = (emit(aten.reshape.default, t, [-1]) for t in (x, index, source))
    put = emit(aten.index_put.default, flat, [places], values, accumulate)
    return (emit(aten.reshape.default, put, list(x.meta["val"].shape)),)


def broadcast(emit: Emit, target: Any, *args: Any, **kwargs: Any) -> Written:
    """A pointwise operation of tensors that all have the shape of its result."""
    shape = torch.broadcast_shapes(*(a.meta["val"].shape for a in args if isinstance(a, fx.Node)))

    def whole(a: Any) -> Any:
        is_part = isinstance(a, fx.Node) and a.meta["val"].shape != shape
        return emit(aten.expand.default, a, list(shape)) if is_part else a

    return (emit(target, *map(whole, args), **kwargs),)


def _cond(emit: Emit, matrix: fx.Node, p: Any = None) -> Written | None:
    if p not in (None, 2, -2):
        return None
    values = emit(aten.linalg_svdvals.default, matrix)
    extremes = [emit(reduction, values, [-1]) for reduction in (aten.amax.default, aten.amin.default)]
    return (emit(aten.div.Tensor, *(extremes[::-1] if p == -2 else extremes)),)


# --------------------------------------------------------------------------------------------------------------
# Linear equations, as products with the inverse


def _solved(emit: Emit, matrix: fx.Node, right: fx.Node, left: bool = True) -> fx.Node:
    a, b = matrix.meta["val"], right.meta["val"]
    inverse = emit(aten.linalg_inv.default, matrix)
    if b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1]):  # vectors
        column = emit(aten.unsqueeze.default, right, -1)
        return emit(aten.squeeze.dim, emit(aten.matmul.default, inverse, column), -1)
    return emit(aten.matmul.default, *((inverse, right) if left else (right, inverse)))


def _solve(emit: Emit, matrix: fx.Node, right: fx.Node, *, left: bool = True) -> Written:
    return (_solved(emit, matrix, right, left),)


def _solve_and(others: int) -> Expansion:
    """The same, of an operation that returns more of how it went."""

    def expansion(emit: Emit, matrix: fx.Node, right: fx.Node, *, left: bool = True, **_: Any) -> Written:
        return _solved(emit, matrix, right, left), *[None] * others

    return expansion


def _solve_triangular(
    emit: Emit, matrix: fx.Node, right: fx.Node, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Written | None:
    if unitriangular:
        return None
    part = emit(aten.triu.default if upper else aten.tril.default, matrix)
    inverse = emit(aten.linalg_inv.default, part)
    return (emit(aten.matmul.default, *((inverse, right) if left else (right, inverse))),)


def _solve_by_triangle(
    emit: Emit,
    right: fx.Node,
    matrix: fx.Node,
    upper: bool = True,
    transpose: bool = False,
    unitriangular: bool = False,
) -> Written | None:
    if transpose or unitriangular:
        return None
    part = emit(aten.triu.default if upper else aten.tril.default, matrix)
    solution = emit(aten.matmul.default, emit(aten.linalg_inv.default, part), right)
    return solution, emit(aten.clone.default, matrix)


def _cholesky_solve(emit: Emit, right: fx.Node, factor: fx.Node, upper: bool = False) -> Written:
    inverse = emit(aten.cholesky_inverse.default, factor, upper)
    return (emit(aten.matmul.default, inverse, right),)


def _lu_solve(emit: Emit, right: fx.Node, factors: fx.Node, pivots: fx.Node) -> Written:
    unpacked = emit(aten.lu_unpack.default, factors, pivots)
    p, lower, upper = (emit(operator.getitem, unpacked, k) for k in range(3))
    matrix = emit(aten.matmul.default, p, emit(aten.matmul.default, lower, upper))
    return (_solved(emit, matrix, right),)


def _linalg_lu_solve(
    emit: Emit, factors: fx.Node, pivots: fx.Node, right: fx.Node, *, left: bool = True, adjoint: bool = False
) -> Written | None:
    return _lu_solve(emit, right, factors, pivots) if left and not adjoint else None


def _slogdet(emit: Emit, matrix: fx.Node) -> Written:
    det = emit(aten.linalg_det.default, matrix)
    return emit(aten.sgn.default, det), emit(aten.log.default, emit(aten.abs.default, det))


def _logdet(emit: Emit, matrix: fx.Node) -> Written:
    return (emit(aten.log.default, emit(aten.linalg_det.default, matrix)),)


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

WRITTEN: dict[str, Expansion] = {
    "lerp": _lerp,
    "logaddexp": _logaddexp,
    "copysign": _copysign,
    "addbmm": _addbmm,
    "cdist": _cdist,
    "cumprod": _of_prefixes(_prod),
    "logcumsumexp": _of_prefixes(_logsumexp),
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "batch_norm_eval": _batch_norm,
    "batch_norm_train": _batch_norm,
    "linalg_cond": _cond,
    "triangular_solve": _solve_by_triangle,
    "prelu": _prelu,
    "_prelu_kernel": _prelu,
    "put": _put,
    "linalg_solve": _solve,
    "linalg_solve_ex": _solve_and(1),
    "_linalg_solve_ex": _solve_and(3),
    "linalg_solve_triangular": _solve_triangular,
    "cholesky_solve": _cholesky_solve,
    "lu_solve": _lu_solve,
    "linalg_lu_solve": _linalg_lu_solve,
    "linalg_slogdet": _slogdet,
    "slogdet": _slogdet,
    "logdet": _logdet,
    "pdist": _pdist,
    "_pdist_forward": _pdist,
}
"""The same for those that are written out only where relevance cannot pass them as they are."""


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
