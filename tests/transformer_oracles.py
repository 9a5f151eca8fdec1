"""Small networks with attention, normalization, gates, recurrence and scans, and oracles of their relevance.

An oracle is a second forward pass, written apart from the first, with gradients stopped so that input times gradient
is the relevance that a composite stands for. Networks come in several spellings that compute the same function; one
oracle serves them all. Nothing here knows how relevance is propagated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import normal, randomized

Params = Mapping[str, Tensor]
Unary = Callable[[Tensor], Tensor]
Binary = Callable[[Tensor, Tensor], Tensor]

CLASSES, LENGTH, WIDTH = 4, 4, 8
HEADS, KEY_HEADS, HEAD_WIDTH = 4, 2, 4
EPS = 0.01  # large, so that where it is added matters
LENGTHS = (LENGTH, 2)
"""How many positions of each of the two samples are not padding, where a network has a padding mask."""


@final
@dataclass(frozen=True)
class Stops:
    """The steps of a forward pass at which gradients are stopped; the value is always that of the plain step.

    Attributes:
        active: Whether anything is stopped at all.
        attention: Whether attention weights are constants.
        gates: Whether gates are constants.
    """

    active: bool = True
    attention: bool = False
    gates: bool = False

    def constant(self, x: Tensor) -> Tensor:
        """A statistic, or a gate that takes nothing in every composite."""
        return x.detach() if self.active else x

    def activation(self, f: Unary, x: Tensor) -> Tensor:
        """The identity rule, as the secant `f(x) / x` through the origin; at `x = 0` it is the derivative."""
        y = f(x)
        if not self.active:
            return y
        at = x.detach().requires_grad_()
        (derivative,) = torch.autograd.grad(f(at).sum(), at)
        slope = torch.where(at == 0, derivative, y / at).detach()
        return y.detach() + slope * (x - x.detach())

    def product(self, multiply: Binary, a: Tensor, b: Tensor) -> Tensor:
        """Half of the relevance to each of two factors."""
        if not self.active:
            return multiply(a, b)
        return (multiply(a.detach(), b) + multiply(a, b.detach())) / 2

    def gated(self, gate: Tensor, value: Tensor) -> Tensor:
        return gate.detach() * value if self.gates else self.product(torch.mul, gate, value)

    def softmax(self, x: Tensor) -> Tensor:
        weights = x.exp() / x.exp().sum(-1, keepdim=True)
        return weights.detach() if self.attention else weights

    def mixed(self, mix: Binary, weights: Tensor, values: Tensor) -> Tensor:
        """A product of attention weights, from `softmax`, with values."""
        return mix(weights, values) if self.attention else self.product(mix, weights, values)


PLAIN = Stops(active=False)
STOPS = {"attn": Stops(), "cp": Stops(attention=True, gates=True), "mamba": Stops()}

Oracle = Callable[[Params, Tensor, Stops], Tensor]


@final
@dataclass(frozen=True)
class Net:
    """A network, an input, and the oracle of both.

    Attributes:
        module: The network; its output has shape `(samples, CLASSES)`.
        x: The input.
        oracle: The second forward pass.
        composites: The keys of `STOPS` under which the oracle holds.
        no_grad: Whether everything happens under `torch.no_grad()`, which tempts torch's fused encoder layers.
    """

    module: nn.Module
    x: Tensor
    oracle: Oracle
    composites: tuple[str, ...] = ("attn", "cp")
    no_grad: bool = False


def expected_relevance(net: Net, stops: Stops, target: int) -> Tensor:
    """Input times the gradient of the oracle's logit, for each sample."""
    x = net.x.clone().requires_grad_()
    with torch.enable_grad():
        logits = net.oracle(dict(net.module.named_parameters()), x, stops)
        (gradient,) = torch.autograd.grad(logits[:, target].sum(), x)
    return net.x * gradient


def affine(params: Params, name: str, x: Tensor) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, params[f"{name}.weight"])
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def additive(mask: Tensor) -> Tensor:
    return (~mask).double() * torch.finfo(torch.float64).min


def valid() -> Tensor:
    """Which positions are not padding, shaped `(samples, LENGTH)`."""
    return torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]


def attention_oracle(q: Tensor, k: Tensor, v: Tensor, stops: Stops, mask: Tensor | None = None) -> Tensor:
    """Of `(..., positions, width)`, with queries, keys and values that all depend on the input."""
    scores = stops.product(partial(torch.einsum, "...qd,...kd->...qk"), q, k) / math.sqrt(q.shape[-1])
    weights = stops.softmax(scores if mask is None else scores.masked_fill(~mask, -math.inf))
    return stops.mixed(partial(torch.einsum, "...qk,...kd->...qd"), weights, v)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(-2, -3)


def merged(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).flatten(-2)


def repeated(x: Tensor) -> Tensor:
    return x.repeat_interleave(HEADS // KEY_HEADS, dim=1)


def expanded(x: Tensor) -> Tensor:
    batch, _, length, width = x.shape
    x = x[:, :, None].expand(batch, KEY_HEADS, HEADS // KEY_HEADS, length, width)
    return x.reshape(batch, HEADS, length, width)


def native_softmax(x: Tensor) -> Tensor:
    return F.softmax(x, dim=-1, dtype=torch.float64)


def softmax_by_exp(x: Tensor) -> Tensor:
    numerator = torch.exp(x - x.amax(-1, keepdim=True))
    return numerator / numerator.sum(-1, keepdim=True)


def softmax_by_exp_unshifted(x: Tensor) -> Tensor:
    numerator = x.exp()
    return numerator / numerator.sum(-1, keepdim=True)


def softmax_by_exp_detached(x: Tensor) -> Tensor:
    numerator = (x - x.max(-1, keepdim=True).values.detach()).exp()
    return numerator * numerator.sum(-1, keepdim=True).reciprocal()


SOFTMAX: dict[str, Unary] = {
    "native": native_softmax,
    "method": lambda x: x.softmax(-1),
    "by_exp": softmax_by_exp,
    "by_exp_detached": softmax_by_exp_detached,
    "by_exp_unshifted": softmax_by_exp_unshifted,
    "by_exp_twice": lambda x: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True),
    "log_softmax": lambda x: torch.exp(F.log_softmax(x, dim=-1)),
    "logsumexp": lambda x: (x - x.logsumexp(-1, keepdim=True)).exp(),
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor, repeat: Unary = repeated, softmax: Unary = native_softmax) -> Tensor:
    scores = torch.matmul(q, repeat(k).transpose(2, 3)) * HEAD_WIDTH**-0.5
    return torch.matmul(softmax(scores + additive(causal())), repeat(v))


def eager_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, repeated(k)) / math.sqrt(HEAD_WIDTH)
    weights = scores.masked_fill(~causal(), -math.inf).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, repeated(v))


def eager_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values are never repeated: queries are grouped instead."""
    grouped = q.unflatten(1, (KEY_HEADS, -1)) * HEAD_WIDTH**-0.5
    weights = (torch.einsum("bgrqd,bgkd->bgrqk", grouped, k) + additive(causal())).softmax(-1)
    return torch.einsum("bgrqk,bgkd->bgrqd", weights, v).flatten(1, 2)


def eager_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, repeated(k), repeated(v)))
    bias = additive(causal()).expand(len(q), LENGTH, LENGTH)
    weights = torch.baddbmm(bias, q, k.mT, alpha=HEAD_WIDTH**-0.5).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


ATTENTION: dict[str, Attend] = {
    "eager": eager,
    "eager_expand": partial(eager, repeat=expanded),
    "eager_einsum": eager_einsum,
    "eager_grouped": eager_grouped,
    "eager_baddbmm": eager_baddbmm,
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True),
    "sdpa_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "sdpa_boolean_mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=causal(), enable_gqa=True, scale=HEAD_WIDTH**-0.5
    ),
    "sdpa_additive_mask": lambda q, k, v: F.scaled_dot_product_attention(
        q * HEAD_WIDTH**-0.5, repeated(k), repeated(v), attn_mask=additive(causal())[None, None], scale=1.0
    ),
}
"""Causal attention of `(samples, heads, positions, width)`, in which two queries share a key and a value."""


# ---------------------------------------------------------------------------------------------------------------------
# Normalization


def rms_oracle(x: Tensor, stops: Stops, weight: Tensor, eps: float = EPS) -> Tensor:
    return x / stops.constant((torch.einsum("...i,...i->...", x, x) / x.shape[-1] + eps).sqrt()[..., None]) * weight


def rms_by_rsqrt(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


RMS: dict[str, tuple[Binary, float]] = {
    "rsqrt": (rms_by_rsqrt, EPS),
    "sqrt": (lambda x, w: x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * w, EPS),
    "power": (lambda x, w: x * (x * x).mean(-1, keepdim=True).add(EPS).pow(-0.5) * w, EPS),
    "reciprocal": (lambda x, w: w * x * (1 / (x.square().sum(-1, keepdim=True) / WIDTH + EPS).sqrt()), EPS),
    "native": (lambda x, w: F.rms_norm(x, (WIDTH,), w, EPS), EPS),
    "norm": (lambda x, w: w * (x / x.norm(dim=-1, keepdim=True) * WIDTH**0.5), 0.0),
    "vector_norm": (
        lambda x, w: w * x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * WIDTH**-0.5),
        0.0,
    ),
    "normalize": (lambda x, w: F.normalize(x, dim=-1) * WIDTH**0.5 * w, 0.0),
}
"""Spellings, each with the epsilon it has."""

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def layer_norm_oracle(x: Tensor, stops: Stops, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    return rms_oracle(centred(x, -1), stops, weight, eps) + bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), weight, bias, EPS)


def layer_norm_by_var(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS) * weight + bias


def layer_norm_by_var_mean(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return weight * ((x - mean) * torch.rsqrt(variance + EPS)) + bias


def layer_norm_by_moments(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = x.square().mean(-1, keepdim=True) - mean.square()
    return (x - mean) / torch.sqrt(variance + EPS) * weight + bias


def layer_norm_by_centring(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return weight * (x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()) + bias


def layer_norm_folded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As one scale and one shift, the way batch norm is often written."""
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + EPS) * weight
    return x * scale + (bias - mean * scale)


LAYER_NORM: dict[str, Norm] = {
    "native": layer_norm,
    "by_var": layer_norm_by_var,
    "by_var_mean": layer_norm_by_var_mean,
    "by_moments": layer_norm_by_moments,
    "by_centring": layer_norm_by_centring,
    "folded": layer_norm_folded,
}


def centred(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def deviation(x: Tensor, dim: int, correction: int = 0, eps: float = 0.0) -> Tensor:
    n = x.shape[dim]
    return (centred(x, dim).square().sum(dim, keepdim=True) / (n - correction) + eps).sqrt()


def group_norm_oracle(x: Tensor, stops: Stops, groups: int) -> Tensor:
    x = x.unflatten(1, (groups, -1))
    return (centred(x, -1) / stops.constant(deviation(x, -1, eps=EPS))).flatten(1)


def l2_oracle(x: Tensor, stops: Stops) -> Tensor:
    return x / stops.constant(x.square().sum(-1, keepdim=True).sqrt())


SCALE, SHIFT = normal(WIDTH, seed=21), normal(WIDTH, seed=22)

NORMS: dict[str, tuple[Unary, Callable[[Tensor, Stops], Tensor]]] = {
    **{
        f"rms_{name}": (lambda x, norm=norm: norm(x, SCALE), partial(rms_oracle, weight=SCALE, eps=eps))
        for name, (norm, eps) in RMS.items()
    },
    **{
        f"layer_norm_{name}": (
            lambda x, norm=norm: norm(x, SCALE, SHIFT),
            partial(layer_norm_oracle, weight=SCALE, bias=SHIFT),
        )
        for name, norm in LAYER_NORM.items()
    },
    "group_norm": (lambda x: F.group_norm(x, 2, eps=EPS), partial(group_norm_oracle, groups=2)),
    "instance_norm": (
        lambda x: F.instance_norm(x.unflatten(1, (2, 4)), eps=EPS).flatten(1),
        partial(group_norm_oracle, groups=2),
    ),
    "l2": (lambda x: F.normalize(x), l2_oracle),
    "l2_by_hand": (lambda x: x / x.norm(p=2, dim=-1, keepdim=True).clamp(min=1e-12), l2_oracle),
    "by_std": (
        lambda x: x / x.std(-1, keepdim=True),
        lambda x, stops: x / stops.constant(deviation(x, -1, correction=1)),
    ),
    "standardized": (
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS),
        lambda x, stops: centred(x, -1) / stops.constant(deviation(x, -1, correction=1) + EPS),
    ),
}
"""Spellings, each with its oracle."""


# ---------------------------------------------------------------------------------------------------------------------
# Activations and gates


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def tanh_gelu_by_hand(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: dict[str, tuple[Unary, Unary]] = {
    "relu": (torch.relu, torch.relu),
    "relu_by_where": (lambda x: torch.where(x > 0, x, 0.0), torch.relu),
    "relu_by_maximum": (lambda x: torch.maximum(x, torch.zeros_like(x)), torch.relu),
    "squared_relu": (lambda x: torch.relu(x).square(), lambda x: torch.relu(x) ** 2),
    "squared_relu_by_product": (lambda x: torch.relu(x) * torch.relu(x), lambda x: torch.relu(x) ** 2),
    "leaky_relu": (F.leaky_relu, F.leaky_relu),
    "elu": (F.elu, F.elu),
    "elu_by_hand": (lambda x: torch.where(x > 0, x, torch.expm1(x)), F.elu),
    "gelu": (F.gelu, F.gelu),
    "gelu_by_hand": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), F.gelu),
    "tanh_gelu": (tanh_gelu, tanh_gelu),
    "tanh_gelu_by_hand": (tanh_gelu_by_hand, tanh_gelu),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), lambda x: F.silu(1.702 * x) / 1.702),
    "silu": (F.silu, F.silu),
    "silu_by_hand": (lambda x: x * torch.sigmoid(x), F.silu),
    "silu_by_exp": (lambda x: x / (1 + torch.exp(-x)), F.silu),
    "mish": (F.mish, F.mish),
    "mish_by_hand": (lambda x: x * torch.tanh(F.softplus(x)), F.mish),
    "mish_by_log": (lambda x: x * torch.tanh(torch.log1p(torch.exp(x))), F.mish),
    "softsign": (F.softsign, F.softsign),
    "softsign_by_hand": (lambda x: x / (1 + x.abs()), F.softsign),
    "tanhshrink": (F.tanhshrink, F.tanhshrink),
    "tanhshrink_by_hand": (lambda x: x - torch.tanh(x), F.tanhshrink),
    "hardswish": (F.hardswish, F.hardswish),
    "hardswish_by_hand": (lambda x: x * F.relu6(x + 3) / 6, F.hardswish),
    "hardswish_by_sigmoid": (lambda x: x * F.hardsigmoid(x), F.hardswish),
    "tanh": (torch.tanh, torch.tanh),
    "sigmoid": (torch.sigmoid, torch.sigmoid),
    "sigmoid_by_exp": (lambda x: 1 / (1 + torch.exp(-x)), torch.sigmoid),
    "hardsigmoid": (F.hardsigmoid, F.hardsigmoid),
    "softplus": (F.softplus, F.softplus),
    "softplus_by_log": (lambda x: torch.log(1 + torch.exp(x)), F.softplus),
    "exp": (torch.exp, torch.exp),
}
"""Spellings, each with the function it computes."""


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.chunk(2, dim=-1)
    return a, b


def gate_oracle(f: Unary, x: Tensor, stops: Stops) -> Tensor:
    """The first half, through a non-linearity, is the gate of the second."""
    gate, value = halves(x)
    return stops.gated(stops.activation(f, gate), value)


def glu_oracle(x: Tensor, stops: Stops) -> Tensor:
    value, gate = halves(x)
    return stops.gated(stops.activation(torch.sigmoid, gate), value)


def bilinear_oracle(x: Tensor, stops: Stops) -> Tensor:
    return stops.product(torch.mul, *halves(x))


def wavenet_oracle(x: Tensor, stops: Stops) -> Tensor:
    value, gate = halves(x)
    return stops.gated(stops.activation(torch.sigmoid, gate), stops.activation(torch.tanh, value))


def squeeze_oracle(x: Tensor, stops: Stops) -> Tensor:
    return stops.gated(stops.activation(torch.sigmoid, x.mean(-1, keepdim=True)), x)


def highway_oracle(x: Tensor, stops: Stops) -> Tensor:
    carry, value = halves(x)
    gate = stops.activation(torch.sigmoid, carry)
    return stops.gated(gate, stops.activation(torch.relu, value)) + stops.gated(1 - gate, value)


def two_sigmoids_oracle(x: Tensor, stops: Stops) -> Tensor:
    gate, value = x[:, :1], x[:, 1:]
    return stops.gated(stops.activation(torch.sigmoid, gate), stops.activation(torch.sigmoid, value))


def pool_oracle(x: Tensor, stops: Stops) -> Tensor:
    scores, values = halves(x)
    return stops.mixed(torch.mul, stops.softmax(scores), values)


def highway(x: Tensor) -> Tensor:
    carry, value = halves(x)
    gate = torch.sigmoid(carry)
    return gate * torch.relu(value) + (1 - gate) * value


def on_halves(f: Binary) -> Unary:
    return lambda x: f(*halves(x))


GATES: dict[str, tuple[Unary, Callable[[Tensor, Stops], Tensor]]] = {
    "glu": (F.glu, glu_oracle),
    "glu_by_hand": (on_halves(lambda a, b: a * torch.sigmoid(b)), glu_oracle),
    "swiglu": (on_halves(lambda a, b: F.silu(a) * b), partial(gate_oracle, F.silu)),
    "swiglu_swapped": (on_halves(lambda a, b: b * F.silu(a)), partial(gate_oracle, F.silu)),
    "swiglu_by_hand": (on_halves(lambda a, b: a * torch.sigmoid(a) * b), partial(gate_oracle, F.silu)),
    "swiglu_by_slices": (lambda x: F.silu(x[..., :4]) * x[..., 4:], partial(gate_oracle, F.silu)),
    "geglu": (on_halves(lambda a, b: F.gelu(a) * b), partial(gate_oracle, F.gelu)),
    "geglu_by_hand": (on_halves(lambda a, b: tanh_gelu_by_hand(a) * b), partial(gate_oracle, tanh_gelu)),
    "reglu": (on_halves(lambda a, b: torch.relu(a) * b), partial(gate_oracle, torch.relu)),
    "tanh": (on_halves(lambda a, b: torch.tanh(a) * b), partial(gate_oracle, torch.tanh)),
    "hardsigmoid": (on_halves(lambda a, b: b * F.hardsigmoid(a)), partial(gate_oracle, F.hardsigmoid)),
    "bilinear": (on_halves(torch.mul), bilinear_oracle),
    "wavenet": (on_halves(lambda a, b: torch.tanh(a) * torch.sigmoid(b)), wavenet_oracle),
    "squeeze": (lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)), squeeze_oracle),
    "highway": (highway, highway_oracle),
    "two_sigmoids": (lambda x: torch.sigmoid(x[:, 1:]) * torch.sigmoid(x[:, :1]), two_sigmoids_oracle),
    **{
        f"softmax_{name}": (on_halves(lambda a, b, softmax=softmax: softmax(a) * b), pool_oracle)
        for name, softmax in SOFTMAX.items()
    },
}
"""Spellings of products, each with its oracle."""


class Sandwich(nn.Module):
    """One operation between two dense layers."""

    def __init__(self, operation: Unary) -> None:
        super().__init__()
        self.operation = operation
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(operation(normal(2, WIDTH)).shape[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operation(self.first(x)))


def sandwich(operation: Unary, oracle: Callable[[Tensor, Stops], Tensor]) -> Net:
    def forward(params: Params, x: Tensor, stops: Stops) -> Tensor:
        return affine(params, "second", oracle(affine(params, "first", x), stops))

    return Net(randomized(Sandwich(operation), seed=1), normal(3, WIDTH, seed=2), forward)


def activation_sandwich(operation: Unary, f: Unary) -> Net:
    return sandwich(operation, lambda x, stops: stops.activation(f, x))


# ---------------------------------------------------------------------------------------------------------------------
# A decoder in the manner of Llama: RMSNorm, rotary embedding, grouped queries, SwiGLU, no bias


def angles() -> Tensor:
    frequency = 100.0 ** (-torch.arange(0, HEAD_WIDTH, 2, dtype=torch.float64) / HEAD_WIDTH)
    return torch.arange(LENGTH, dtype=torch.float64)[:, None] * frequency


def rotated(x: Tensor) -> Tensor:
    """The rotary embedding, in the manner of Llama."""
    angle = torch.cat([angles(), angles()], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()


def rotated_oracle(x: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    cos, sin = angles().cos(), angles().sin()
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2).flatten(-2)


class RMSNorm(nn.Module):
    def __init__(self, spelling: Binary) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(x, self.weight)


class GroupedAttention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.q = nn.Linear(WIDTH, HEADS * HEAD_WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, KEY_HEADS * HEAD_WIDTH, bias=False)
        self.v = nn.Linear(WIDTH, KEY_HEADS * HEAD_WIDTH, bias=False)
        self.o = nn.Linear(HEADS * HEAD_WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, HEAD_WIDTH).transpose(1, 2) for p in (self.q, self.k, self.v))
        attended = self.attend(rotated(q), rotated(k), v)
        return self.o(attended.transpose(1, 2).contiguous().view(batch, length, -1))


class AttentionOnly(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attention = GroupedAttention(attend)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x).mean(1))


class DecoderLayer(nn.Module):
    def __init__(self, attend: Attend, norm: Binary) -> None:
        super().__init__()
        self.attention = GroupedAttention(attend)
        self.attention_norm, self.mlp_norm = RMSNorm(norm), RMSNorm(norm)
        self.gate, self.up = nn.Linear(WIDTH, 10, bias=False), nn.Linear(WIDTH, 10, bias=False)
        self.down = nn.Linear(10, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Of embeddings; classifies by all positions, as the last one by itself is masked from nothing in one layer."""

    def __init__(self, attend: Attend, norm: Binary, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(attend, norm) for _ in range(layers))
        self.norm = RMSNorm(norm)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def grouped_attention_oracle(params: Params, name: str, x: Tensor, stops: Stops) -> Tensor:
    q = heads(affine(params, f"{name}.q", x), HEADS)
    k, v = (heads(affine(params, f"{name}.{part}", x), KEY_HEADS) for part in "kv")
    shared = [[i // (HEADS // KEY_HEADS)] for i in range(HEADS)]
    k, v = (torch.cat([part[:, group] for group in shared], dim=1) for part in (rotated_oracle(k), v))
    return affine(params, f"{name}.o", merged(attention_oracle(rotated_oracle(q), k, v, stops, causal())))


def attention_only_oracle(params: Params, x: Tensor, stops: Stops) -> Tensor:
    return affine(params, "head", grouped_attention_oracle(params, "attention", x, stops).mean(1))


def attention_only(attend: Attend) -> Net:
    return Net(randomized(AttentionOnly(attend), seed=3), normal(2, LENGTH, WIDTH, seed=4), attention_only_oracle)


def decoder_oracle(params: Params, x: Tensor, stops: Stops, layers: int, eps: float) -> Tensor:
    for name in (f"layers.{i}" for i in range(layers)):
        h = rms_oracle(x, stops, params[f"{name}.attention_norm.weight"], eps)
        x = x + grouped_attention_oracle(params, f"{name}.attention", h, stops)
        h = rms_oracle(x, stops, params[f"{name}.mlp_norm.weight"], eps)
        gate = stops.activation(F.silu, affine(params, f"{name}.gate", h))
        x = x + affine(params, f"{name}.down", stops.gated(gate, affine(params, f"{name}.up", h)))
    return affine(params, "head", rms_oracle(x, stops, params["norm.weight"], eps).mean(1))


def decoder(attend: Attend = eager, norm: Binary = rms_by_rsqrt, eps: float = EPS, layers: int = 1) -> Net:
    module = randomized(Decoder(attend, norm, layers), seed=3)
    oracle = partial(decoder_oracle, layers=layers, eps=eps)
    return Net(module, normal(2, LENGTH, WIDTH, seed=4), oracle)


# ---------------------------------------------------------------------------------------------------------------------
# A decoder in the manner of GPT-2: LayerNorm first, fused projections stored transposed, GELU by tanh


class Conv1D(nn.Module):
    """A dense layer with its weight transposed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[1])


class LayerNorm(nn.Module):
    def __init__(self, spelling: Norm) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight, self.bias = nn.Parameter(torch.empty(WIDTH)), nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(x, self.weight, self.bias)


class GPTLayer(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(norm), LayerNorm(norm)
        self.qkv, self.out = Conv1D(WIDTH, 3 * WIDTH), Conv1D(WIDTH, WIDTH)
        self.fc, self.proj = Conv1D(WIDTH, 10), Conv1D(10, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).split(WIDTH, dim=2)
        q, k, v = (t.view(*t.shape[:-1], 2, WIDTH // 2).transpose(1, 2) for t in (q, k, v))
        scores = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], (WIDTH // 2) ** 0.5, dtype=q.dtype)
        lowest = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)
        weights = F.softmax(torch.where(causal(), scores, lowest), dim=-1)
        x = x + self.out(torch.matmul(weights, v).transpose(1, 2).reshape(x.shape).contiguous())
        return x + self.proj(tanh_gelu_by_hand(self.fc(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, norm: Norm, layers: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(LENGTH + 2, WIDTH)
        self.layers = nn.ModuleList(GPTLayer(norm) for _ in range(layers))
        self.norm = LayerNorm(norm)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(torch.arange(x.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).mean(1)


def gpt_oracle(params: Params, x: Tensor, stops: Stops, layers: int) -> Tensor:
    def dense(name: str, x: Tensor) -> Tensor:
        return torch.einsum("...i,io->...o", x, params[f"{name}.weight"]) + params[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm_oracle(x, stops, params[f"{name}.weight"], params[f"{name}.bias"])

    x = x + params["positions.weight"][:LENGTH]
    for name in (f"layers.{i}" for i in range(layers)):
        q, k, v = (heads(t, 2) for t in dense(f"{name}.qkv", norm(f"{name}.norm1", x)).chunk(3, -1))
        x = x + dense(f"{name}.out", merged(attention_oracle(q, k, v, stops, causal())))
        x = x + dense(f"{name}.proj", stops.activation(tanh_gelu, dense(f"{name}.fc", norm(f"{name}.norm2", x))))
    return affine(params, "head", norm("norm", x)).mean(1)


def gpt(norm: Norm = layer_norm, layers: int = 1) -> Net:
    module = randomized(GPT(norm, layers), seed=5)
    return Net(module, normal(2, LENGTH, WIDTH, seed=6), partial(gpt_oracle, layers=layers))


# ---------------------------------------------------------------------------------------------------------------------
# An encoder in the manner of BERT: LayerNorm last, padding, exact GELU, a pooler


def bert_eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    bias = (1.0 - mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return torch.matmul(F.softmax(scores + bias, dim=-1), v)


def bert_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])


def bert_masked_fill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    return scores.masked_fill(mask[:, None, None, :] == 0, -math.inf).softmax(-1) @ v


MaskedAttend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BERT: dict[str, MaskedAttend] = {"eager": bert_eager, "sdpa": bert_sdpa, "masked_fill": bert_masked_fill}


class BertLayer(nn.Module):
    def __init__(self, attend: MaskedAttend) -> None:
        super().__init__()
        self.attend = attend
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.fc, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=EPS), nn.LayerNorm(WIDTH, eps=EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], 2, -1).transpose(1, 2) for p in (self.query, self.key, self.value))
        attended = self.attend(q, k, v, mask).permute(0, 2, 1, 3).contiguous().view(x.shape)
        x = self.norm1(self.out(attended) + x)
        return self.norm2(self.proj(F.gelu(self.fc(x))) + x)


class Bert(nn.Module):
    def __init__(self, attend: MaskedAttend, layers: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=EPS)
        self.layers = nn.ModuleList(BertLayer(attend) for _ in range(layers))
        self.pooler, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.mask: Tensor
        self.register_buffer("mask", valid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.positions.weight)
        for layer in self.layers:
            x = layer(x, self.mask)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


def bert_oracle(params: Params, x: Tensor, stops: Stops, layers: int) -> Tensor:
    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm_oracle(x, stops, params[f"{name}.weight"], params[f"{name}.bias"])

    x = norm("norm", x + params["positions.weight"])
    for name in (f"layers.{i}" for i in range(layers)):
        q, k, v = (heads(affine(params, f"{name}.{part}", x), 2) for part in ("query", "key", "value"))
        attended = merged(attention_oracle(q, k, v, stops, valid()[:, None, None]))
        x = norm(f"{name}.norm1", x + affine(params, f"{name}.out", attended))
        hidden = stops.activation(F.gelu, affine(params, f"{name}.fc", x))
        x = norm(f"{name}.norm2", x + affine(params, f"{name}.proj", hidden))
    return affine(params, "head", stops.activation(torch.tanh, affine(params, "pooler", x[:, 0])))


def bert(attend: MaskedAttend, layers: int = 1) -> Net:
    module = randomized(Bert(attend, layers), seed=7)
    return Net(module, normal(2, LENGTH, WIDTH, seed=8), partial(bert_oracle, layers=layers))


# ---------------------------------------------------------------------------------------------------------------------
# Torch's own attention modules


def projected(params: Params, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of queries, keys and values, as `nn.MultiheadAttention` keeps them."""
    fused = torch.einsum("...i,oi->...o", x, params[f"{name}.in_proj_weight"]) + params[f"{name}.in_proj_bias"]
    q, k, v = (heads(part, 2) for part in fused.chunk(3, -1))
    return q, k, v


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool, padded: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.need_weights = need_weights
        self.padding: Tensor | None
        self.register_buffer("padding", ~valid() if padded else None)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, key_padding_mask=self.padding, need_weights=self.need_weights)
        return self.head(attended[:, 0])


def self_attention_oracle(params: Params, x: Tensor, stops: Stops, padded: bool) -> Tensor:
    mask = valid()[:, None, None] if padded else None
    attended = attention_oracle(*projected(params, "attention", x), stops, mask)
    return affine(params, "head", affine(params, "attention.out_proj", merged(attended))[:, 0])


def self_attention(need_weights: bool, padded: bool, no_grad: bool) -> Net:
    module = randomized(SelfAttention(need_weights, padded), seed=9)
    oracle = partial(self_attention_oracle, padded=padded)
    return Net(module, normal(2, LENGTH, WIDTH, seed=10), oracle, no_grad=no_grad)


class LearnedQuery(nn.Module):
    """Attention pooling: the queries do not depend on the input, so keys share their product with nobody."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.query = nn.Parameter(torch.empty(2, WIDTH))
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query.expand(len(x), -1, -1)
        return self.head(self.attend(query, self.key(x), self.value(x)).flatten(1))


def learned_query_oracle(params: Params, x: Tensor, stops: Stops) -> Tensor:
    key, value = affine(params, "key", x), affine(params, "value", x)
    weights = stops.softmax(torch.einsum("qd,bkd->bqk", params["query"], key) / math.sqrt(WIDTH))
    pooled = stops.mixed(partial(torch.einsum, "bqk,bkd->bqd"), weights, value)
    return affine(params, "head", pooled.flatten(1))


LEARNED_QUERY: dict[str, Attend] = {
    "eager": lambda q, k, v: (q @ k.mT * WIDTH**-0.5).softmax(-1) @ v,
    "sdpa": F.scaled_dot_product_attention,
}


def learned_query(attend: Attend) -> Net:
    return Net(randomized(LearnedQuery(attend), seed=11), normal(2, LENGTH, WIDTH, seed=12), learned_query_oracle)


class Encoder(nn.Module):
    """`nn.TransformerEncoder`, or one layer of it, read out at the first position."""

    def __init__(self, norm_first: bool, padded: bool, layers: int, activation: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 10, activation=activation, layer_norm_eps=EPS, batch_first=True, norm_first=norm_first
        )
        # Nested tensors, the default where there is padding, are made only if the mask has the right numbers in it.
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False) if layers else layer
        self.head = nn.Linear(WIDTH, CLASSES)
        self.padding: Tensor | None
        self.register_buffer("padding", ~valid() if padded else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, src_key_padding_mask=self.padding)[:, 0])


def encoder_oracle(
    params: Params, x: Tensor, stops: Stops, norm_first: bool, padded: bool, names: list[str], f: Unary
) -> Tensor:
    mask = valid()[:, None, None] if padded else None

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm_oracle(x, stops, params[f"{name}.weight"], params[f"{name}.bias"])

    def attend(name: str, x: Tensor) -> Tensor:
        attended = attention_oracle(*projected(params, f"{name}.self_attn", x), stops, mask)
        return affine(params, f"{name}.self_attn.out_proj", merged(attended))

    def feed(name: str, x: Tensor) -> Tensor:
        return affine(params, f"{name}.linear2", stops.activation(f, affine(params, f"{name}.linear1", x)))

    for name in names:
        if norm_first:
            x = x + attend(name, norm(f"{name}.norm1", x))
            x = x + feed(name, norm(f"{name}.norm2", x))
        else:
            x = norm(f"{name}.norm1", x + attend(name, x))
            x = norm(f"{name}.norm2", x + feed(name, x))
    return affine(params, "head", x[:, 0])


def encoder(norm_first: bool, padded: bool, layers: int, no_grad: bool, activation: str = "gelu") -> Net:
    """With `layers=0`, one layer by itself."""
    module = randomized(Encoder(norm_first, padded, layers, activation), seed=13)
    names = [f"body.layers.{i}" for i in range(layers)] or ["body"]
    f = {"gelu": F.gelu, "relu": torch.relu}[activation]
    oracle = partial(encoder_oracle, norm_first=norm_first, padded=padded, names=names, f=f)
    return Net(module, normal(2, LENGTH, WIDTH, seed=14), oracle, no_grad=no_grad)


# ---------------------------------------------------------------------------------------------------------------------
# A selective state space model in the manner of Mamba

STATE, RANK, INNER, KERNEL = 3, 2, 6, 4

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of `u` and `dt`, shaped `(samples, INNER, LENGTH)`, `A` `(INNER, STATE)`, `B` and `C` `(samples, LENGTH, STATE)`."""


def scan_slowly(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The path without kernels that common implementations have."""
    discrete_A = torch.exp(A[None, :, None, :] * dt[:, :, :, None])
    discrete_B = dt[:, :, :, None] * B[:, None, :, :]
    deltaB_u = discrete_B * u[:, :, :, None]
    ssm_state = torch.zeros(len(u), INNER, STATE, dtype=u.dtype)
    outputs = []
    for index in range(LENGTH):
        ssm_state = discrete_A[:, :, index] * ssm_state + deltaB_u[:, :, index]
        outputs.append(torch.matmul(ssm_state, C[:, index, :].unsqueeze(-1))[:, :, 0])
    return torch.stack(outputs, dim=-1)


def scan_by_einsum(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Three factors in one product, and a state that starts with the first input."""
    decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    drive = torch.einsum("bdl,bln,bdl->bdln", dt, B, u)
    state, outputs = drive[:, :, 0], []
    for index in range(LENGTH):
        if index:
            state = decay[:, :, index] * state + drive[:, :, index]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, index]))
    return torch.stack(outputs, dim=2)


def scan_from_dt_u(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The step size times the input first, and all outputs at once."""
    decay = torch.exp(dt[..., None] * A[:, None])
    drive = (dt * u)[..., None] * B[:, None]
    state, states = torch.zeros_like(drive[:, :, 0]), []
    for index in range(LENGTH):
        state = state * decay[:, :, index] + drive[:, :, index]
        states.append(state)
    return (torch.stack(states, dim=2) * C[:, None]).sum(-1)


SCANS: dict[str, Scan] = {"slow": scan_slowly, "einsum": scan_by_einsum, "dt_u": scan_from_dt_u}


class MambaMixer(nn.Module):
    def __init__(self, scan: Scan) -> None:
        super().__init__()
        self.scan = scan
        self.in_proj = nn.Linear(WIDTH, 2 * INNER, bias=False)
        self.conv1d = nn.Conv1d(INNER, INNER, KERNEL, groups=INNER, padding=KERNEL - 1)
        self.x_proj = nn.Linear(INNER, RANK + 2 * STATE, bias=False)
        self.dt_proj = nn.Linear(RANK, INNER)
        self.A_log = nn.Parameter(torch.empty(INNER, STATE))
        self.D = nn.Parameter(torch.empty(INNER))
        self.out_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        u = F.silu(self.conv1d(u)[..., :LENGTH])
        dt, B, C = torch.split(self.x_proj(u.transpose(1, 2)), [RANK, STATE, STATE], dim=-1)
        dt = F.softplus(self.dt_proj(dt)).transpose(1, 2)
        y = self.scan(u, dt, -torch.exp(self.A_log), B, C) + u * self.D[None, :, None]
        y = y * F.silu(z)
        return self.out_proj(y.transpose(1, 2))


class Mamba(nn.Module):
    def __init__(self, scan: Scan, layers: int) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(MambaMixer(scan) for _ in range(layers))
        self.norms = nn.ModuleList(RMSNorm(rms_by_rsqrt) for _ in range(layers + 1))
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            x = x + mixer(norm(x))
        return self.head(self.norms[-1](x)[:, -1])


def mamba_oracle(params: Params, x: Tensor, stops: Stops, layers: int) -> Tensor:
    for i in range(layers):
        name = f"mixers.{i}"
        u, z = affine(params, f"{name}.in_proj", rms_oracle(x, stops, params[f"norms.{i}.weight"])).chunk(2, dim=-1)
        past = torch.cat([torch.zeros_like(u[:, : KERNEL - 1]), u], dim=1).unfold(1, KERNEL, 1)
        convolved = torch.einsum("btdk,dk->btd", past, params[f"{name}.conv1d.weight"][:, 0])
        u = stops.activation(F.silu, convolved + params[f"{name}.conv1d.bias"])
        dt, B, C = affine(params, f"{name}.x_proj", u).split([RANK, STATE, STATE], dim=-1)
        dt = F.softplus(affine(params, f"{name}.dt_proj", dt))
        decay = stops.constant(torch.exp(-dt[..., None] * params[f"{name}.A_log"].exp()))
        drive, read = stops.constant(dt[..., None] * B[:, :, None]), stops.constant(C)
        y, state = [], torch.zeros_like(drive[:, 0])
        for t in range(LENGTH):
            state = decay[:, t] * state + drive[:, t] * u[:, t, :, None]
            y.append(torch.einsum("bdn,bn->bd", state, read[:, t]) + params[f"{name}.D"] * u[:, t])
        gated = stops.gated(stops.activation(F.silu, z), torch.stack(y, dim=1))
        x = x + affine(params, f"{name}.out_proj", gated)
    return affine(params, "head", rms_oracle(x[:, -1], stops, params[f"norms.{layers}.weight"]))


def mamba(scan: Scan, layers: int = 1) -> Net:
    module = randomized(Mamba(scan, layers), seed=15)
    oracle = partial(mamba_oracle, layers=layers)
    return Net(module, normal(2, LENGTH, WIDTH, seed=16), oracle, composites=("attn", "cp", "mamba"))


def mamba_without_bias() -> Net:
    """The step size has a bias still: relevance does not get there."""
    net = mamba(scan_slowly)
    for mixer in net.module.mixers:  # type: ignore[union-attr]
        mixer.conv1d.bias.data.zero_()  # type: ignore[union-attr]
    return net


# ---------------------------------------------------------------------------------------------------------------------
# LSTM and GRU: the signal takes all


class Recurrent(nn.Module):
    """Reads the mean over time, or the last state of the last layer."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], final: bool, bidirectional: bool, **kwargs: Any) -> None:
        super().__init__()
        self.rnn = cell(WIDTH, 6, bidirectional=bidirectional, batch_first=True, **kwargs)
        self.head = nn.Linear(6 * (1 + (bidirectional and not final)), CLASSES, bias=kwargs.get("bias", True))
        self.final = final

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.rnn(x)
        last = state[0] if isinstance(state, tuple) else state
        return self.head(last[-1] if self.final else outputs.mean(1))


def lstm_step(inputs: Tensor, state: tuple[Tensor, Tensor], hidden: Unary, stops: Stops) -> tuple[Tensor, Tensor]:
    i, f, g, o = (inputs + hidden(state[0])).chunk(4, dim=-1)
    i, f, o = (stops.constant(torch.sigmoid(gate)) for gate in (i, f, o))
    memory = f * state[1] + i * stops.activation(torch.tanh, g)
    return o * stops.activation(torch.tanh, memory), memory


def gru_step(inputs: Tensor, state: tuple[Tensor, Tensor], hidden: Unary, stops: Stops) -> tuple[Tensor, Tensor]:
    (r, z, n), (r_hidden, z_hidden, n_hidden) = inputs.chunk(3, dim=-1), hidden(state[0]).chunk(3, dim=-1)
    r, z = stops.constant(torch.sigmoid(r + r_hidden)), stops.constant(torch.sigmoid(z + z_hidden))
    output = (1 - z) * stops.activation(torch.tanh, n + r * n_hidden) + z * state[0]
    return output, output


def direction_oracle(params: Params, x: Tensor, stops: Stops, step: Callable[..., Any], suffix: str) -> list[Tensor]:
    """The states over time of one layer in one direction, in the order of the steps it takes."""

    def dense(part: str, x: Tensor) -> Tensor:
        y = torch.einsum("...i,oi->...o", x, params[f"rnn.weight_{part}_{suffix}"])
        return y + params[f"rnn.bias_{part}_{suffix}"] if f"rnn.bias_{part}_{suffix}" in params else y

    zero = torch.zeros(len(x), 6, dtype=x.dtype)
    state, outputs = (zero, zero), []
    for inputs in reversed(x.unbind(1)) if suffix.endswith("_reverse") else x.unbind(1):
        state = step(dense("ih", inputs), state, partial(dense, "hh"), stops)
        outputs.append(state[0])
    return outputs


def recurrent_oracle(
    params: Params, x: Tensor, stops: Stops, step: Callable[..., Any], layers: int, final: bool, bidirectional: bool
) -> Tensor:
    last = x
    for i in range(layers):
        states = direction_oracle(params, x, stops, step, f"l{i}")
        last, parts = states[-1], [torch.stack(states, dim=1)]
        if bidirectional:
            states = direction_oracle(params, x, stops, step, f"l{i}_reverse")
            last, parts = states[-1], [*parts, torch.stack(states[::-1], dim=1)]
        x = torch.cat(parts, dim=-1)
    return affine(params, "head", last if final else x.mean(1))


STEPS: dict[Any, Callable[..., Any]] = {nn.LSTM: lstm_step, nn.GRU: gru_step}


def recurrent(
    cell: type[nn.LSTM] | type[nn.GRU],
    layers: int = 1,
    final: bool = False,
    bidirectional: bool = False,
    bias: bool = True,
) -> Net:
    module = Recurrent(cell, final, bidirectional, num_layers=layers, bias=bias)
    oracle = partial(recurrent_oracle, step=STEPS[cell], layers=layers, final=final, bidirectional=bidirectional)
    return Net(randomized(module, seed=17), normal(2, LENGTH, WIDTH, seed=18), oracle)


class RecurrentByHand(nn.Module):
    """One layer, one direction, no bias, written out in Python on the parameters of the fused module."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.rnn = cell(WIDTH, 6, bias=False, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        ((input_weight, hidden_weight),) = self.rnn.all_weights
        h, outputs = torch.zeros(len(x), 6, dtype=x.dtype), []
        c = h
        for t in range(LENGTH):
            inputs = F.linear(x[:, t], input_weight)
            hidden = F.linear(h, hidden_weight)
            if isinstance(self.rnn, nn.LSTM):
                i, f, g, o = (inputs + hidden).chunk(4, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            else:
                (r, z, n), (r_hidden, z_hidden, n_hidden) = inputs.chunk(3, 1), hidden.chunk(3, 1)
                n = torch.tanh(n + torch.sigmoid(r + r_hidden) * n_hidden)
                h = n + torch.sigmoid(z + z_hidden) * (h - n)
            outputs.append(h)
        return self.head(torch.stack(outputs, 1).mean(1))


def recurrent_by_hand(cell: type[nn.LSTM] | type[nn.GRU]) -> Net:
    """Under `cp_lrp` only: there every sigmoid is a gate, as it is in the fused modules everywhere.

    A bias would make a difference: where the state is a constant, as at first, so is what the reset gate multiplies,
    and a product with a constant is linear.
    """
    oracle = partial(recurrent_oracle, step=STEPS[cell], layers=1, final=False, bidirectional=False)
    module = randomized(RecurrentByHand(cell), seed=17)
    return Net(module, normal(2, LENGTH, WIDTH, seed=18), oracle, composites=("cp",))


# ---------------------------------------------------------------------------------------------------------------------
# Squeeze and excitation


class SqueezeNet(nn.Module):
    """Squeeze and excitation between two convolutions, by 1x1 convolutions or dense layers."""

    def __init__(self, gate: Unary, dense: bool) -> None:
        super().__init__()
        self.gate, self.dense = gate, dense
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3)
        self.squeeze, self.excite = (
            (nn.Linear(4, 2), nn.Linear(2, 4)) if dense else (nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1))
        )
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        pooled = x.mean((2, 3)) if self.dense else F.adaptive_avg_pool2d(x, 1)
        scale = self.gate(self.excite(torch.relu(self.squeeze(pooled))))
        x = x * scale.view(len(x), 4, 1, 1).expand_as(x) if self.dense else scale * x
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


def squeeze_net_oracle(params: Params, x: Tensor, stops: Stops, gate: Unary) -> Tensor:
    def convolved(name: str, x: Tensor) -> Tensor:
        patches = x.unfold(2, 3, 1).unfold(3, 3, 1)
        y = torch.einsum("bihwkl,oikl->bohw", patches, params[f"{name}.weight"])
        return y + params[f"{name}.bias"][:, None, None]

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ params[f"{name}.weight"].flatten(1).T + params[f"{name}.bias"]

    x = stops.activation(torch.relu, convolved("conv1", F.pad(x, (1, 1, 1, 1))))
    squeezed = stops.activation(torch.relu, dense("squeeze", x.mean((2, 3))))
    x = stops.gated(stops.activation(gate, dense("excite", squeezed))[..., None, None], x)
    return dense("head", stops.activation(torch.relu, convolved("conv2", x)).mean((2, 3)))


def squeeze_net(gate: Unary, dense: bool) -> Net:
    module = randomized(SqueezeNet(gate, dense), seed=19)
    return Net(module, normal(2, 2, 6, 6, seed=20), partial(squeeze_net_oracle, gate=gate))


# ---------------------------------------------------------------------------------------------------------------------
# The list


NETS: dict[str, Callable[[], Net]] = {
    "decoder-deep": partial(decoder, layers=2),
    "decoder-deep_sdpa": partial(decoder, attend=ATTENTION["sdpa_gqa"], layers=2),
    **{
        f"decoder-rms_{name}": partial(decoder, norm=RMS[name][0], eps=RMS[name][1])
        for name in ("rsqrt", "native", "norm")
    },
    **{f"attention-{name}": partial(attention_only, attend) for name, attend in ATTENTION.items()},
    **{
        f"attention-softmax_{name}": partial(attention_only, partial(eager, softmax=SOFTMAX[name]))
        for name in ("by_exp", "log_softmax")
    },
    "gpt-deep": partial(gpt, layers=2),
    **{f"gpt-layer_norm_{name}": partial(gpt, norm=LAYER_NORM[name]) for name in ("native", "by_var", "by_moments")},
    "bert-deep": partial(bert, bert_eager, layers=2),
    **{f"bert-{name}": partial(bert, attend) for name, attend in BERT.items()},
    **{
        f"self_attention{'-weights' * weights}{'-padded' * padded}{'-no_grad' * no_grad}": partial(
            self_attention, weights, padded, no_grad
        )
        for weights in (False, True)
        for padded in (False, True)
        for no_grad in (False, True)
    },
    **{f"learned_query-{name}": partial(learned_query, attend) for name, attend in LEARNED_QUERY.items()},
    **{
        f"encoder_layer{'-norm_first' * first}{'-padded' * padded}{'-no_grad' * no_grad}": partial(
            encoder, first, padded, 0, no_grad
        )
        for first in (False, True)
        for padded in (False, True)
        for no_grad in (False, True)
        if not no_grad or first == padded
    },
    "encoder_layer-relu": partial(encoder, False, False, 0, False, "relu"),
    "encoder-no_grad": partial(encoder, False, False, 2, True),
    "encoder-norm_first-padded": partial(encoder, True, True, 2, False),
    "mamba-deep": partial(mamba, scan_slowly, layers=2),
    "mamba-unbiased": mamba_without_bias,
    **{f"mamba-{name}": partial(mamba, scan) for name, scan in SCANS.items()},
    **{
        f"{cell.__name__.lower()}-{name}": partial(recurrent, cell, **kwargs)
        for cell in (nn.LSTM, nn.GRU)
        for name, kwargs in {
            "one": {},
            "final": {"final": True},
            "two_bidirectional": {"layers": 2, "bidirectional": True},
            "bidirectional_final": {"bidirectional": True, "final": True},
            "unbiased": {"bias": False},
        }.items()
    },
    "lstm-by_hand": partial(recurrent_by_hand, nn.LSTM),
    "gru-by_hand": partial(recurrent_by_hand, nn.GRU),
    "squeeze_net-sigmoid": partial(squeeze_net, torch.sigmoid, dense=False),
    "squeeze_net-sigmoid_dense": partial(squeeze_net, torch.sigmoid, dense=True),
    "squeeze_net-hardsigmoid": partial(squeeze_net, F.hardsigmoid, dense=False),
    **{f"activation-{name}": partial(activation_sandwich, *pair) for name, pair in ACTIVATIONS.items()},
    **{f"gate-{name}": partial(sandwich, *pair) for name, pair in GATES.items()},
    **{f"norm-{name}": partial(sandwich, *pair) for name, pair in NORMS.items()},
}
