"""Operations that capture writes, and what runs in place of operations torch cannot differentiate twice."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrpfunc import _tree as tree
from lrpfunc._ops.derivatives import vjp
from lrpfunc._torch import aten, beyond_first_derivative, is_differentiated, is_mapped

# --------------------------------------------------------------------------------------------------------------
# What a program has in place of operations that write to a tensor, or that torch cannot differentiate twice


def overwrite(base: Tensor, new: Tensor, view: Any) -> Tensor:
    """`base` after `view(base)` was set to `new`, as a function.

    The view's transpose puts `new` where it came from; an in-place write would fail under vmap.
    """
    if not (base.is_floating_point() or base.is_complex()):  # it has no transpose
        written = torch.full(base.shape, -1, device=base.device)
        view(written).copy_(torch.arange(new.numel(), device=base.device).reshape(new.shape))
        return _chosen(written, base, new)
    _, transpose = vjp(view, base)
    (written,) = transpose(torch.full_like(new, complex(1, 1) if new.is_complex() else 1))
    (placed,) = transpose(new)
    if not base.is_complex():
        return torch.where(written != 0, placed, base)
    # A view may be of the real part alone.
    written, placed, base = (torch.view_as_real(part.resolve_conj()) for part in (written, placed, base))
    return torch.view_as_complex(torch.where(written != 0, placed, base))


def copied(target: Tensor, source: Tensor) -> Tensor:
    """`target.copy_(source)` as a function."""
    return source.to(dtype=target.dtype, device=target.device).expand(target.shape)


def assigned(target: Tensor, value: Tensor) -> Tensor:
    """`target` after it was set to `value` without gradients: the value, bit for bit, with the target's history."""
    nothing = torch.where(target.isfinite(), target - target.detach(), 0)
    return nothing + value.detach()


def filled(target: Tensor, value: Tensor | float) -> Tensor:
    """`target.fill_(value)` as a function."""
    return copied(target, torch.as_tensor(value, device=target.device))


def zeroed(target: Tensor) -> Tensor:
    """`target.zero_()` as a function."""
    return torch.zeros_like(target)


def dropout_mask(x: Tensor, p: float, name: str) -> Tensor:
    """What dropout multiplies `x` by. Dropping out ones draws the same random numbers as the model does."""
    return getattr(aten, name)(torch.ones_like(x).detach(), p, True)


def batch_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor | None, ...]:
    """The running statistics as a batch norm in training mode leaves them."""
    return _running_statistics(torch.batch_norm, x, running_mean, running_var, momentum)


def instance_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor | None, ...]:
    """The running statistics as an instance norm leaves them."""
    return _running_statistics(torch.instance_norm, x, running_mean, running_var, momentum)


def _running_statistics(norm: Any, x: Tensor, *running: Any) -> tuple[Tensor | None, ...]:
    """Torch's own, to the bit, unless `vmap` runs over the batch, where torch updates none that are not mapped."""
    *old, momentum = running
    x, like = x.detach(), next(statistic for statistic in old if statistic is not None)
    if is_mapped(x):
        per_sample = norm is torch.instance_norm
        var, mean = torch.var_mean(x.to(like.dtype), [*range(2, x.ndim)] if per_sample else [0, *range(2, x.ndim)])
        batch = [statistic.mean(0) if per_sample else statistic for statistic in (mean, var)]
        new = [a if a is None else a.detach() * (1 - momentum) + b * momentum for a, b in zip(old, batch, strict=True)]
    else:
        new = [a if a is None else a.detach().clone() for a in old]
        with torch.no_grad():
            norm(x, None, None, *new, True, momentum, 1e-5, torch.backends.cudnn.enabled)
    pairs: Any = zip(old, new, strict=True)
    return tuple(assigned(a * (1 - momentum), b) if is_differentiated(a) else b for a, b in pairs)


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
    return _attention_math(query, key, value, attn_mask, *args, **kwargs)[0]


def attention_weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """The softmax inside of attention."""
    return _attention_math(query, key, value, attn_mask, *args, **kwargs)[1]


def attended(weights: Tensor, value: Tensor) -> Tensor:
    """What attention makes of its weights; several heads may share one value."""
    heads = weights.shape[-3] // value.shape[-3] if value.ndim > 2 else 1
    return weights @ (value if heads == 1 else value.repeat_interleave(heads, -3))


def _attention_math(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, *args, **kwargs)


# --------------------------------------------------------------------------------------------------------------
# Where sizes are open


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Torch's own, which takes an input of several dimensions for a matrix as well, but by its numbers."""
    if bias is None or x.ndim <= 2:
        return aten.linear.default(x, weight, bias)
    rows = aten.linear.default(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight, bias)
    return rows.reshape(*x.shape[:-1], weight.shape[0])


def max_pool1d(x: Tensor, *arguments: Any) -> Tensor:
    """Torch's own, as the pooling of an image of one row."""
    size, stride, padding, dilation, *ceil = (*arguments, *((), (0,), (1,))[len(arguments) - 1 :])
    rows = ([1, *size], [1, *(stride or size)], [0, *padding], [1, *dilation], *ceil)
    return aten.max_pool2d.default(x.unsqueeze(-2), *rows).squeeze(-2)


def fused(target: Any, *args: Any, **kwargs: Any) -> Any:
    """The outputs of an operation that is also written out, or `None` where only the latter has the derivatives."""
    tensors = [leaf for leaf in tree.leaves((args, kwargs)) if isinstance(leaf, Tensor)]
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
    if not values.numel():
        return base
    places = written.clamp(min=0)
    return torch.where(
        written < 0, base, aten.index(values.reshape(-1), [places])
    )  # `[places]` asks one for its number


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
