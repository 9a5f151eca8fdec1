"""Operators that are written out only where relevance cannot pass them as they are: what they are made of.

Those that are not here are written out by torch's own table of decompositions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrpfunc._capture.expand import Emit, Expansion, Written
from lrpfunc._ops.functions import batch_norm_eval, batch_norm_train
from lrpfunc._torch import aten

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


def _frexp(emit: Emit, x: fx.Node) -> Written:
    exponent = emit(operator.getitem, emit(aten.frexp.Tensor, emit(aten.detach.default, x)), 1)
    return emit(
        aten.div.Tensor, x, emit(aten.exp2.default, emit(aten.to.dtype, exponent, x.meta["val"].dtype))
    ), exponent


def _histogram(
    emit: Emit, x: fx.Node, bins: Any, *, range: Any = None, weight: Any = None, density: bool = False
) -> Written | None:
    """Counts, which are constant, of bins between the smallest and the largest number."""
    if not isinstance(bins, int) or weight is not None:
        return None
    given = {"range": range, "density": density}
    found = emit(aten.histogram.bin_ct, emit(aten.detach.default, x), bins, **given)
    counts, edges = (emit(operator.getitem, found, k) for k in (0, 1))
    if range is None:
        like = x.meta["val"]
        low, high = emit(aten.amin.default, x), emit(aten.amax.default, x)
        steps = emit(aten.linspace.default, 0, 1, bins + 1, dtype=like.dtype, device=like.device)
        edges = emit(aten.add.Tensor, low, emit(aten.mul.Tensor, steps, emit(aten.sub.Tensor, high, low)))
    return counts, edges


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


def _linalg_lu_solve(
    emit: Emit, factors: fx.Node, pivots: fx.Node, right: fx.Node, *, left: bool = True, adjoint: bool = False
) -> Written:
    unpacked = emit(aten.lu_unpack.default, factors, pivots)
    p, lower, upper = (emit(operator.getitem, unpacked, k) for k in range(3))
    matrix = emit(aten.matmul.default, p, emit(aten.matmul.default, lower, upper))
    return (_solved(emit, emit(aten.mT.default, matrix) if adjoint else matrix, right, left),)


def _lu_solve(emit: Emit, right: fx.Node, factors: fx.Node, pivots: fx.Node) -> Written:
    return _linalg_lu_solve(emit, factors, pivots, right)


def _qr(emit: Emit, x: fx.Node, mode: str = "reduced") -> Written | None:
    """By the Cholesky decomposition of `x.mT @ x`, but for signs; of matrices with as many rows as columns, or more."""
    rows, columns = x.meta["val"].shape[-2:]
    if mode != "reduced" or rows < columns:
        return None
    upper = emit(aten.linalg_cholesky.default, emit(aten.matmul.default, emit(aten.mT.default, x), x), upper=True)
    known = emit(operator.getitem, emit(aten.linalg_qr.default, emit(aten.detach.default, x)), 1)
    signs = emit(aten.unsqueeze.default, emit(aten.sgn.default, emit(aten.diagonal.default, known, 0, -2, -1)), -1)
    r = emit(aten.mul.Tensor, upper, signs)
    return emit(aten.matmul.default, x, emit(aten.linalg_inv.default, r)), r


def _polar(emit: Emit, x: fx.Node) -> Written:
    h = emit(aten.linalg_matrix_sqrth.default, emit(aten.matmul.default, emit(aten.mT.default, x), x))
    return emit(aten.matmul.default, x, emit(aten.linalg_inv.default, h)), h


def _slogdet(emit: Emit, matrix: fx.Node) -> Written:
    det = emit(aten.linalg_det.default, matrix)
    return emit(aten.sgn.default, det), emit(aten.log.default, emit(aten.abs.default, det))


def _logdet(emit: Emit, matrix: fx.Node) -> Written:
    return (emit(aten.log.default, emit(aten.linalg_det.default, matrix)),)


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
    "frexp": _frexp,
    "histogram": _histogram,
    "linalg_qr": _qr,
    "linalg_polar": _polar,
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
"""By the name of the operation: the nodes of its outputs, or `None` where it cannot be written out."""
