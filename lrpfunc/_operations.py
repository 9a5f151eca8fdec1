"""What is known of torch's operations, by their names in the schema; overloads share a name."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from lrpfunc._errors import CaptureError
from lrpfunc._torch import beyond_first_derivative, is_differentiated, vjp

aten = torch.ops.aten

Size = Sequence[int]
Layout = tuple[Size, int]
"""The strides of a tensor, and where it starts in memory."""


def operation_name(node: fx.Node) -> str:
    """`"conv2d"` for a call of `aten.conv2d.default`; the function's name for a function of ours."""
    return operation_name_of(node.target)


def operation_name_of(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", str(target))


# --------------------------------------------------------------------------------------------------------------
# Operations that simplification writes, and what runs in place of operations torch cannot differentiate twice


def overwrite(base: Tensor, new: Tensor, view: Any) -> Tensor:
    """`base` after `view(base)` was set to `new`, as a function.

    The view's transpose puts `new` where it came from; an in-place write would fail under vmap.
    """
    if not base.is_floating_point():
        result = base.clone()
        view(result).copy_(new)
        return result
    _, transpose = vjp(view, base)
    (written,) = transpose(torch.ones_like(new))
    (placed,) = transpose(new)
    return torch.where(written != 0, placed, base)


def copied(target: Tensor, source: Tensor) -> Tensor:
    """`target.copy_(source)` as a function."""
    return source.to(dtype=target.dtype, device=target.device).expand(target.shape)


def assigned(target: Tensor, value: Tensor) -> Tensor:
    """`target` after it was set to `value` without gradients: the value, bit for bit, with the target's history."""
    nothing = torch.where(target.isinf(), 0, target - target.detach())
    return nothing + value.detach()


def filled(target: Tensor, value: Tensor | float) -> Tensor:
    """`target.fill_(value)` as a function."""
    return copied(target, torch.as_tensor(value, device=target.device))


def zeroed(target: Tensor) -> Tensor:
    """`target.zero_()` as a function."""
    return torch.zeros_like(target)


def as_strided(x: Tensor, size: Size, stride: Size, storage_offset: int | None = None, *, layout: Layout) -> Tensor:
    """What torch's would be if `x` had that layout, whichever it has."""
    return x.reshape(-1)[_places(x.shape, layout, size, stride, storage_offset, x.device)]


def as_strided_scatter(
    x: Tensor, source: Tensor, size: Size, stride: Size, storage_offset: int | None = None, *, layout: Layout
) -> Tensor:
    """The same for the write. Torch's has a wrong derivative, and no batching rule."""
    places = _places(x.shape, layout, size, stride, storage_offset, x.device)
    return x.reshape(-1).index_put((places,), source).reshape(x.shape)


def _places(
    shape: Size, layout: Layout, size: Size, stride: Size, offset: int | None, device: torch.device | str
) -> Tensor:
    """Which elements of a tensor, counted in their order, lie in those places of memory; -1 where none does."""
    strides, start = layout
    first = start if offset is None else offset
    memory = torch.full((1 + max(start + _reach(shape, strides), first + _reach(size, stride)),), -1, device=device)
    elements = torch.arange(math.prod(shape), device=device).reshape(shape)
    memory = memory.index_put((start + _steps(shape, strides, device),), elements)
    return memory[first + _steps(size, stride, device)]


def _steps(shape: Size, strides: Size, device: torch.device | str) -> Tensor:
    """How far in memory each element is from the first."""
    steps = torch.zeros((), dtype=torch.int64, device=device)
    for n, step in zip(shape, strides, strict=True):
        steps = steps.unsqueeze(-1) + step * torch.arange(n, device=device)
    return steps


def _reach(shape: Size, strides: Size) -> int:
    return sum(max(n - 1, 0) * step for n, step in zip(shape, strides, strict=True))


def free_of_layout(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The operation that does the same on tensors that lie in memory in another way than those that were seen.

    A trace is specialised to the strides it saw. What runs, or its derivative, may choose another kernel, with others.

    Args:
        target: The operation.
        args: Its arguments, nodes with what was seen.
        kwargs: The same.

    Returns:
        The operation, and its keyword arguments.

    Raises:
        CaptureError: If it reaches beyond what its operand holds.
    """
    if target in (aten.view.default, aten._unsafe_view.default):
        return aten.reshape.default, kwargs
    if target in _ON_MEMORY:
        seen = args[0].meta["val"]
        layout = seen.stride(), seen.storage_offset()
        size, stride, offset = (
            _argument_of(target, args, kwargs, name) for name in ("size", "stride", "storage_offset")
        )
        with _disable_current_modes():
            beyond = bool((_places(seen.shape, layout, size, stride, offset, "cpu") < 0).any())
        if beyond:
            raise CaptureError(
                f"as_strided reads memory beyond the tensor of shape {tuple(seen.shape)} that it is called on, such as "
                "more of what that is a view of. Call it on the whole tensor"
            )
        return _ON_MEMORY[target], {**kwargs, "layout": layout}
    return target, kwargs


_ON_MEMORY: dict[Any, Any] = {
    aten.as_strided.default: as_strided,
    aten.as_strided_scatter.default: as_strided_scatter,
}


def dropout_mask(x: Tensor, p: float, name: str) -> Tensor:
    """What dropout multiplies `x` by. Dropping out ones draws the same random numbers as the model does."""
    return getattr(aten, name)(torch.ones_like(x).detach(), p, True)


def batch_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics as a batch norm in training mode leaves them."""
    dims = [0, *range(2, x.ndim)]
    like = running_mean if running_mean is not None else running_var
    x = x.detach() if like is None else x.detach().to(like.dtype)
    var, mean = torch.var_mean(x, dims)
    return (
        None if running_mean is None else (running_mean * (1 - momentum) + mean * momentum).to(running_mean.dtype),
        None if running_var is None else (running_var * (1 - momentum) + var * momentum).to(running_var.dtype),
    )


def batch_norm_affine(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> Tensor:
    """A batch norm in evaluation mode as arithmetic, differentiable in its statistics too."""
    scale, shift = batch_norm_scale(weight, bias, running_mean, running_var, eps)
    shape = [1, -1] + [1] * (x.ndim - 2)
    return x * scale.reshape(shape).to(x.dtype) + shift.reshape(shape).to(x.dtype)


def batch_norm_scale(
    weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The `scale` and `shift` of the affine map that a batch norm in evaluation mode is."""
    scale = (running_var + eps).rsqrt() if weight is None else weight * (running_var + eps).rsqrt()
    shift = -running_mean * scale
    return scale, shift if bias is None else shift + bias


def batch_norm_eval(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> Tensor:
    """Torch's own batch norm, to the bit, unless somebody differentiates its statistics, which torch's cannot."""
    if is_differentiated(running_mean) or is_differentiated(running_var):
        return batch_norm_affine(x, weight, bias, running_mean, running_var, eps)
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)


def batch_norm_train(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)


def hardsigmoid(x: Tensor) -> Tensor:
    """Bitwise torch's own, whose backward has no derivative."""
    return torch.clamp(x + 3, 0, 6) / 6


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Torch's own, to the bit, unless derivatives are taken that its fused kernels do not have."""
    operands = [t for t in (query, key, value, attn_mask) if t is not None]
    attend = attention_written_out if any(map(beyond_first_derivative, operands)) else aten.scaled_dot_product_attention
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def attention_written_out(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Attention by matrix products and a softmax, which has every derivative and batching rule."""
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, *args, **kwargs)[0]


def fused(target: Any, *args: Any, **kwargs: Any) -> Any:
    """The outputs of an operation that is also written out, or `None` where only the latter has the derivatives."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return None if any(map(beyond_first_derivative, tensors)) else target(*args, **kwargs)


def as_computed(written: Tensor, outputs: Any, index: int) -> Tensor:
    """An output of a fused operation, to the bit; to relevance it is what was written out."""
    if outputs is None:
        return written
    return outputs if isinstance(outputs, Tensor) else outputs[index]


def written_out(written: Tensor, outputs: Any, index: int) -> Tensor:
    return written


def _chosen(written: Tensor, base: Tensor, values: Tensor) -> Tensor:
    """`base`, with `values[k]` wherever `written` holds `k`: each place takes what was written there last."""
    return torch.where(written < 0, base, values.reshape(-1)[written.clamp(min=0)])


def index_put_winners(x: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    """`index_put`, whose own VJP gives to values that were overwritten too."""
    if accumulate:
        return aten.index_put(x, indices, values, True)
    shape = aten.index(x.detach(), indices).shape
    places = torch.arange(shape.numel(), device=x.device).reshape(shape)
    written = aten.index_put(torch.full(x.shape, -1, device=x.device), indices, places)
    return _chosen(written, x, values.expand(shape))


def scatter_winners(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """`scatter`, likewise."""
    places = torch.arange(index.numel(), device=x.device).reshape(index.shape)
    written = torch.full(x.shape, -1, device=x.device).scatter(dim, index, places)
    return _chosen(written, x, source[tuple(slice(n) for n in index.shape)])


def index_copy_winners(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """`index_copy`, likewise."""
    places = torch.arange(source.numel(), device=x.device).reshape(source.shape)
    written = torch.full(x.shape, -1, device=x.device).index_copy(dim, index, places)
    return _chosen(written, x, source)


REWRITTEN: dict[Any, Any] = {
    aten.hardsigmoid.default: hardsigmoid,
    aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
}
SHAPED_LIKE: dict[str, tuple[Any, Any]] = {
    "expand_as": (aten.expand.default, lambda like: list(like.shape)),
    "view_as": (aten.view.default, lambda like: list(like.shape)),
    "reshape_as": (aten.reshape.default, lambda like: list(like.shape)),
    "type_as": (aten.to.dtype, lambda like: like.dtype),
}
"""Operations of two tensors that read one only for its shape or dtype, as operations of the other."""

IN_WALK: dict[Any, Any] = {
    as_computed: written_out,
    scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    batch_norm_eval: batch_norm_affine,
    aten.index_put.default: index_put_winners,
    aten.scatter.src: scatter_winners,
    aten.index_copy.default: index_copy_winners,
}
"""What the walk backwards evaluates in place of an operation of the forward pass."""

EXACT: dict[Any, Any] = {scaled_dot_product_attention: attention_written_out}
"""What it evaluates if the VJP will be differentiated with respect to its cotangent, or vmapped over it."""


# --------------------------------------------------------------------------------------------------------------
# Calling a node as it was written


@contextlib.contextmanager
def _surroundings(node: fx.Node) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if node.meta.get("no_grad"):
            stack.enter_context(torch.no_grad())
        for device, dtype, enabled, cache in node.meta.get("autocast", ()):
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield


def call(node: fx.Node, args: Any, kwargs: Any, *, exact: bool | None = None) -> Any:
    """Calls a node's operation, under the grad mode and autocast it was written under.

    The walk says whether it must be `exact`, that is, have derivatives of its VJP too.
    """
    target: Any = node.target
    if exact is not None:
        target = EXACT[target] if exact and target in EXACT else IN_WALK.get(target, target)
    if node.meta.get("no_grad") or node.meta.get("autocast"):
        with _surroundings(node):
            return target(*args, **kwargs)
    return target(*args, **kwargs)


def _argument(node: fx.Node, name: str) -> Any:
    """The argument of that name, `None` if it is left to its default."""
    return _argument_of(node.target, node.args, node.kwargs, name)


def _argument_of(target: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    schema = getattr(target, "_schema", None)
    order = [a.name for a in schema.arguments] if schema else list(inspect.signature(target).parameters)
    position = order.index(name) if name in order else len(args)
    return args[position] if position < len(args) else kwargs.get(name)


def is_random(node: fx.Node) -> bool:
    """Whether calling the node again gives another result."""
    node = getattr(node.target, "node", node)  # of an operation that runs under a mode
    name = operation_name(node)
    if name.endswith("backward"):
        return False
    if "scaled_dot_product" in name:
        return bool(_argument(node, "dropout_p"))
    if name in ("alpha_dropout", "feature_alpha_dropout"):
        return bool(node.args[1] and node.args[2])
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        dropout, training = node.args[5:7]
        return bool(dropout) and bool(training)
    if name == "rrelu":
        return True in node.args[3:4]
    tags = getattr(node.target, "tags", ())
    return name == "dropout_mask" or (torch.Tag.nondeterministic_seeded in tags and name != "dropout")


# --------------------------------------------------------------------------------------------------------------
# Families of operations


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
