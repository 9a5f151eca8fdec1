"""Random calls of every operator that the table of operators has a record of."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrpfunc._ops import functions


class Draw:
    """A source of random arguments."""

    def __init__(self, seed: int):
        self._choice = seed
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=torch.float64) + 0.1

    def index(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self._generator)

    def mask(self, *shape: int) -> Tensor:
        return self(*shape) > 0

    def one_of(self, *choices: Any) -> Any:
        """Each of them in turn, from seed to seed."""
        self._choice, chosen = divmod(self._choice, len(choices))
        return choices[chosen]

    @property
    def number(self) -> float:
        return self.one_of(0.0, 2.0, -1.5, 0.5)


Sample = Callable[[Draw], tuple[Any, ...]]


def _lstm(d: Draw, x: Tensor, *batch_sizes: Tensor) -> tuple[Any, ...]:
    """Of a batch, or of a packed sequence with its sizes."""
    weights = [p for n in (4, 5) for p in (d(20, n), d(20, 5))]
    how = (False, 2, d.one_of(0.0, 0.5), d.one_of(True, False), False)
    return (x, *batch_sizes, [d(2, 2, 5), d(2, 2, 5)], weights, *how, *(() if batch_sizes else (False,)))


def _positive_definite(x: Tensor) -> Tensor:
    return x @ x.mT + torch.eye(len(x), dtype=x.dtype)


# A dictionary at the end holds arguments that are given by name. What is not here takes a matrix.
_SAMPLES: dict[str, Sample] = {
    # -- shapes
    "view _unsafe_view reshape view_copy": lambda d: (d(3, 4), [2, 6]),
    "_reshape_alias": lambda d: (d(3, 4), [2, 6], [6, 1]),
    "unflatten": lambda d: (d(3, 4), 1, [2, 2]),
    "squeeze squeeze_copy": lambda d: (d(3, 1, 4),),
    "unsqueeze": lambda d: (d(3, 4), 1),
    "transpose movedim moveaxis swapaxes swapdims": lambda d: (d(3, 4), 0, 1),
    "permute permute_copy": lambda d: (d(3, 4), [1, 0]),
    "expand expand_copy broadcast_to": lambda d: (d(1, 4), [3, 4]),
    "repeat tile": lambda d: (d(3, 4), [2, 1]),
    "repeat_interleave": lambda d: (d(3, 4), 2, 0),
    "meshgrid": lambda d: ([d(2), d(3)],),
    "to": lambda d: (d(3, 4), torch.float64),
    "slice slice_copy": lambda d: (d(3, 4), 0, 0, 2),
    "select select_copy": lambda d: (d(3, 4), 0, 1),
    "narrow narrow_copy": lambda d: (d(3, 4), 0, 0, 2),
    "split chunk tensor_split unsafe_split unsafe_chunk hsplit": lambda d: (d(4, 4), 2),
    "split_with_sizes": lambda d: (d(3, 4), [1, 2]),
    "vsplit": lambda d: (d(4, 2), 2),
    "dsplit": lambda d: (d(2, 2, 4), 2),
    "cat concat concatenate stack hstack vstack dstack column_stack": lambda d: ([d(3, 4), d(3, 4)],),
    "gather": lambda d: (d(3, 4), 1, d.index(4, 3, 2)),
    "index": lambda d: (d(3, 4), [d.index(3, 2)]),
    "index_select": lambda d: (d(3, 4), 0, d.index(3, 2)),
    "take": lambda d: (d(3, 4), d.index(12, 5)),
    "take_along_dim": lambda d: (d(3, 4), d.index(4, 3, 2), 1),
    "masked_select": lambda d: (d(3, 4), d.mask(3, 4)),
    "embedding": lambda d: (d(5, 3), d.index(5, 4)),
    "flip": lambda d: (d(3, 4), [0]),
    "roll": lambda d: (d(3, 4), [1], [0]),
    "as_strided": lambda d: (d(3, 4), [2, 2], [4, 1]),
    "unfold": lambda d: (d(3, 4), 1, 2, 1),
    "im2col": lambda d: (d(1, 2, 4, 4), [2, 2], [1, 1], [1, 1], [1, 1]),
    "pixel_shuffle channel_shuffle native_channel_shuffle": lambda d: (d(1, 4, 2, 2), 2),
    "pixel_unshuffle": lambda d: (d(1, 1, 4, 4), 2),
    "reflection_pad1d replication_pad1d": lambda d: (d(1, 2, 4), [1, 1]),
    "reflection_pad2d replication_pad2d": lambda d: (d(1, 2, 4, 4), [1] * 4),
    "reflection_pad3d replication_pad3d": lambda d: (d(1, 2, 4, 4, 4), [1] * 6),
    "pad": lambda d: (d(3, 4), [1, 1], "constant", d.number),
    "constant_pad_nd": lambda d: (d(3, 4), [1, 1], d.number),
    "where": lambda d: (d.mask(3, 4), d(3, 4), d(3, 4)),
    "masked_fill": lambda d: (d(3, 4), d.mask(3, 4), d.number),
    "nan_to_num": lambda d: (d(3, 4), d.number, None, d.number),
    "masked_scatter": lambda d: (d(3, 4), d.mask(3, 4), d(12)),
    "slice_scatter": lambda d: (d(3, 4), d(2, 4), 0, 0, 2),
    "select_scatter": lambda d: (d(3, 4), d(4), 0, 1),
    "diagonal_scatter": lambda d: (d(3, 3), d(3)),
    "overwrite": lambda d: (d(3, 4), d(2, 4), lambda x: x[:2]),
    "scatter": lambda d: (d(3, 4), 0, d.index(3, 2, 4), d.number),
    "scatter.src scatter_add": lambda d: (d(3, 4), 0, d.index(3, 2, 4), d(2, 4)),
    "scatter.reduce": lambda d: (d(3, 4), 0, d.index(3, 2, 4), d(2, 4), {"reduce": "multiply"}),
    "scatter.value_reduce": lambda d: (d(3, 4), 0, d.index(3, 2, 4), 2.0, {"reduce": "multiply"}),
    "view.dtype": lambda d: (d(3, 4), torch.int64),
    "index_fill": lambda d: (d(3, 4), 0, d.index(3, 2), d.number),
    "index_copy": lambda d: (d(3, 4), 0, d.index(3, 2), d(2, 4)),
    "index_put _unsafe_index_put": lambda d: (d(3, 4), [d.index(3, 2)], d(2, 4)),
    "copied": lambda d: (d(3, 4), d(4)),
    "filled": lambda d: (d(3, 4), d(1).squeeze()),
    "as_computed": lambda d: (d(3, 4), None, 0),
    "getitem": lambda d: (d(3, 4), 1),
    # -- winners and averages
    "max_pool1d max_pool1d_with_indices avg_pool1d": lambda d: (d(1, 2, 6), [2]),
    "max_pool2d max_pool2d_with_indices": lambda d: (d(1, 2, 6, 6), [2, 2], [1, 1], [1, 1]),
    "max_pool3d max_pool3d_with_indices": lambda d: (d(1, 2, 6, 6, 6), [2, 2, 2], [2, 2, 2], [1, 1, 1]),
    "adaptive_max_pool1d adaptive_avg_pool1d": lambda d: (d(1, 2, 6), [3]),
    "adaptive_max_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d": lambda d: (d(1, 2, 6, 6), [3, 2]),
    "adaptive_max_pool3d adaptive_avg_pool3d _adaptive_avg_pool3d": lambda d: (d(1, 2, 6, 6, 6), [3, 2, 1]),
    "fractional_max_pool2d": lambda d: (d(1, 2, 6, 6), [2, 2], [3, 3], d.positive(1, 2, 2) / 2),
    "fractional_max_pool3d": lambda d: (d(1, 2, 6, 6, 6), [2] * 3, [3] * 3, d.positive(1, 2, 3) / 2),
    "avg_pool2d": lambda d: (d(1, 2, 6, 6), [2, 2], [2, 2], [1, 1], False, True, d.one_of(None, 3, -3)),
    "avg_pool3d": lambda d: (d(1, 2, 6, 6, 6), [2] * 3, [2] * 3, [1] * 3, False, True, d.one_of(None, 3, -3)),
    "amax amin mean sum nansum": lambda d: (d(3, 4), [1]),
    "max min median": lambda d: d.one_of((d(3, 4),), (d(3, 4), 1)),
    "topk kthvalue": lambda d: (d(3, 4), 2),
    "max.other min.other maximum minimum fmax fmin": lambda d: (d(3, 4), d(3, 4)),
    # -- linear
    "add sub subtract": lambda d: (d(3, 4), *d.one_of((d(3, 4),), (0.0,), (d(3, 4), {"alpha": -0.5}), (2.0,), (-1.5,))),
    "rsub": lambda d: (d(3, 4), d(3, 4), {"alpha": d.one_of(1, 2.0, -0.5)}),
    "cumsum": lambda d: (d(3, 4), 0),
    "sum_to_size": lambda d: (d(3, 4), [1, 4]),
    "col2im": lambda d: (d(1, 8, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    "upsample_nearest1d _upsample_nearest_exact1d": lambda d: (d(1, 2, 3), [5]),
    "upsample_nearest2d _upsample_nearest_exact2d": lambda d: (d(1, 2, 3, 3), [5, 5]),
    "upsample_nearest3d _upsample_nearest_exact3d": lambda d: (d(1, 2, 3, 3, 3), [5, 5, 5]),
    "upsample_linear1d": lambda d: (d(1, 2, 3), [5], d.one_of(True, False)),
    "upsample_bilinear2d _upsample_bilinear2d_aa": lambda d: (d(1, 2, 3, 3), [5, 2], d.one_of(True, False)),
    "upsample_bicubic2d _upsample_bicubic2d_aa": lambda d: (d(1, 2, 3, 3), [5, 2], d.one_of(True, False)),
    "upsample_trilinear3d": lambda d: (d(1, 2, 3, 3, 3), [5, 5, 5], d.one_of(True, False)),
    "diff": lambda d: (d(3, 4), 1, -1, d(3, 1), d(3, 1)),
    "index_add": lambda d: (d(3, 4), 0, d.index(3, 2), d(2, 4), {"alpha": d.one_of(1, 2.0, -0.5)}),
    "lerp": lambda d: (d(3, 4), d(3, 4), d.one_of(d(3, 4), 1.5)),
    "addcdiv addcmul": lambda d: (d(3, 4), d(3, 4), d(3, 4)),
    "grid_sampler grid_sampler_2d": lambda d: (d(1, 2, 4, 4), d(1, 3, 3, 2) / 3, d.index(2).item(), 0, False),
    "grid_sampler_3d": lambda d: (d(1, 2, 4, 4, 4), d(1, 3, 3, 3, 3) / 3, d.index(2).item(), 0, False),
    "sigmoid_backward tanh_backward gelu_backward silu_backward": lambda d: (d(3, 4), d(3, 4)),
    "threshold_backward": lambda d: (d(3, 4), d(3, 4), 0),
    "logit_backward": lambda d: (d(3, 4), d.positive(3, 4) / 2),
    "native_dropout_backward": lambda d: (d(3, 4), d.mask(3, 4), 2.0),
    # -- products and quotients
    "mul multiply div divide true_divide": lambda d: (d(3, 4), d.one_of(d(3, 4), 2.0, -3)),
    "div.Tensor_mode divide.Tensor_mode": lambda d: (d(3, 4), d(3, 4), {"rounding_mode": "floor"}),
    "div.Scalar_mode divide.Scalar_mode": lambda d: (d(3, 4), 2.0, {"rounding_mode": "trunc"}),
    "linear": lambda d: (d(2, 3, 4), d(5, 4), d(5)),
    "mm matmul inner": lambda d: (d(4, 4), d(4, 4)),
    "addmm": lambda d: (d(5), d(3, 4), d(4, 5), {"alpha": d.one_of(1, 2.0), "beta": d.number}),
    "baddbmm": lambda d: (d(5), d(2, 3, 4), d(2, 4, 5), {"alpha": d.one_of(1, 2.0)}),
    "addmv": lambda d: (d(3), d(3, 4), d(4)),
    "bmm": lambda d: (d(2, 3, 4), d(2, 4, 5)),
    "mv": lambda d: (d(3, 4), d(4)),
    "dot vdot outer": lambda d: (d(4), d(4)),
    "tensordot": lambda d: (d(3, 4), d(4, 5), [1], [0]),
    "kron": lambda d: (d(2, 3), d(3, 2)),
    "einsum": lambda d: ("ij,jk,k->i", [d(3, 4), d(4, 5), d(5)]),
    "bilinear": lambda d: (d(2, 3), d(2, 4), d(5, 3, 4), d(5)),
    "_trilinear": lambda d: (d(2, 3), d(5, 3, 4), d(2, 4), [1, 3], [0], [1, 2], [2, 3]),
    "conv1d": lambda d: (d(1, 2, 6), d(3, 2, 2), d(3)),
    "conv2d": lambda d: (d(1, 2, 6, 6), d(3, 2, 2, 2), d(3)),
    "conv3d": lambda d: (d(1, 2, 4, 4, 4), d(3, 2, 2, 2, 2), d(3)),
    "conv_transpose1d": lambda d: (d(1, 2, 6), d(2, 3, 2), d(3)),
    "conv_transpose2d": lambda d: (d(1, 2, 6, 6), d(2, 3, 2, 2), d(3)),
    "conv_transpose3d": lambda d: (d(1, 2, 4, 4, 4), d(2, 3, 2, 2, 2), d(3)),
    "convolution": lambda d: (d(1, 2, 6), d(3, 2, 2), d(3), [1], [0], [1], False, [0], 1),
    "_convolution": lambda d: (d(1, 2, 6), d(3, 2, 2), d(3), [1], [0], [1], False, [0], 1, False, False, False, False),
    # -- activations
    "prelu _prelu_kernel": lambda d: (d(3, 4), d(1)),
    "threshold": lambda d: (d(3, 4), d.number, d.number),
    "softplus": lambda d: d.one_of((d(3, 4),), (d(3, 4), d.one_of(2.0, -2.0)), (d(3, 4), 1.0, -3.0)),
    "leaky_relu": lambda d: (d(3, 4), d.number),
    "elu": lambda d: (d(3, 4), d.number, 2.0, 0.5),
    "celu": lambda d: (d(3, 4), d.one_of(0.5, 2.0)),
    "hardshrink softshrink": lambda d: (d(3, 4), d.one_of(0.0, 0.5)),
    "hardtanh": lambda d: (d(3, 4), *d.one_of((), (0.0, 2.0), (-1.5, 2.0), (0.5, 0.5), (-2.0, -1.0))),
    "clamp clip": lambda d: (
        d(3, 4),
        *d.one_of((0.0, None), (0.5, 2.0), (-1.5, 2.0), (None, 0.5), (0.5, -1.5), (None, -1.0)),
    ),
    "clamp_min clamp_max": lambda d: (d(3, 4), d.number),
    "pow float_power": lambda d: (d(3, 4), d.one_of(2, 0.5, -1, 3, 1.5, 0, 1, -2, 2.0)),
    "logit special_logit": lambda d: (d.positive(3, 4) / 2,),
    "fmod remainder hypot atan2 arctan2 logaddexp logaddexp2 ldexp xlogy": lambda d: (d(3, 4), d.positive(3, 4)),
    "copysign heaviside floor_divide nextafter": lambda d: (d(3, 4), d(3, 4)),
    "igamma igammac": lambda d: (d.positive(3, 4), d.positive(3, 4)),
    "special_zeta": lambda d: (d.positive(3, 4) + 2, d.positive(3, 4)),
    "polygamma": lambda d: (1, d.positive(3, 4)),
    "acosh arccosh": lambda d: (d.positive(3, 4) + 1,),
    "lgamma digamma log log2 log10": lambda d: (d.positive(3, 4),),
    # -- along axes
    "softmax log_softmax _safe_softmax": lambda d: (d(3, 4), d.one_of(0, 1, -1)),
    "_softmax _log_softmax": lambda d: (d(3, 4), d.one_of(0, 1), False),
    "logsumexp": lambda d: (d(3, 4), d.one_of([0], [1], [0, 1])),
    "std var": lambda d: d.one_of((d(3, 4),), (d(3, 4), [1], {"correction": d.one_of(0, 1)})),
    "norm": lambda d: (d(3, 4), d.one_of(0, 1, 2, 3.0), [1]),
    "linalg_norm": lambda d: (d(3, 4), d.one_of(None, 1, 2, torch.inf)),
    "linalg_vector_norm": lambda d: (d(3, 4), d.one_of(0, 1, 2, torch.inf), [1]),
    "layer_norm native_layer_norm": lambda d: (d(3, 4), [4], d(4), d(4), 1e-5),
    "rms_norm": lambda d: (d(3, 4), [4], d(4), d.one_of(None, 1e-5)),
    "_fused_rms_norm": lambda d: (d(3, 4), [4], d(4), 1e-5),
    "group_norm": lambda d: (d(2, 4, 3), 2, d(4), d(4)),
    "native_group_norm": lambda d: (d(2, 4, 3), d(4), d(4), 2, 4, 3, 2, 1e-5),
    "instance_norm": lambda d: (
        *(d(2, 4, 3), d(4), d(4)),
        *d.one_of((None, None, True), (d(4), d.positive(4), False)),
        *(0.1, 1e-5, False),
    ),
    "batch_norm_train": lambda d: (d(2, 4, 3), d(4), d(4), 1e-5),
    "batch_norm_eval": lambda d: (d(2, 4, 3), d(4), d(4), d(4), d.positive(4), 1e-5),
    "scaled_dot_product_attention _scaled_dot_product_attention_math": lambda d: (
        *(d(1, 2, 3, 4), d(1, 2, 3, 4), d(1, 2, 3, 4), d(3, 3)),
        d.one_of(0.0, 0.5),
    ),
    "_scaled_dot_product_flash_attention_for_cpu": lambda d: (d(1, 2, 3, 4), d(1, 2, 3, 4), d(1, 2, 3, 4)),
    # -- of matrices, of elements that accumulate
    "broadcast_tensors": lambda d: ([d(3, 1), d(1, 4)],),
    "unfold_copy": lambda d: (d(3, 4), 1, 2, 1),
    "cummax cummin": lambda d: (d(3, 4), 1),
    **{
        f"segment_reduce:{how}": lambda d, how=how: (d(3, 4), how, {"lengths": torch.tensor([2, 1]), "unsafe": True})
        for how in ("sum", "mean")
    },
    "stft": lambda d: (d(3, 8), 4, {"onesided": True, "return_complex": False}),
    "embedding_bag": lambda d: (d(3, 4), d.index(3, 5), torch.tensor([0, 2]), False, d.one_of(0, 1)),
    "block_diag": lambda d: ([d(2, 2), d(3)],),
    "combinations": lambda d: (d(4),),
    "as_strided_scatter": lambda d: (d(3, 4), d(2, 2), [2, 2], [4, 1], 0),
    "_unsafe_masked_index": lambda d: (d(3, 4), d.mask(2, 2), [d.index(3, 2, 2), d.index(4, 2, 2)], 2.0),
    "_unsafe_masked_index_put_accumulate": lambda d: (
        *(d(3, 4), d.mask(2, 2), [d.index(3, 2, 2), d.index(4, 2, 2)], d(2, 2)),
    ),
    **{
        f"scatter_reduce:{how}": lambda d, how=how: (
            *(d(3, 4), 1, d.index(4, 3, 4), d(3, 4), how),
            {"include_self": d.one_of(True, False)},
        )
        for how in ("sum", "mean", "prod", "amax", "amin")
    },
    **{
        f"index_reduce:{how}": lambda d, how=how: (
            *(d(3, 4), 0, d.index(3, 3), d(3, 4), how),
            {"include_self": d.one_of(True, False)},
        )
        for how in ("mean", "prod", "amax", "amin")
    },
    "linalg_det det linalg_eigvalsh linalg_inv inverse linalg_inv_ex cholesky_inverse": lambda d: (d(3, 3),),
    "linalg_matrix_power matrix_power": lambda d: (d(3, 3), d.one_of(2, 3, -1)),
    "frobenius_norm": lambda d: (d(3, 4), [0, 1]),
    "linalg_cholesky linalg_cholesky_ex linalg_matrix_sqrth": lambda d: (_positive_definite(d(3, 3)),),
    "lu_unpack": lambda d: tuple(torch.linalg.lu_factor(d(3, 3))),
    # -- without a derivative
    "div:floor divide:floor": lambda d: (d(3, 4), 0.3, {"rounding_mode": "floor"}),
    "div:trunc divide:trunc": lambda d: (d(3, 4), 0.3, {"rounding_mode": "trunc"}),
    "normal": lambda d: (d(3, 4), 1.0),
    "geometric": lambda d: (d.positive(3, 4), 0.5),
    "poisson": lambda d: (d.positive(3, 4),),
    "randint_like": lambda d: (d(3, 4), 5),
    "full_like": lambda d: (d(3, 4), 2.0),
    "new_zeros new_ones new_empty": lambda d: (d(3, 4), [2]),
    "new_full": lambda d: (d(3, 4), [2], 2.0),
    "bernoulli": lambda d: (d.positive(3, 4) / 2,),
    "dropout_mask": lambda d: (d(3, 4), 0.5, "dropout"),
    "batch_statistics": lambda d: (d(3, 4), d(4), d.positive(4), 0.1),
    "instance_statistics": lambda d: (d(2, 4, 3), d(4), d.positive(4), 0.1),
    "fused": lambda d: (torch.ops.aten.relu.default, d(3, 4)),
    "special_hermite_polynomial_h special_hermite_polynomial_he": lambda d: (d(3, 4), d.index(3, 3, 4).double()),
    "special_laguerre_polynomial_l special_legendre_polynomial_p": lambda d: (d(3, 4), d.index(3, 3, 4).double()),
    **{
        f"special_{shifted}chebyshev_polynomial_{letter}": lambda d: (d(3, 4), d.index(3, 3, 4).double())
        for letter in "tuvw"
        for shifted in ("", "shifted_")
    },
    "dropout alpha_dropout feature_alpha_dropout": lambda d: (d(3, 4), 0.5, d.one_of(True, False)),
    "rrelu": lambda d: (d(3, 4), 0.1, 0.3, d.one_of(True, False)),
    "lstm": lambda d: _lstm(d, *d.one_of((d(3, 2, 4),), (d(4, 4), torch.tensor([2, 1, 1])))),
    "gru": lambda d: (
        *(d(3, 2, 4), d(2, 2, 5), [p for n in (4, 5) for p in (d(15, n), d(15, 5))]),
        *(False, 2, d.one_of(0.0, 0.5), d.one_of(True, False), False, False),
    ),
    "rnn_tanh rnn_relu": lambda d: (
        *(d(3, 2, 4), d(2, 2, 5), [p for n in (4, 5) for p in (d(5, n), d(5, 5))]),
        *(False, 2, d.one_of(0.0, 0.5), d.one_of(True, False), False, False),
    ),
}

SAMPLES = {name: sample for alike, sample in _SAMPLES.items() for name in alike.split()}

NOT_DRAWN = {
    "cuda": "needs a device",
    "_grouped_mm": "has a kernel for bfloat16 on a device alone",
    "_scaled_dot_product_attention_math_for_mps": "needs a device",
    "_scaled_dot_product_flash_attention": "needs a device",
    "_scaled_dot_product_efficient_attention": "needs a device",
    "_scaled_dot_product_cudnn_attention": "needs a device",
    "_scaled_dot_product_fused_attention_overrideable": "needs a device of somebody else's",
}
"""Operators that cannot be called here, and why."""


def drawn(name: str, seed: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """An operator, whichever overload serves, and random arguments."""
    args = SAMPLES.get(name, lambda d: (d(3, 4),))(Draw(seed))
    kwargs = args[-1] if isinstance(args[-1], dict) else {}
    args = args[: len(args) - bool(kwargs)]
    return target(name, args, kwargs), args, kwargs


def target(name: str, args: Any, kwargs: Any) -> Any:
    """The function of ours, or torch's overload for these arguments."""
    if name == "getitem":
        return operator.getitem
    if hasattr(functions, name):
        return getattr(functions, name)
    packet, _, overload = name.partition(":")[0].partition(".")
    found: Any = getattr(torch.ops.aten, packet)
    if not overload:
        overload = torch._C._jit_resolve_packet(f"aten::{packet}", *args, **kwargs)  # pyright: ignore
    return getattr(found, overload or "default")
