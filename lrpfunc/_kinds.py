"""What an operation is, told by its name and by which of its operands depend on the explained input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from lrpfunc import _operations as ops
from lrpfunc._layer import Kind
from lrpfunc._patterns.softmax import axes_of
from lrpfunc._simplify import Program, is_float

_QUOTIENT = ("div", "divide", "true_divide")
_ADDEND = {"linear": 2, "_grouped_mm": 3, "addmm": 0, "baddbmm": 0, "addmv": 0, "addcmul": 0, "bilinear": 3}
"""Where a product has an operand that is only added; convolutions have it at 2."""


@dataclass(frozen=True)
class Nature:
    """What an operation is: its kind, whether it is affine in its inputs, and what `Layer` says of some kinds."""

    kind: Kind
    linear: bool = False
    shares: tuple[float, ...] = ()
    axes: tuple[int, ...] = ()


def nature_of(node: fx.Node, inputs: tuple[fx.Node, ...]) -> Nature:
    """What a single operation is that is neither a dense layer nor a convolution."""
    if any(_is_complex(n) for n in (node, *inputs)):
        return Nature(Kind.NON_LINEAR)  # relevance of a complex number is not defined
    name = ops.operation_name(node)
    places = sum(pytree.tree_leaves((node.args, node.kwargs)).count(n) for n in inputs)
    if name in ops.NORMALIZATION:
        return _normalization(node, name, inputs)
    if name in ops.SOFTMAX:
        return Nature(Kind.SOFTMAX, axes=axes_of(node))
    if name in ops.STATISTIC:
        return (
            Nature(Kind.STATISTIC, shares=(1 / ops.STATISTIC[name],)) if len(inputs) == 1 else Nature(Kind.NON_LINEAR)
        )
    if name == "scaled_dot_product_attention":
        return _attention(node, inputs)
    if name in ("index_put", "_unsafe_index_put") and len(node.args) > 3 and node.args[3]:
        return Nature(Kind.LINEAR, linear=True)
    if name == "scatter" and "reduce" in node.kwargs:
        return Nature(Kind.NON_LINEAR)
    if name == "view" and getattr(node.target, "_overloadname", "") == "dtype":
        return Nature(Kind.NON_LINEAR)
    if name in ops.SELECT:
        return Nature(Kind.SELECT, linear=True)
    if name in ("max", "min", "median") and not isinstance(node.meta["val"], Tensor):
        return Nature(Kind.WINNER, linear=True)
    if name in ops.WINNER:
        return Nature(Kind.WINNER, linear=True) if _against_itself(node, inputs) else Nature(Kind.ACTIVATION)
    if name in ops.SCALE:
        return _scaling(node, inputs, places)
    if name in ("sum", "nansum") or (name in ("add", "sub", "subtract", "rsub") and places > 1):
        return Nature(Kind.SUM, linear=True)
    if name in ops.AVERAGE:
        return Nature(Kind.AVERAGE, linear=True)
    if name in ops.LINEAR and (places == 1 or name in ("scatter_add", "index_add", "lerp")):
        # grid_sample is linear in the image only, lerp in its two ends.
        varying = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a in inputs]
        limits = {"lerp": {0, 1}, "grid_sampler": {0}, "grid_sampler_2d": {0}, "grid_sampler_3d": {0}}
        linear = set(varying) <= limits.get(name, set(varying))
        return Nature(Kind.LINEAR, linear=True) if linear else Nature(Kind.NON_LINEAR)
    if name in ops.ACTIVATION or name in ("pow", "float_power"):
        return Nature(Kind.ACTIVATION if _pointwise(node, inputs, places) else Kind.NON_LINEAR)
    if name in ops.MULTILINEAR:
        return _multilinear(node, name, inputs)
    return Nature(Kind.NON_LINEAR)


def _normalization(node: fx.Node, name: str, inputs: tuple[fx.Node, ...]) -> Nature:
    """Normalizations by statistics of their first operand, or by running statistics, which are affine."""
    if inputs != node.args[:1]:
        return Nature(Kind.NON_LINEAR)
    if name == "batch_norm_eval" or (name == "instance_norm" and not node.args[5]):
        return Nature(Kind.BATCH_NORM, linear=True)
    return Nature(Kind.BATCH_NORM if name == "batch_norm_train" else Kind.NORMALIZATION)


def _attention(node: fx.Node, inputs: tuple[fx.Node, ...]) -> Nature:
    """Values and weights share; the weights' share is that of the mask, and query and key share it as well."""
    query, key, value, mask, *_ = (*node.args, None)
    factors = [n for n in (query, key) if n in inputs]
    weights = 0.5 if value in inputs else 1.0
    share: dict[Any, float] = dict.fromkeys(factors, weights / max(len(factors), 1))
    share[mask] = weights
    share[value] = 0.5 if factors or mask in inputs else 1.0
    return Nature(Kind.ATTENTION, shares=tuple(share[n] for n in inputs))


def _pointwise(node: fx.Node, inputs: tuple[fx.Node, ...], places: int) -> bool:
    return places == 1 and inputs[0].meta["val"].shape == node.meta["val"].shape


def _multilinear(node: fx.Node, name: str, inputs: tuple[fx.Node, ...]) -> Nature:
    addend = _ADDEND.get(name, 2 if "conv" in name else None)
    factors = pytree.tree_leaves([a for i, a in enumerate(node.args) if i != addend])
    count = sum(factors.count(n) for n in inputs)
    if count <= 1:
        return Nature(Kind.LINEAR, linear=True)
    added = node.args[addend] if addend is not None and len(node.args) > addend else None
    if added in factors:
        return Nature(Kind.NON_LINEAR)
    return Nature(Kind.PRODUCT, shares=tuple(1.0 if n is added else 1 / count for n in inputs))


def _is_complex(node: fx.Node) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in pytree.tree_leaves(node.meta.get("val")))


def _against_itself(node: fx.Node, inputs: tuple[fx.Node, ...]) -> bool:
    """Whether only activations compete: `maximum(x, 0)` is an activation, not a choice among inputs."""
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    return all(a in inputs for a in tensors)


def _scaling(node: fx.Node, inputs: tuple[fx.Node, ...], places: int) -> Nature:
    if ops.operation_name(node) not in _QUOTIENT:
        if places == 1:
            return Nature(Kind.SCALE, linear=True)
        return Nature(Kind.PRODUCT, shares=tuple(1 / places for _ in inputs))
    if "rounding_mode" in node.kwargs:
        return Nature(Kind.NON_LINEAR)
    numerator, divisor = node.args[:2]
    if places == 1 and numerator in inputs:
        return Nature(Kind.SCALE, linear=True)
    if places == 1 and _pointwise(node, inputs, places):
        return Nature(Kind.ACTIVATION)
    # The two factors are the numerator and the reciprocal of the divisor, whose VJP has the opposite sign.
    share = 1 / len(inputs)
    return Nature(Kind.QUOTIENT, shares=tuple(-share if n is divisor else share for n in inputs))


def keeps_zero(nodes: tuple[fx.Node, ...], root: fx.Node) -> bool:
    """Whether a pointwise function of `root` is 0 where that is, and has a derivative there."""
    zero = {root}
    for node in nodes:
        if _zero_at_zero(node, zero):
            zero.add(node)
    return nodes[-1] in zero


def _zero_at_zero(node: fx.Node, zero: set[fx.Node]) -> bool:
    name = ops.operation_name(node)
    first, *others = (*node.args, None)
    if name in ("mul", "multiply"):
        return first in zero or others[0] in zero
    if name in ("add", "sub", "subtract", "rsub", "maximum", "minimum"):
        return all(a in zero or (isinstance(a, (int, float)) and a == 0) for a in (first, others[0]))
    if name == "where":
        return all(a in zero or (isinstance(a, (int, float)) and a == 0) for a in others[:2])
    if first not in zero:
        return False
    if name in ("clamp", "clamp_min", "clamp_max", "clip", "hardtanh"):
        return _bounds_hold_zero(node, name)
    if name in ("pow", "float_power"):
        return isinstance(others[0], (int, float)) and others[0] >= 1
    if name == "masked_fill":
        return others[1] == 0
    quotient = name in _QUOTIENT and others[0] not in zero
    return quotient or name in ops.ZERO_AT_ZERO or name in ops.SELECT or name in ("neg", "negative")


def _bounds_hold_zero(node: fx.Node, name: str) -> bool:
    """Whether a clamp leaves 0 as it is. At a bound of 0 it is a ReLU, whose slope there torch chooses."""
    low, high = {"hardtanh": (-1, 1)}.get(name, (None, None))
    given: list[Any] = list(node.args[1:])
    if name == "clamp_max":
        given.insert(0, None)
    given += [low, high][len(given) :]
    bounds = [node.kwargs.get(key, value) for key, value in zip(("min", "max"), given, strict=False)]
    numbers: list[Any] = [0 if bound is None else bound for bound in bounds]
    return all(isinstance(n, (int, float)) for n in numbers) and numbers[0] <= 0 <= numbers[1]


def finite(program: Program) -> set[fx.Node]:
    """The nodes that no mask can have made infinite."""
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        name = ops.operation_name(node)
        if name in ops.FINITE or (name in ops.KEEPS_FINITE and all(n in known for n in node.all_input_nodes)):
            known.add(node)
    return known


def nonnegative(program: Program) -> set[fx.Node]:
    """The nodes whose values are known not to be negative, whatever the input."""
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and is_float(node) and _never_negative(node, known):
            known.add(node)
    return known


def _never_negative(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether no argument whatever can make the result negative; what is not listed may."""
    name = ops.operation_name(node)
    first, *others = (*node.args, None)
    if name in ops.POSITIVE:
        return True
    if name == "softplus":
        return len(node.args) == 1 and not node.kwargs
    if name in ("clamp", "clamp_min", "clip", "hardtanh"):
        low = node.kwargs.get("min", others[0])
        high = node.kwargs.get("max", others[1] if len(others) > 2 else None)
        return _not_below_zero(low, known) and (high is None or _not_below_zero(high, known))
    if name == "pow":
        return isinstance(others[0], int) and others[0] % 2 == 0
    if name in ("cat", "concat", "concatenate", "stack"):
        return all(part in known for part in first)  # type: ignore[union-attr]
    if name in ("add", "mul", "div"):
        operands = (first, others[0], node.kwargs.get("alpha", 1))
        return "rounding_mode" not in node.kwargs and all(_not_below_zero(a, known) for a in operands)
    if name in ("pad", "constant_pad_nd"):
        numbers: list[Any] = [a for a in others[1:] if isinstance(a, (int, float))] + [node.kwargs.get("value") or 0]
        return first in known and all(a >= 0 for a in numbers)
    if name in ("avg_pool1d", "avg_pool2d", "avg_pool3d") and len(node.args) > 6:
        return False  # a divisor of the user's own
    return name in ops.KEEPS_SIGN and first in known


def _not_below_zero(value: Any, known: set[fx.Node]) -> bool:
    return value >= 0 if isinstance(value, (int, float)) else value in known
