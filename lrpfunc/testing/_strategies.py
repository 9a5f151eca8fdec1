"""Hypothesis strategies: small networks, inputs, rules, composites and targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final, get_args

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

import lrpfunc as lrp
from lrpfunc.testing._blocks import (
    ACTIVATIONS,
    ARITHMETIC,
    NORMALIZATIONS,
    REARRANGEMENTS,
    Conv,
    InPlace,
    Linear,
    Normalize,
    Pointwise,
    Pool,
    Rearrange,
)
from lrpfunc.testing._code import Pasteable, among
from lrpfunc.testing._net import Block, Input, Net, Values
from lrpfunc.testing._paths import Branch, Gated, Loop, Residual, Reuse, SelfAttention, Tied

Strategy = st.SearchStrategy[Any]

_sizes = st.integers(1, 3)
_flags = st.booleans()

_PLAIN: dict[str, Strategy] = {
    "dense": st.builds(
        Linear, _sizes, bias=_flags, spelling=st.sampled_from(["linear", "matmul", "addmm", "einsum", "module"])
    ),
    "convolution": st.builds(
        Conv,
        _sizes,
        st.integers(1, 3),
        stride=st.integers(1, 2),
        padding=st.integers(0, 1),
        dilation=st.integers(1, 2),
        groups=st.integers(1, 2),
        bias=_flags,
        transposed=_flags,
        module=_flags,
    ),
    "activation": st.builds(Pointwise, st.sampled_from(ACTIVATIONS)),
    "arithmetic": st.builds(Pointwise, st.sampled_from(ARITHMETIC)),
    "in-place": st.builds(InPlace, st.sampled_from(["relu_", "add_", "mul_", "assign", "rows", "view"])),
    "normalization": st.builds(Normalize, st.sampled_from(NORMALIZATIONS)),
    "pooling": st.builds(
        Pool, st.sampled_from(["avg", "max", "adaptive", "mean", "sum", "amax"]), _sizes, st.integers(1, 2)
    ),
    "rearrangement": st.builds(Rearrange, st.sampled_from(REARRANGEMENTS)),
    "gate": st.builds(Gated, st.sampled_from(["glu", "swiglu", "squeeze", "highway", "written"])),
    "attention": st.builds(
        SelfAttention,
        st.integers(1, 2),
        st.integers(1, 2),
        causal=_flags,
        spelling=st.sampled_from(["written", "fused", "module"]),
    ),
    "recurrence": st.builds(
        Loop, st.sampled_from(["rnn", "leaky", "lstm", "gru"]), st.integers(1, 2), all_states=_flags
    ),
    "shared": st.builds(Tied, _sizes, st.none() | st.builds(Pointwise, st.sampled_from(ACTIVATIONS))),
}

_NESTED: dict[str, Callable[[Strategy], Strategy]] = {
    "residual": lambda inner: st.builds(Residual, inner, inplace=_flags),
    "branch": lambda inner: st.builds(
        Branch, inner, inner, st.sampled_from(["add", "cat", "mul", "sub", "max", "mean"])
    ),
    "reuse": lambda inner: st.builds(Reuse, inner, st.integers(2, 3)),
}

FAMILIES: tuple[str, ...] = (*_PLAIN, *_NESTED)
"""What `models` can be made of."""


def _blocks(families: Sequence[str], max_blocks: int) -> st.SearchStrategy[tuple[Block, ...]]:
    """Sequences of blocks of some families, nested once."""
    plain = st.one_of([_PLAIN[name] for name in families if name in _PLAIN])
    inner = st.lists(plain, min_size=1, max_size=2).map(tuple)
    nested = [_NESTED[name](inner) for name in families if name in _NESTED]
    return st.lists(st.one_of([plain, plain, *nested]), min_size=1, max_size=max_blocks).map(tuple)


_SHAPES = {
    1: st.tuples(st.integers(1, 3), st.integers(1, 4)),
    2: st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(2, 4)),
    3: st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(3, 5), st.integers(2, 4)),
}
_VALUES: st.SearchStrategy[Values] = st.sampled_from(get_args(Values))


def _values(values: Values | st.SearchStrategy[Values]) -> st.SearchStrategy[Values]:
    return st.just(among([values], get_args(Values), "values")[0]) if isinstance(values, str) else values  # pyright: ignore[reportReturnType]


def models(
    families: Sequence[str] = FAMILIES,
    *,
    max_blocks: int = 3,
    dimensions: Sequence[int] = (1, 2, 3),
    values: Values | st.SearchStrategy[Values] = _VALUES,
    including: Sequence[str] = (),
) -> st.SearchStrategy[Net]:
    """Small networks, in float64, with everything that is needed to call them.

    They shrink to few blocks, small sizes and plain spellings; what is drawn is a `Net`, which prints as code.

    Args:
        families: What they are made of, of `FAMILIES`: one of the plain families at least.
        max_blocks: How many blocks there are, those inside others and a last dense layer not counted.
        dimensions: Of a sample: 1 for features, 2 for sequences and signals, 3 for images.
        values: Of the input, as for `Input`: a strategy, or one of the names.
        including: Plain families, of one of which there is a block for certain.

    Returns:
        A strategy. The output of a net has the shape `(batch, outputs)`.

    Raises:
        ValueError: If there are no such families, dimensions or values, or no blocks.
        TypeError: If something is given that should be a list.

    Example:
        >>> from hypothesis import find, settings
        >>> from lrpfunc.testing import models
        >>> find(models(["dense", "activation"]), lambda net: net.outputs() > 1, settings=settings(database=None))
        Net(blocks=(Linear(out=2, bias=False),), shape=(1, 1))
    """
    if not set(_PLAIN) & set(among(families, FAMILIES, "families")):
        raise ValueError(f"families={list(families)} has no plain one: add one of {', '.join(map(repr, _PLAIN))}")
    if isinstance(dimensions, int) or not dimensions or not {*dimensions} <= {*_SHAPES}:
        raise ValueError(f"dimensions={dimensions!r} should be a list of some of 1, 2 and 3, for example [1, 2]")
    if max_blocks < 1:
        raise ValueError(f"max_blocks={max_blocks} leaves a net without blocks: give 1 or more")
    head = st.none() | st.builds(Linear, st.integers(1, 3))
    body = _blocks(families, max_blocks)
    if including:
        certain = st.one_of([_PLAIN[name] for name in among(including, _PLAIN, "including")]).map(
            lambda block: (block,)
        )
        rest = st.just(()) | _blocks(families, max_blocks - 1) if max_blocks > 1 else st.just(())
        body = st.tuples(certain, rest, st.booleans()).map(lambda d: d[1] + d[0] if d[2] else d[0] + d[1])
    layers = st.tuples(body, head).map(lambda drawn: drawn[0] if drawn[1] is None else (*drawn[0], drawn[1]))
    shapes = st.one_of([_SHAPES[n] for n in dimensions])
    return st.builds(_net, layers, shapes, st.integers(0, 1000), _values(values))


def _net(*fields: Any) -> Net:
    try:
        net = Net(*fields)
        model_fn, params, x = net.case()
        torch.func.grad(lambda x: model_fn(params, x).sum())(x)
    except (ValueError, RuntimeError):
        reject()  # torch refuses some of the smallest shapes, and to differentiate what is overwritten too soon
    return net


def inputs(shape: tuple[int, ...], values: Values | st.SearchStrategy[Values] = _VALUES) -> st.SearchStrategy[Input]:
    """Inputs of a shape, by their seeds; call one for the tensor.

    Args:
        shape: The batch first.
        values: As for `Input`: a strategy, or one of the names.

    Raises:
        ValueError: If the shape has no batch.
        TypeError: If it is no tuple.

    Example:
        >>> from hypothesis import find, settings
        >>> from lrpfunc.testing import inputs
        >>> find(inputs((1, 2)), lambda drawn: True, settings=settings(database=None))
        Input(shape=(1, 2))
    """
    return st.builds(Input, st.just(Input(shape).shape), _values(values), st.integers(0, 1000))


# --------------------------------------------------------------------------------------------------------------
# Rules and composites


_small = st.sampled_from([0.1, 0.01, 0.5])
_stabilizers = st.one_of(
    _small,
    st.builds(lrp.Stabilizer, _small, clip=st.just(True)),
    st.builds(lrp.Stabilizer, _small, norm_scale=st.just(True)),
)
_zeroed = st.none() | st.just("bias")
_ONE_SIDED = [(2.0, 1.0), (1.0, 0.0), (1.5, 0.5)]

RULES: dict[str, Strategy] = {
    "linear": st.one_of(
        st.builds(lrp.Epsilon, _stabilizers, _zeroed),
        st.builds(lrp.ZPlus, _stabilizers, _zeroed),
        st.builds(lrp.Gamma, st.sampled_from([0.25, 0.0, 1.0]), _stabilizers, _zeroed),
        st.sampled_from(_ONE_SIDED).flatmap(lambda ab: st.builds(lrp.AlphaBeta, *map(st.just, ab), _stabilizers)),
        st.builds(lrp.ZBox, st.just(-4.0), st.just(4.0), _small),
        st.builds(lrp.WSquare, _stabilizers, _zeroed),
        st.builds(lrp.Flat, _stabilizers),
        st.sampled_from([lrp.Gradient(), lrp.Gradient("relevance"), lrp.Stop(), lrp.Uniform()]),
        st.just(2 * lrp.Epsilon(0.1) - lrp.ZPlus(0.1)),
    ),
    "sum": st.one_of(st.builds(lrp.Norm, _stabilizers), st.just(lrp.Stop())),
    "activation": st.one_of(
        st.sampled_from([lrp.Pass(), lrp.Gradient(), lrp.ReLUDeconvNet(), lrp.ReLUGuidedBackprop()]),
        st.builds(lrp.ReLUBetaSmooth, st.sampled_from([1.0, 5.0])),
    ),
    "softmax": st.sampled_from([lrp.TaylorSoftmax(), lrp.TaylorSoftmax("omit", 0.1), lrp.TaylorSoftmax("distribute")]),
    "product": st.sampled_from([lrp.Uniform(), lrp.Gradient(), lrp.Stop()]),
    "gate": st.sampled_from([lrp.SignalTakesAll(), 0.5 * lrp.SignalTakesAll() + 0.5 * lrp.Uniform()]),
    "normalization": st.sampled_from([lrp.SignalTakesAll(), lrp.Gradient()]),
}
_SERVED: dict[str, Any] = {
    "linear": lrp.Dense | lrp.Convolution,
    "sum": lrp.Sum | lrp.AvgPool,
    "activation": lrp.Activation,
    "softmax": lrp.Softmax,
    "product": lrp.Product,
    "gate": lrp.Gate,
    "normalization": lrp.Normalization,
}


def rules(families: Sequence[str] = tuple(RULES)) -> st.SearchStrategy[lrp.Rule]:
    """Rules of some families with hyperparameters under which derivatives are tame.

    Args:
        families: Of layers that they serve: `"linear"`, `"sum"`, `"activation"`, `"softmax"`, `"product"`, `"gate"`,
            `"normalization"`.

    Raises:
        ValueError: If there are no such families, or none.
        TypeError: If a string is given instead of a list.

    Example:
        >>> from hypothesis import find, settings
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import rules
        >>> find(rules(["product"]), lambda rule: rule != lrp.Uniform(), settings=settings(database=None))
        Gradient(of='multiplier')
    """
    if not (names := among(families, RULES, "families")):
        raise ValueError(f"families=[] leaves no rules: give some of {', '.join(map(repr, RULES))}")
    return st.one_of([RULES[name] for name in names])


_RECIPES: list[lrp.Composite] = [
    lrp.epsilon(0.1, stabilizer=0.1),
    lrp.epsilon_plus(0.1, stabilizer=0.1),
    lrp.epsilon_plus_flat(0.1, stabilizer=0.1),
    lrp.epsilon_gamma_box(-4.0, 4.0, 0.1, stabilizer=0.1),
    lrp.epsilon_alpha2_beta1(0.1, stabilizer=0.1),
    lrp.epsilon_alpha2_beta1_flat(0.1, stabilizer=0.1),
    lrp.excitation_backprop(stabilizer=0.1),
]
_ATTENTION = [lrp.attn_lrp(), lrp.cp_lrp(), lrp.mamba_lrp() + lrp.attn_lrp()]
_COTANGENT = [lrp.gradient(), lrp.deconvnet(), lrp.guided_backprop(), lrp.beta_smooth(3.0)]


def _composed(recipe: lrp.Composite, rest: lrp.Composite, entries: Sequence[Any]) -> lrp.Composite:
    # An entry for softmax does not reach into fused attention, and is refused there.
    fused = [(lrp.Attention, lrp.Uniform())] if any(family == "softmax" for family, _ in entries) else []
    return lrp.Composite([*fused, *((_SERVED[family], rule) for family, rule in entries)]) + recipe + rest


def composites(*, cotangent: bool = True) -> st.SearchStrategy[lrp.Composite]:
    """Composites that cover every model: a recipe before one for attention, with rules of their own in front.

    Args:
        cotangent: Draw cotangent composites too, such as `guided_backprop`.

    Example:
        >>> from hypothesis import find, settings
        >>> from lrpfunc.testing import composites
        >>> find(composites(), lambda rules: rules.cotangent, settings=settings(database=None))
        Composite(entries=(), cotangent=True)
    """
    entries = st.sampled_from(list(RULES)).flatmap(lambda name: st.tuples(st.just(name), RULES[name]))
    composed = st.builds(
        _composed, st.sampled_from(_RECIPES), st.sampled_from(_ATTENTION), st.lists(entries, max_size=2)
    )
    return composed | st.sampled_from(_COTANGENT) if cotangent else composed


# --------------------------------------------------------------------------------------------------------------
# Targets


@final
@dataclass(frozen=True, repr=False)
class Start(Pasteable):
    """Starting relevance of either sign: a target.

    Args:
        seed: Of the numbers.

    Returns:
        Called with an output, relevance like it.

    Example:
        >>> import torch
        >>> from lrpfunc.testing import Start
        >>> Start(3)(torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """

    seed: int = 0

    def __call__(self, output: Tensor) -> Tensor:
        # No generator of random numbers, which `vmap` would ask about.
        return torch.cos(1.7 * torch.arange(output.numel(), dtype=output.dtype) + self.seed).reshape(output.shape)


def targets(outputs: int) -> st.SearchStrategy[Any]:
    """Where relevance may start in an output of shape `(batch, outputs)`.

    Args:
        outputs: How many outputs a sample has.

    Returns:
        A strategy of integers, `None`, `lrpfunc.contrast`, `lrpfunc.one_hot`, integer tensors and `Start`.

    Raises:
        ValueError: If there are no outputs.

    Example:
        >>> from hypothesis import find, settings
        >>> from lrpfunc.testing import targets
        >>> find(targets(3), lambda target: isinstance(target, int), settings=settings(database=None))
        0
    """
    if outputs < 1:
        raise ValueError(f"targets({outputs}) is for an output without places where relevance could start")
    index = st.integers(0, outputs - 1)
    return st.one_of(
        index,
        st.none(),
        st.integers(-outputs, -1),
        st.builds(Start, st.integers(0, 9)),
        st.builds(lrp.contrast, index, index),
        st.builds(lrp.one_hot, index, st.sampled_from([None, 1.0])),
        index.map(torch.tensor),
    )
