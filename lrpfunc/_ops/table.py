"""All operators of torch that something is known of.

Overloads share a record, unless one has its own under the name with a dot. Operators that are alike stand in one line;
`a=b` are two names of one operator. What has no record here is nothing that relevance can pass through, unless torch
tags it as pointwise: see `of` in `_ops/call`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from lrpfunc._ops import conditions as when
from lrpfunc._ops import functions, held
from lrpfunc._ops.operator import Claim, Kind, Operator
from lrpfunc._torch import aten

_ALWAYS, _ALL, _ANY = Claim.ALWAYS, Claim.ALL, Claim.ANY

# What only takes elements from its operands keeps what holds of all of them.
_select = partial(Operator, Kind.SELECT, nonnegative=_ALL, finite=_ALL, degree=1)
_copy = partial(_select, pointwise=True, zero=_ALL)
_winner = partial(Operator, Kind.WINNER, nonnegative=_ALL, finite=_ALL, degree=1)
_larger = partial(_winner, (0, 1), pointwise=True, zero=_ALL)
_sum = partial(Operator, Kind.SUM, finite=_ALL, degree=1)
# Linear with weights none of which is negative.
_blend = partial(Operator, Kind.LINEAR, nonnegative=_ALL, finite=_ALL)
_average = partial(Operator, Kind.AVERAGE, reduces=True, nonnegative=_ALL, finite=_ALL, degree=1)
_activation = partial(Operator, Kind.ACTIVATION, pointwise=True)
_norm = partial(Operator, Kind.STATISTIC, reduces=True, nonnegative=_ALWAYS)
_normalization = partial(Operator, Kind.NORMALIZATION, finite=_ALWAYS)

_RECORDS = {
    # ----------------------------------------------------------------------------------------------------------
    # Each element of the result is an element of an operand, or a constant
    "view _unsafe_view reshape _reshape_alias view_copy flatten unflatten ravel": _select(reshapes=True),
    "squeeze squeeze_copy unsqueeze atleast_1d atleast_2d atleast_3d": _select(reshapes=True),
    "transpose permute permute_copy t numpy_T mT mH=adjoint matrix_H movedim moveaxis swapaxes swapdims": _select(),
    "expand expand_copy broadcast_to repeat repeat_interleave tile meshgrid broadcast_tensors": _select(),
    "contiguous clone alias to _to_copy cpu cuda lift_fresh lift_fresh_copy": _copy(),
    "positive resolve_conj resolve_neg conj_physical real": _copy(),
    "slice slice_copy select select_copy narrow narrow_copy diagonal": _select(),
    "split split_with_sizes chunk unbind tensor_split hsplit vsplit dsplit unsafe_split unsafe_chunk": _select(),
    "cat=concat=concatenate stack hstack vstack dstack column_stack": _select(),
    "gather index index_select take take_along_dim": _select(chooses=True),
    "_unsafe_masked_index": _select((0, 3)),
    "masked_select embedding": _select(),
    "flip fliplr flipud roll rot90 tril triu as_strided unfold unfold_copy im2col": _select(),
    "diag_embed block_diag combinations": _select(),
    "pixel_shuffle pixel_unshuffle channel_shuffle": _select(),
    "reflection_pad1d reflection_pad2d reflection_pad3d": _select(),
    "replication_pad1d replication_pad2d replication_pad3d": _select(),
    "pad": _select((0, 3)),
    "constant_pad_nd": _select((0, 2)),
    "where": _copy((1, 2)),
    "masked_fill": _copy((0, 2)),
    "nan_to_num": _copy((0, 1, 2, 3)),
    "masked_scatter": _select((0, 2)),
    "slice_scatter select_scatter diagonal_scatter as_strided_scatter overwrite": _select((0, 1)),
    "scatter index_fill": _select((0, 3)),
    "scatter.src": _select((0, 3), in_walk=functions.scatter_winners),
    "scatter.reduce scatter.value_reduce view.dtype": Operator(),
    "index_copy": _select((0, 3), in_walk=functions.index_copy_winners),
    "index_put=_unsafe_index_put": _select((0, 2), in_walk=functions.index_put_winners),
    "copied filled": _select((1,)),
    "as_computed": Operator(Kind.SELECT, degree=1, in_walk=functions.written_out),
    # ----------------------------------------------------------------------------------------------------------
    # Each element of the result is the element of an operand that won a comparison
    "max_pool1d": _winner(of_open_sizes=functions.max_pool1d),
    "max_pool1d_with_indices adaptive_max_pool1d": _winner(),
    "max_pool2d max_pool2d_with_indices adaptive_max_pool2d fractional_max_pool2d": _winner(),
    "max_pool3d max_pool3d_with_indices adaptive_max_pool3d fractional_max_pool3d": _winner(),
    "amax amin max min median": _winner(reduces=True),
    "topk sort msort kthvalue mode cummax cummin": _winner(),
    "nanmedian": _winner(reduces=True),
    "maximum=max.other": _larger(epsilon=True),
    "minimum=min.other fmax fmin": _larger(),
    # ----------------------------------------------------------------------------------------------------------
    # Linear, or affine, in all operands together
    "add": _sum((0, 1), pointwise=True, epsilon=True, zero=_ALL, nonnegative=when.keeps_sign_if_scaled_so),
    "sub=subtract rsub": _sum((0, 1), pointwise=True, zero=_ALL),
    "sum nansum": _sum(reduces=True, nonnegative=_ALL),
    "mean": _average(),
    "avg_pool1d avg_pool2d avg_pool3d": _average(nonnegative=when.keeps_sign_unless_divided),
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d": _average(),
    "_adaptive_avg_pool2d _adaptive_avg_pool3d": _average(),
    "cumsum trace sum_to_size col2im": _blend(),
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d": _blend(),
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d": _blend(),
    "upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d": _blend(),
    "upsample_bicubic2d _upsample_bicubic2d_aa": Operator(Kind.LINEAR, finite=_ALL),
    "diff": Operator(Kind.LINEAR, (0, 3, 4), finite=_ALL),
    "scatter_add scatter_reduce:sum scatter_reduce:mean index_reduce:mean": _blend((0, 3)),
    "scatter_reduce:amax scatter_reduce:amin index_reduce:amax index_reduce:amin": _winner((0, 3)),
    "scatter_reduce:prod index_reduce:prod": Operator(),
    "segment_reduce:sum segment_reduce:mean": _blend(),
    "_unsafe_masked_index_put_accumulate": _blend((0, 3)),
    "stft": Operator(Kind.LINEAR),
    "embedding_bag": Operator(Kind.LINEAR),
    "fft_irfft fft_irfft2 fft_irfftn fft_hfft fft_hfft2 fft_hfftn": Operator(Kind.LINEAR),
    "index_add": _blend((0, 3), nonnegative=when.keeps_sign_if_scaled_so),
    "lerp addcdiv": Operator(Kind.LINEAR, (0, 1)),
    "grid_sampler grid_sampler_2d grid_sampler_3d": Operator(Kind.LINEAR),
    "sigmoid_backward tanh_backward threshold_backward gelu_backward": Operator(Kind.LINEAR),
    "native_dropout_backward": Operator(Kind.LINEAR),
    "lu_unpack": Operator(Kind.LINEAR),
    "neg=negative": Operator(Kind.SCALE, pointwise=True, zero=_ALL, finite=_ALL, degree=1),
    "deg2rad rad2deg": Operator(Kind.SCALE, pointwise=True, nonnegative=_ALL, zero=_ALL, finite=_ALL, degree=1),
    # ----------------------------------------------------------------------------------------------------------
    # Products, which are linear in each operand, and quotients
    "mul=multiply": Operator(Kind.PRODUCT, (0, 1), pointwise=True, nonnegative=_ALL, zero=_ANY, finite=_ALL),
    "addcmul": Operator(Kind.PRODUCT, (1, 2), addend=0),
    "div=divide=true_divide": Operator(
        Kind.QUOTIENT,
        (0, 1),
        pointwise=True,
        nonnegative=_ALL,
        zero=when.only_numerator,
        singular=when.divisor,
    ),
    "div:floor div:trunc divide:floor divide:trunc": Operator(differentiable=False),
    "linear": Operator(Kind.DENSE, (0, 1), addend=2, features=0, of_open_sizes=functions.linear),
    "mm matmul": Operator(Kind.DENSE, (0, 1), features=-1),
    "addmm": Operator(Kind.DENSE, (1, 2), addend=0, features=-1),
    "baddbmm addmv": Operator(Kind.DENSE, (1, 2), addend=0),
    "bmm mv dot vdot inner outer tensordot kron _grouped_mm": Operator(Kind.DENSE, (0, 1)),
    "einsum": Operator(Kind.DENSE, (1,)),
    "bilinear": Operator(Kind.DENSE, (0, 1, 2), addend=3),
    "_trilinear": Operator(Kind.DENSE, (0, 1, 2)),
    "conv1d conv2d conv3d": Operator(Kind.CONVOLUTION, (0, 1), addend=2),
    "conv_transpose1d conv_transpose2d conv_transpose3d": Operator(Kind.CONVOLUTION, (0, 1), addend=2),
    "convolution=_convolution": Operator(Kind.CONVOLUTION, (0, 1), addend=2),
    # ----------------------------------------------------------------------------------------------------------
    # Functions of each element by itself
    "relu": _activation(nonnegative=_ALWAYS, zero=_ALL, finite=_ALL, degree=1),
    "leaky_relu prelu=_prelu_kernel": _activation(zero=_ALL, finite=_ALL, degree=1),
    "abs=absolute": _activation(nonnegative=_ALWAYS, zero=_ALL, finite=_ALL, degree=1),
    "relu6": _activation(nonnegative=_ALWAYS, zero=_ALL, finite=_ALWAYS),
    "gelu silu mish elu celu selu hardswish": _activation(zero=_ALL, finite=_ALL),
    "rrelu": _activation(zero=_ALL, random=when.trains),
    "hardshrink softshrink": _activation(zero=when.flat_around_zero, finite=_ALL),
    "softplus": _activation(nonnegative=when.beta_is_positive, finite=_ALL),
    "log_sigmoid threshold": _activation(),
    "sigmoid=special_expit hardsigmoid": _activation(gate=2, nonnegative=_ALWAYS, finite=_ALWAYS),
    "tanh": _activation(gate=1, zero=_ALL, finite=_ALWAYS),
    "hardtanh": _activation(gate=1, nonnegative=when.bounded_below_by_zero, zero=when.bounds_hold_zero, finite=_ALL),
    "clamp=clip clamp_min": _activation(
        (0, 1, 2), epsilon=True, nonnegative=when.bounded_below_by_zero, zero=when.bounds_hold_zero, finite=_ALL
    ),
    "clamp_max": _activation((0, 1), zero=when.bounds_hold_zero, finite=_ALL),
    "pow float_power": _activation(
        (0, 1),
        nonnegative=when.exponent_is_even,
        zero=when.flat_at_zero,
        singular=when.steep_at_zero,
        degree=when.exponent,
    ),
    "square": _activation(nonnegative=_ALWAYS, zero=_ALL, degree=2),
    "sqrt": _activation(nonnegative=_ALWAYS, singular=_ALL, degree=0.5),
    "rsqrt": _activation(nonnegative=_ALWAYS, singular=_ALL, degree=-0.5),
    "reciprocal": _activation(singular=_ALL, degree=-1),
    "exp": _activation(gate=1, nonnegative=_ALWAYS),
    "exp2": _activation(nonnegative=_ALWAYS),
    "log log2 log10 logit=special_logit": _activation(singular=_ALL),
    "expm1=special_expm1 log1p=special_log1p erf=special_erf": _activation(zero=_ALL),
    "sin tan asin=arcsin atan=arctan sinh asinh=arcsinh atanh=arctanh": _activation(zero=_ALL),
    "cos acos=arccos cosh sinc erfc=special_erfc i0": _activation(),
    "nextafter": _activation(),
    "special_airy_ai special_spherical_bessel_j0": _activation(underived=True),
    "special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1": _activation(underived=True),
    "special_modified_bessel_i0 special_modified_bessel_i1": _activation(underived=True),
    "special_modified_bessel_k0 special_modified_bessel_k1": _activation(underived=True),
    "special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1": _activation(underived=True),
    "special_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_t": _activation(underived=True),
    "special_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_u": _activation(underived=True),
    "special_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_v": _activation(underived=True),
    "special_chebyshev_polynomial_w special_shifted_chebyshev_polynomial_w": _activation(underived=True),
    "special_hermite_polynomial_h special_hermite_polynomial_he": _activation(underived=True),
    "special_laguerre_polynomial_l special_legendre_polynomial_p": _activation(underived=True),
    "acosh=arccosh erfinv lgamma digamma special_ndtr special_log_ndtr": _activation(),
    "fmod remainder": _activation((0, 1), degree=1),
    "hypot": _activation((0, 1), nonnegative=_ALWAYS, degree=1),
    "atan2=arctan2 logaddexp logaddexp2": _activation((0, 1)),
    "copysign": _activation(),
    "igamma igammac special_zeta polygamma": _activation((0, 1)),
    # ----------------------------------------------------------------------------------------------------------
    # Functions along axes
    "softmax=_softmax=_safe_softmax": Operator(Kind.SOFTMAX, gate=2, nonnegative=_ALWAYS, finite=_ALWAYS),
    "log_softmax=_log_softmax": Operator(Kind.SOFTMAX),
    "logsumexp": Operator(Kind.SOFTMAX, reduces=True),
    "prod": Operator(Kind.PRODUCT, reduces=True, nonnegative=_ALL, degree=when.factors),
    "linalg_det det": Operator(Kind.PRODUCT, reduces=True, degree=when.matrix_order),
    "linalg_matrix_power matrix_power": Operator(Kind.PRODUCT, degree=when.matrix_power),
    "linalg_svdvals linalg_matrix_norm nuclear_norm frobenius_norm": _norm(degree=1),
    "linalg_eigvalsh": Operator(Kind.STATISTIC, reduces=True, degree=1),
    "linalg_cholesky linalg_cholesky_ex linalg_matrix_sqrth": Operator(Kind.STATISTIC, degree=0.5),
    "linalg_inv inverse linalg_inv_ex linalg_pinv pinverse": Operator(Kind.STATISTIC, degree=-1),
    "cholesky_inverse": Operator(Kind.STATISTIC, degree=-2),
    "std": _norm(degree=1),
    "var": _norm(degree=2),
    "norm linalg_norm linalg_vector_norm": _norm(degree=when.order),
    "layer_norm": _normalization(held=held.layer_norm),
    "native_layer_norm": Operator(Kind.NORMALIZATION, finite=_ALL, held=held.native_layer_norm),
    "group_norm": _normalization(held=held.group_norm),
    "native_group_norm": Operator(Kind.NORMALIZATION, finite=_ALL, held=held.native_group_norm),
    "rms_norm": _normalization(held=held.rms_norm),
    "_fused_rms_norm": _normalization(held=held.fused_rms_norm),
    "instance_norm": Operator(Kind.NORMALIZATION, finite=_ALL, held=held.instance_norm),
    "batch_norm_train": Operator(Kind.BATCH_NORM, finite=_ALWAYS, held=held.batch_norm_train),
    "batch_norm_eval": Operator(Kind.BATCH_NORM, finite=_ALL, in_walk=functions.batch_norm_affine),
    "scaled_dot_product_attention": Operator(
        Kind.ATTENTION,
        (0, 1, 2, 3),
        random=when.drops,
        in_walk=aten.scaled_dot_product_attention.default,
        exact=functions.attention_written_out,
    ),
    # ----------------------------------------------------------------------------------------------------------
    # What relevance does not pass through: its derivative is zero everywhere
    "detach": Operator(differentiable=False, nonnegative=_ALL, finite=_ALL),
    "sign sgn round floor ceil trunc floor_divide angle heaviside histc": Operator(differentiable=False),
    "zeros_like ones_like full_like empty_like rand_like randn_like randint_like": Operator(differentiable=False),
    "new_zeros new_ones new_full new_empty bernoulli": Operator(differentiable=False),
    "argmax argmin zeroed batch_statistics instance_statistics": Operator(differentiable=False),
    "normal normal_functional uniform log_normal cauchy exponential geometric": Operator(differentiable=False),
    "random poisson": Operator(differentiable=False),
    "dropout_mask": Operator(differentiable=False, nonnegative=_ALWAYS, random=True),
    # ----------------------------------------------------------------------------------------------------------
    # Of which torch knows no derivative
    "detach_copy native_channel_shuffle silu_backward logit_backward": Operator(),
    # ----------------------------------------------------------------------------------------------------------
    # No layers of their own
    "fused": Operator(differentiable=False),  # relevance goes through what is written out beside it
    "getitem": Operator(nonnegative=_ALL, finite=_ALL, degree=1),
    "dropout": Operator(nonnegative=_ALL, finite=_ALL, random=False),
    "alpha_dropout feature_alpha_dropout": Operator(random=when.drops),
    "lstm gru rnn_tanh rnn_relu": Operator(random=when.drops_between_layers),
    "_scaled_dot_product_attention_math _scaled_dot_product_attention_math_for_mps": Operator(random=when.drops),
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu": Operator(random=when.drops),
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention": Operator(random=when.drops),
    "_scaled_dot_product_fused_attention_overrideable": Operator(random=when.drops),
}

UNKNOWN = Operator()

POINTWISE = _activation((0, 1, 2))
"""What torch tags as pointwise, and has no record."""


def _by_name() -> dict[str, Operator]:
    table: dict[str, Operator] = {}
    for alike, record in _RECORDS.items():
        for names in alike.split():
            first, *others = names.split("=")
            for name in (first, *others):
                assert name not in table, f"`{name}` has two records"
                table[name] = replace(record, name=first)
    return table


TABLE = _by_name()
"""The record of each operator, by its name in torch's schema.

Or with the name of the overload, `"view.dtype"`, or with the argument that says what it does, `"scatter_reduce:amax"`.
"""

SHAPED_LIKE: dict[str, tuple[Any, Any]] = {
    "expand_as": (aten.expand.default, lambda like: list(like.shape)),
    "view_as": (aten.view.default, lambda like: list(like.shape)),
    "reshape_as": (aten.reshape.default, lambda like: list(like.shape)),
    "type_as": (aten.to.dtype, lambda like: like.dtype),
}
"""Operations of two tensors that read one only for its shape or dtype, as operations of the other.

They need no record: none is left in a captured program.
"""
