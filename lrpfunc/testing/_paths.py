"""Blocks with several paths: branches that merge, loops, gates and attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrpfunc.testing._code import Pasteable
from lrpfunc.testing._net import Block, Scope, run


def fit(x: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """`x` cut, or filled with zeros, to a shape with the same batch."""
    if x.shape == shape:
        return x
    if x.ndim != len(shape):
        return fit(x.flatten(1), (x.shape[0], math.prod(shape[1:]))).reshape(shape)
    return F.pad(x, [n for have, want in zip(x.shape[::-1], tuple(shape)[::-1], strict=True) for n in (0, want - have)])


@final
@dataclass(frozen=True, repr=False)
class Residual(Pasteable):
    """Adds what its blocks make of the input to the input, perhaps in place."""

    blocks: tuple[Block, ...] = ()
    inplace: bool = False

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        y = fit(run(self.blocks, p, x), x.shape)
        if self.inplace and self.blocks:
            y = y.clone()
            y += x
            return y
        return x + y


@final
@dataclass(frozen=True, repr=False)
class Branch(Pasteable):
    """Two ways from one input, merged."""

    left: tuple[Block, ...] = ()
    right: tuple[Block, ...] = ()
    merge: Literal["add", "cat", "mul", "sub", "max", "mean"] = "add"

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        y = run(self.left, p.inside("left"), x.clone())
        z = fit(run(self.right, p.inside("right"), x.clone()), y.shape)
        match self.merge:
            case "add":
                return y + z
            case "sub":
                return y - 0.5 * z
            case "mul":
                return y * z
            case "max":
                return torch.maximum(y, z)
            case "mean":
                return torch.stack([y, z]).mean(0)
            case _:
                return torch.cat([y, z], 1)


@final
@dataclass(frozen=True, repr=False)
class Reuse(Pasteable):
    """The same blocks, with the same parameters, several times over."""

    blocks: tuple[Block, ...] = ()
    times: int = 2

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        shape = x.shape
        for _ in range(self.times):
            x = fit(run(self.blocks, p, x), shape)
        return x


@final
@dataclass(frozen=True, repr=False)
class Tied(Pasteable):
    """To a hidden layer and back with one weight, transposed, and an activation between."""

    hidden: int = 1
    activation: Block | None = None

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        weight = p("weight", self.hidden, x.shape[-1])
        y = x @ weight.t()
        return (y if self.activation is None else self.activation(p, y)) @ weight


@final
@dataclass(frozen=True, repr=False)
class Gated(Pasteable):
    """One part of the features modulates another."""

    name: Literal["glu", "swiglu", "squeeze", "highway", "written"] = "glu"

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        n = x.shape[-1]
        if self.name == "squeeze":
            axes = tuple(range(2, x.ndim))
            pooled = x.mean(axes) if axes else x
            gate = torch.sigmoid(F.linear(pooled, p("gate", x.shape[1], x.shape[1]), p("bias", x.shape[1])))
            return x * gate.reshape(*gate.shape, *[1] * len(axes))
        if self.name == "highway":
            gate = torch.sigmoid(F.linear(x, p("gate", n, n), p("bias", n)))
            return gate * torch.tanh(F.linear(x, p("value", n, n))) + (1 - gate) * x
        both = F.linear(x, p("both", 2 * n, n), p("bias", 2 * n))
        if self.name == "glu":
            return F.glu(both, -1)
        gate, value = both.chunk(2, -1)
        return F.silu(gate) * value if self.name == "swiglu" else value * torch.sigmoid(gate)


def tokens(x: Tensor) -> Tensor:
    """A batch of sequences of four tokens at most: the features of a vector one by one, the channels of an image."""
    return (x.unsqueeze(-1) if x.ndim == 2 else x.flatten(2))[:, :4]


@final
@dataclass(frozen=True, repr=False)
class SelfAttention(Pasteable):
    """Attention of a sequence to itself, fused, written out or as a module."""

    heads: int = 1
    width: int = 1
    causal: bool = False
    spelling: Literal["written", "fused", "module"] = "written"

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        x = tokens(x)
        size = self.heads * self.width
        if self.spelling == "module":
            x = F.linear(x, p("embed", size, x.shape[-1]))
            x = x.transpose(0, 1)  # with the batch first, torch may take a path that rounds differently
            return p.module("", nn.MultiheadAttention, size, self.heads)(x, x, x, need_weights=False)[0].transpose(0, 1)
        q, k, v = (self._split(F.linear(x, p(name, size, x.shape[-1]))) for name in "qkv")
        if self.spelling == "fused":
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.mT / math.sqrt(self.width)
            if self.causal:
                scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) == 1, -torch.inf)
            attended = scores.softmax(-1) @ v
        return F.linear(attended.transpose(1, 2).flatten(2), p("out", size, size))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.width)).transpose(1, 2)


@final
@dataclass(frozen=True, repr=False)
class Loop(Pasteable):
    """A recurrent loop over a sequence: its last state, or all of them."""

    cell: Literal["rnn", "leaky", "lstm", "gru"] = "rnn"
    hidden: int = 1
    all_states: bool = False

    def __call__(self, p: Scope, x: Tensor) -> Tensor:
        x = tokens(x)
        if self.cell in ("lstm", "gru"):
            make = nn.LSTM if self.cell == "lstm" else nn.GRU
            states = p.module("", make, x.shape[-1], self.hidden, batch_first=True)(x)[0]
        else:
            states = torch.stack(self._states(p, x), 1)
        return states if self.all_states else states[:, -1]

    def _states(self, p: Scope, x: Tensor) -> list[Tensor]:
        state = torch.zeros(len(x), self.hidden, dtype=x.dtype)
        states = []
        for step in x.unbind(1):
            read = F.linear(step, p("read", self.hidden, x.shape[-1]), p("bias", self.hidden))
            if self.cell == "rnn":
                state = torch.tanh(read + F.linear(state, p("keep", self.hidden, self.hidden)))
            else:
                state = 0.5 * state + F.relu(read)
            states.append(state)
        return states
