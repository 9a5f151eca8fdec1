"""Families of torch's operators, by their names in the schema; overloads share a name."""

from __future__ import annotations

from typing import Any

from lrpfunc._torch import aten

SHAPED_LIKE: dict[str, tuple[Any, Any]] = {
    "expand_as": (aten.expand.default, lambda like: list(like.shape)),
    "view_as": (aten.view.default, lambda like: list(like.shape)),
    "reshape_as": (aten.reshape.default, lambda like: list(like.shape)),
    "type_as": (aten.to.dtype, lambda like: like.dtype),
}
"""Operations of two tensors that read one only for its shape or dtype, as operations of the other."""


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SELECT = names(
    """view reshape _unsafe_view _reshape_alias flatten unflatten squeeze unsqueeze transpose permute t movedim moveaxis
    swapaxes swapdims adjoint mT expand expand_as broadcast_to contiguous clone alias to _to_copy type_as slice select
    narrow split split_with_sizes chunk unbind tensor_split hsplit vsplit dsplit cat concat concatenate stack hstack
    vstack dstack column_stack index index_select gather take take_along_dim flip fliplr flipud roll rot90 pad
    constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle unfold im2col repeat repeat_interleave tile where
    masked_fill masked_select masked_scatter tril triu diagonal as_strided slice_scatter select_scatter
    diagonal_scatter scatter index_put atleast_1d atleast_2d atleast_3d ravel squeeze_copy lift_fresh_copy detach_copy
    overwrite copied view_as reshape_as float double half bfloat16 cuda cpu meshgrid embedding index_copy index_fill
    native_channel_shuffle view_copy expand_copy permute_copy numpy_T mH H matrix_H positive resolve_conj resolve_neg
    unsafe_split unsafe_chunk narrow_copy select_copy slice_copy nan_to_num as_computed"""
)
"""Each element of the output is an element of an input, or a constant."""

WINNER = names(
    """max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d
    amax amin max min topk sort msort kthvalue mode maximum minimum fmax fmin"""
)
"""Each element of the output is the element of an input that won a comparison."""

PRODUCT = ("mul", "multiply")

QUOTIENT = ("div", "divide", "true_divide")

SCALE = names("mul div divide multiply true_divide neg negative")
"""Scaling by what does not depend on the explained input."""

LINEAR = names(
    """sum cumsum add sub subtract rsub upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa scatter_add index_add col2im diff trace
    fft_fft fft_rfft grid_sampler grid_sampler_2d grid_sampler_3d nansum sum_to_size lerp"""
)
"""Linear, or affine, in the operand that depends on the explained input."""

AVERAGE = names(
    """avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d mean"""
)

ACTIVATION = names(
    """relu relu6 leaky_relu prelu _prelu_kernel rrelu elu selu celu gelu silu mish sigmoid tanh hardtanh hardswish
    hardsigmoid hardshrink softshrink softplus log_sigmoid threshold clamp clamp_min clamp_max clip logit
    exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square pow float_power abs absolute erf erfc erfinv
    sin cos tan asin acos atan arcsin arccos arctan sinh cosh asinh acosh atanh arcsinh arccosh arctanh sinc i0
    special_expit special_erf special_erfc special_expm1 special_log1p special_ndtr special_log_ndtr xlogy
    lgamma digamma fmod remainder hypot atan2 arctan2 copysign logaddexp logaddexp2 ldexp"""
)
"""Functions of each element by itself that are not linear."""

ZERO_AT_ZERO = names(
    """relu relu6 leaky_relu prelu _prelu_kernel rrelu elu selu celu gelu silu mish tanh hardswish hardshrink
    softshrink expm1 log1p square erf sin tan asin atan sinh asinh atanh abs absolute"""
)
"""Those with `f(0) = 0` and a derivative there, whatever their parameters."""

HOMOGENEOUS = names("relu leaky_relu prelu _prelu_kernel")
"""Activations with `f(x) = f'(x) x`, so that passing relevance on is the plain VJP of the multiplier."""

SOFTMAX = names("softmax _softmax _safe_softmax log_softmax _log_softmax logsumexp")
"""Functions of the exponentials along one or several axes."""

STATISTIC = {"std": 1, "norm": 1, "linalg_vector_norm": 1, "linalg_norm": 1, "var": 2}
"""Reductions to a norm, and their degree: `f(c x) = c^k f(x)` for `c > 0`."""

MULTILINEAR = names(
    """linear _grouped_mm grouped_mm addmm baddbmm addmv mm bmm mv dot inner outer matmul tensordot kron vdot einsum
    bilinear _trilinear addcmul conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
    _convolution"""
)
"""Linear in each operand, so that they are products where several depend on the explained input."""

NORMALIZATION = names(
    """layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm
    batch_norm_train batch_norm_eval"""
)

UNDIFFERENTIABLE = names(
    """detach sign sgn round floor ceil trunc floor_divide
    fused zeros_like ones_like full_like empty_like rand_like randn_like
    new_zeros new_ones new_full new_empty bernoulli argmax argmin heaviside zeroed dropout_mask batch_statistics
    lift_fresh"""
)
"""Operations no relevance passes through: their derivative is zero everywhere."""

POSITIVE = names(
    """relu relu6 sigmoid softmax _softmax _safe_softmax exp exp2 square abs absolute hardsigmoid sqrt rsqrt
    dropout_mask std var norm linalg_vector_norm"""
)
"""Their result is never negative."""

KEEPS_SIGN = names(
    """view reshape _unsafe_view flatten unflatten squeeze unsqueeze transpose permute t movedim expand expand_as
    contiguous clone alias detach to _to_copy slice select narrow split split_with_sizes chunk unbind getitem
    index index_select gather flip roll repeat repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d amax amin topk sort avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d mean sum upsample_nearest1d upsample_nearest2d
    upsample_linear1d upsample_bilinear2d"""
)
"""Their result is not negative where their first operand is not, whatever the others."""

FINITE = MULTILINEAR | NORMALIZATION | names("softmax sigmoid tanh relu6 hardsigmoid hardtanh")
"""Their result is finite, though a mask may have made an operand infinite."""

KEEPS_FINITE = (
    SELECT
    | WINNER
    | AVERAGE
    | LINEAR
    | names("relu gelu silu elu leaky_relu mish hardswish softplus mul neg getitem dropout")
) - names("where masked_fill pad constant_pad_nd masked_scatter slice_scatter overwrite copied index_fill as_computed")
"""Their result is finite where their operands are."""
