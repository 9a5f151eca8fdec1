"""Blocks that keep to one path: layers, activations, normalizations, pooling and what only moves values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrpfunc.testing._code import Pasteable, among
from lrpfunc.testing._net import Scope


@final
@dataclass(frozen=True, repr=False)
class Linear(Pasteable):
    """A dense layer over the last axis, in one of the ways to write it."""

    out: int = 1
    bias: bool = True
    spelling: Literal["linear", "matmul", "addmm", "einsum", "module"] = "linear"

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        if self.spelling == "module":
            return p.module("", nn.Linear, x.shape[-1], self.out, bias=self.bias)(x)
        weight = p("weight", self.out, x.shape[-1])
        bias = p("bias", self.out) if self.bias else None
        if self.spelling == "linear":
            return F.linear(x, weight, bias)
        if self.spelling == "addmm" and bias is not None and x.ndim == 2:
            return torch.addmm(bias, x, weight.t())
        z = torch.einsum("...i,oi->...o", x, weight) if self.spelling == "einsum" else x @ weight.t()
        return z if bias is None else z + bias


@final
@dataclass(frozen=True, repr=False)
class Conv(Pasteable):
    """A convolution over all axes but the first two; over the features of a vector, which then is one channel."""

    out: int = 1
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    transposed: bool = False
    module: bool = False

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        x = x.unsqueeze(1) if x.ndim == 2 else x
        spatial, channels = x.shape[2:], x.shape[1]
        groups = math.gcd(self.groups, channels)
        out = math.ceil(self.out / groups) * groups
        dilation, padding = self._fitting(min(spatial))
        kernel = [min(self.kernel, n + 2 * padding) if dilation == 1 else self.kernel for n in spatial]
        options = {"stride": self.stride, "padding": padding, "groups": groups, "dilation": dilation}
        kind = ("ConvTranspose" if self.transposed else "Conv") + f"{len(spatial)}d"
        if self.module:
            return p.module("", getattr(nn, kind), channels, out, tuple(kernel), bias=self.bias, **options)(x)
        shape = (channels, out // groups) if self.transposed else (out, channels // groups)
        bias = p("bias", out) if self.bias else None
        function = getattr(F, f"conv{'_transpose' * self.transposed}{len(spatial)}d")
        return function(x, p("weight", *shape, *kernel), bias, **options)

    def _fitting(self, size: int) -> tuple[int, int]:
        """A dilation and a padding that leave something of so many pixels."""
        if self.transposed:
            return 1, min(self.padding, (self.kernel - 1) // 2 if size == 1 else 0)
        fits = self.dilation * (self.kernel - 1) < size + 2 * self.padding
        return self.dilation if fits else 1, self.padding


_POINTWISE = {
    "relu": F.relu,
    "relu_clamp": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_written": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": F.silu,
    "silu_written": lambda x: x * torch.sigmoid(x),
    "softplus": F.softplus,
    "elu": F.elu,
    "square": torch.square,
    "exp": lambda x: (x / 4).exp(),
    "scale": lambda x: -1.5 * x,
    "shift": lambda x: 0.5 + x,
    "double": lambda x: x + x,
}
SMOOTH = ("tanh", "sigmoid", "gelu", "gelu_written", "silu", "silu_written", "softplus", "square", "exp")
ACTIVATIONS = ("relu", "relu_clamp", "leaky_relu", "elu", *SMOOTH)
ARITHMETIC = ("scale", "shift", "double")


@final
@dataclass(frozen=True, repr=False)
class Pointwise(Pasteable):
    """An activation or a piece of arithmetic, by its name."""

    name: str = "relu"

    def __post_init__(self) -> None:
        among([self.name], _POINTWISE, "Pointwise(name=)")

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        return _POINTWISE[self.name](x)


@final
@dataclass(frozen=True, repr=False)
class InPlace(Pasteable):
    """An operation that overwrites what it is given, seen by whoever holds the same tensor."""

    name: Literal["relu_", "add_", "mul_", "assign", "rows", "view"] = "relu_"

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        match self.name:
            case "relu_":
                return F.relu(x, inplace=True)
            case "add_":
                x += p("addend", 1)
            case "mul_":
                x *= p("gain", 1)
            case "assign":
                x[:, 0] = x[:, -1] * 2
            case "rows":
                filled = torch.zeros_like(x)
                filled[:, :1] = x[:, :1]
                filled[:, 1:] += x[:, 1:]
                return filled
            case "view":
                x.flatten(1)[:, ::2].mul_(0.5)
        return x


@final
@dataclass(frozen=True, repr=False)
class Normalize(Pasteable):
    """A normalization, native, as a module or written out; a softmax is one too."""

    name: str = "layer_norm"

    def __post_init__(self) -> None:
        among([self.name], NORMALIZATIONS, "Normalize(name=)")

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        last, channels = x.shape[-1], x.shape[1]
        match self.name:
            case "batch_norm":
                stats = p("running_mean", channels), p("running_var", channels)
                return F.batch_norm(x, *stats, p("gain", channels), p("bias", channels))
            case "batch_norm_module":
                make = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[x.ndim]
                return p.module("", make, channels)(x)
            case "layer_norm":
                return F.layer_norm(x, [last], p("gain", last), p("bias", last), 0.1)
            case "layer_norm_module":
                return p.module("", nn.LayerNorm, last, eps=0.1)(x)
            case "layer_norm_written":
                centred = x - x.mean(-1, keepdim=True)
                return centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * p("gain", last)
            case "rms_norm":
                return p("gain", last) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1))
            case "group_norm":
                return F.group_norm(x, 1, p("gain", channels), p("bias", channels), 0.1)
            case "l2":
                return x / (x.square().sum(-1, keepdim=True) + 0.1).sqrt()
            case _:
                return x.softmax(-1)


NORMALIZATIONS = (
    *("layer_norm", "batch_norm", "batch_norm_module", "layer_norm_module", "layer_norm_written"),
    *("rms_norm", "group_norm", "l2", "softmax"),
)


@final
@dataclass(frozen=True, repr=False)
class Pool(Pasteable):
    """A reduction of all axes but the first two, or of the last axis of a vector."""

    name: Literal["avg", "max", "adaptive", "mean", "sum", "amax"] = "avg"
    size: int = 2
    stride: int = 1

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        y = x.unsqueeze(1) if x.ndim == 2 else x
        axes = list(range(2, y.ndim))
        match self.name:
            case "mean" | "sum" | "amax":
                return getattr(torch, self.name)(y, axes, keepdim=True).reshape(len(x), *[-1] * (x.ndim > 1), 1)
            case "adaptive":
                return getattr(F, f"adaptive_avg_pool{len(axes)}d")(y, min(self.size, *y.shape[2:], 3))
        size = [min(self.size, n) for n in y.shape[2:]]
        return getattr(F, f"{self.name}_pool{len(axes)}d")(y, size, self.stride)


_REARRANGED = {
    "transpose": lambda x: x.transpose(1, -1),
    "strided": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "every_other": lambda x: x[..., ::2],
    "pad": lambda x: F.pad(x, (1, 2)),
    "flatten": lambda x: x.flatten(1),
    "repeat": lambda x: x.repeat_interleave(2, 1),
    "stack": lambda x: torch.stack([x, 2 * x], -1).flatten(-2),
    "halves": lambda x: torch.cat([part.tanh() for part in x.chunk(2, 1)][::-1], 1),
    "expand": lambda x: x[..., :1].expand_as(x),
    "cumsum": lambda x: x.cumsum(-1),
    "masked": lambda x: x.masked_fill(torch.arange(x.shape[-1]) % 3 == 1, 0.5),
    "gather": lambda x: x[..., torch.arange(x.shape[-1]).flip(0) // 2],
    "einsum": lambda x: torch.einsum("n...f->n...", x).unsqueeze(-1) + x,
}
REARRANGEMENTS = tuple(_REARRANGED)


@final
@dataclass(frozen=True, repr=False)
class Rearrange(Pasteable):
    """Moves, repeats or leaves out values, or adds them up."""

    name: str = "transpose"

    def __post_init__(self) -> None:
        among([self.name], _REARRANGED, "Rearrange(name=)")

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        return _REARRANGED[self.name](x)
