"""What an operation is, told by its name and by which of its operands depend on the explained input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._layers.layer import Kind
from lrpfunc._layers.softmax import axes_of
from lrpfunc._ops.call import operation_name
from lrpfunc._ops.table import (
    ACTIVATION,
    AVERAGE,
    LINEAR,
    MULTILINEAR,
    NORMALIZATION,
    QUOTIENT,
    SCALE,
    SELECT,
    SOFTMAX,
    STATISTIC,
    WINNER,
)
from lrpfunc._torch import overload_name

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
    name = operation_name(node)
    places = sum(tree.leaves((node.args, node.kwargs)).count(n) for n in inputs)
    if name in NORMALIZATION:
        return _normalization(node, name, inputs)
    if name in SOFTMAX:
        return Nature(Kind.SOFTMAX, axes=axes_of(node))
    if name in STATISTIC:
        return Nature(Kind.STATISTIC, shares=(1 / STATISTIC[name],)) if len(inputs) == 1 else Nature(Kind.NON_LINEAR)
    if name == "scaled_dot_product_attention":
        return _attention(node, inputs)
    if name in ("index_put", "_unsafe_index_put") and len(node.args) > 3 and node.args[3]:
        return Nature(Kind.LINEAR, linear=True)
    if name == "scatter" and "reduce" in node.kwargs:
        return Nature(Kind.NON_LINEAR)
    if name == "view" and overload_name(node.target) == "dtype":
        return Nature(Kind.NON_LINEAR)
    if name in SELECT:
        return Nature(Kind.SELECT, linear=True)
    if name in ("max", "min", "median") and not isinstance(node.meta["val"], Tensor):
        return Nature(Kind.WINNER, linear=True)
    if name in WINNER:
        return Nature(Kind.WINNER, linear=True) if _against_itself(node, inputs) else Nature(Kind.ACTIVATION)
    if name in SCALE:
        return _scaling(node, inputs, places)
    if name in ("sum", "nansum") or (name in ("add", "sub", "subtract", "rsub") and places > 1):
        return Nature(Kind.SUM, linear=True)
    if name in AVERAGE:
        return Nature(Kind.AVERAGE, linear=True)
    if name in LINEAR and (places == 1 or name in ("scatter_add", "index_add", "lerp")):
        # grid_sample is linear in the image only, lerp in its two ends.
        varying = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a in inputs]
        limits = {"lerp": {0, 1}, "grid_sampler": {0}, "grid_sampler_2d": {0}, "grid_sampler_3d": {0}}
        linear = set(varying) <= limits.get(name, set(varying))
        return Nature(Kind.LINEAR, linear=True) if linear else Nature(Kind.NON_LINEAR)
    if name in ACTIVATION or name in ("pow", "float_power"):
        return Nature(Kind.ACTIVATION if _pointwise(node, inputs, places) else Kind.NON_LINEAR)
    if name in MULTILINEAR:
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
    factors = tree.leaves([a for i, a in enumerate(node.args) if i != addend])
    count = sum(factors.count(n) for n in inputs)
    if count <= 1:
        return Nature(Kind.LINEAR, linear=True)
    added = node.args[addend] if addend is not None and len(node.args) > addend else None
    if added in factors:
        return Nature(Kind.NON_LINEAR)
    return Nature(Kind.PRODUCT, shares=tuple(1.0 if n is added else 1 / count for n in inputs))


def _is_complex(node: fx.Node) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in tree.leaves(node.meta.get("val")))


def _against_itself(node: fx.Node, inputs: tuple[fx.Node, ...]) -> bool:
    """Whether only activations compete: `maximum(x, 0)` is an activation, not a choice among inputs."""
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    return all(a in inputs for a in tensors)


def _scaling(node: fx.Node, inputs: tuple[fx.Node, ...], places: int) -> Nature:
    if operation_name(node) not in QUOTIENT:
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
