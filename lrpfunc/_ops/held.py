"""Torch's normalizations as affine functions of `x`, their statistics held as those of the values they had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Statistics of half-precision tensors are computed in float32, as in torch's kernels.


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _standardized(x: Tensor, values: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    x, values = _wide(x), _wide(values)
    var = values.var(list(dims), unbiased=False, keepdim=True)
    return (x - x.mean(list(dims), keepdim=True)) * (var + eps).rsqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _per_channel(parameter: Tensor | None, ndim: int) -> Tensor | None:
    return None if parameter is None else parameter.reshape(-1, *[1] * (ndim - 2))


def layer_norm(
    x: Tensor,
    values: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    dims = range(-len(shape), 0)
    return _scaled(_standardized(x, values, dims, eps), weight, bias).to(values.dtype)


def native_layer_norm(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return (layer_norm(x, *args),)


def rms_norm(
    x: Tensor, values: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _scaled(_wide(x) * _rms_scale(values, shape, eps), weight, None).to(values.dtype)


def _rms_scale(values: Tensor, shape: Sequence[int], eps: float | None) -> Tensor:
    wide = _wide(values)
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    return (wide.square().mean(list(range(-len(shape), 0)), keepdim=True) + eps).rsqrt()


def fused_rms_norm(
    x: Tensor, values: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, ...]:
    return rms_norm(x, values, shape, weight, eps), _rms_scale(values, shape, eps)


def group_norm(
    x: Tensor,
    values: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    shape = (x.shape[0], groups, -1)
    y = _standardized(x.reshape(shape), values.reshape(shape), (2,), eps).reshape(x.shape)
    return _scaled(y, _per_channel(weight, x.ndim), _per_channel(bias, x.ndim)).to(values.dtype)


def native_group_norm(
    x: Tensor, values: Tensor, weight: Any, bias: Any, n: int, channels: int, size: int, groups: int, eps: float
) -> tuple[Tensor, ...]:
    rows = (n, groups, -1)
    mean = _wide(x).reshape(rows).mean(-1)  # linear, as an output of its own
    scale = (_wide(values).reshape(rows).var(-1, unbiased=False) + eps).rsqrt()
    return group_norm(x, values, groups, weight, bias, eps), mean, scale


def instance_norm(
    x: Tensor,
    values: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    _: float,
    eps: float,
    *__: Any,
) -> Tensor:
    if training:
        return group_norm(x, values, x.shape[1], weight, bias, eps)
    mean, var = _per_channel(mean, x.ndim), _per_channel(var, x.ndim)
    y = (x - mean) * (var + eps).rsqrt()
    return _scaled(y, _per_channel(weight, x.ndim), _per_channel(bias, x.ndim))


def batch_norm_train(x: Tensor, values: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    y = _standardized(x, values, (0, *range(2, x.ndim)), eps)
    return _scaled(y, _per_channel(weight, x.ndim), _per_channel(bias, x.ndim)).to(values.dtype)
