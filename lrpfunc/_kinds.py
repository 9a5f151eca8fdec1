"""What an operation is, told by its name and by which of its operands depend on the explained input."""

from __future__ import annotations

from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from lrpfunc import _operations as ops
from lrpfunc._layer import Kind
from lrpfunc._simplify import Affine, Program


def is_float(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves)


def kind_of(node: fx.Node, found: Affine | None, inputs: tuple[fx.Node, ...]) -> tuple[Kind, bool]:
    """The kind of a layer, and whether it is linear."""
    if found is not None:
        return (Kind.CONVOLUTION if found.convolution else Kind.DENSE), True
    if any(_is_complex(n) for n in (node, *inputs)):
        return Kind.NON_LINEAR, False  # relevance of a complex number is not defined
    name = ops.operation_name(node)
    places = sum(pytree.tree_leaves((node.args, node.kwargs)).count(n) for n in inputs)
    if name == "batch_norm_eval":
        return Kind.BATCH_NORM, node.args[0] in inputs and len(inputs) == 1
    if name == "batch_norm_train":
        return Kind.BATCH_NORM, False
    if name in ("index_put", "_unsafe_index_put") and len(node.args) > 3 and node.args[3]:
        return Kind.LINEAR, True
    if name == "scatter" and "reduce" in node.kwargs:
        return Kind.NON_LINEAR, False
    if name == "view" and getattr(node.target, "_overloadname", "") == "dtype":
        return Kind.NON_LINEAR, False
    if name in ops.SELECT:
        return Kind.SELECT, True
    if name in ("max", "min", "median") and not isinstance(node.meta["val"], Tensor):
        return Kind.WINNER, True
    if name in ops.WINNER:
        return (Kind.WINNER, True) if _against_itself(node, inputs) else (Kind.ACTIVATION, False)
    if name in ops.SCALE:
        return _scaling(node, inputs, places)
    if name in ("sum", "nansum") or (name in ("add", "sub", "subtract", "rsub") and places > 1):
        return Kind.SUM, True
    if name in ops.AVERAGE:
        return Kind.AVERAGE, True
    if name in ops.LINEAR and (places == 1 or name in ("scatter_add", "index_add", "lerp")):
        # grid_sample is linear in the image only, lerp in its two ends.
        varying = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a in inputs]
        limits = {"lerp": {0, 1}, "grid_sampler": {0}, "grid_sampler_2d": {0}, "grid_sampler_3d": {0}}
        return (Kind.LINEAR, True) if set(varying) <= limits.get(name, set(varying)) else (Kind.NON_LINEAR, False)
    if name in ops.ACTIVATION and inputs == node.args[:1]:
        return Kind.ACTIVATION, False
    if name in ops.NORMALIZATION:
        return Kind.NORMALIZATION, False
    if name in ops.MULTILINEAR:
        return (Kind.LINEAR, True) if places == 1 or not _multiplied(node, inputs) else (Kind.PRODUCT, False)
    return Kind.NON_LINEAR, False


def _multiplied(node: fx.Node, inputs: tuple[fx.Node, ...]) -> bool:
    """Whether two operands that depend on the explained input are multiplied, rather than one added to the other."""
    name = ops.operation_name(node)
    added = {"linear": 2, "addmm": 0, "baddbmm": 0, "addmv": 0, "addcmul": 0}.get(name, 2 if "conv" in name else None)
    factors = pytree.tree_leaves([a for i, a in enumerate(node.args) if i != added])
    return sum(factors.count(n) for n in inputs) > 1


def _is_complex(node: fx.Node) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in pytree.tree_leaves(node.meta.get("val")))


def _against_itself(node: fx.Node, inputs: tuple[fx.Node, ...]) -> bool:
    """Whether only activations compete: `maximum(x, 0)` is an activation, not a choice among inputs."""
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    return all(a in inputs for a in tensors)


def _scaling(node: fx.Node, inputs: tuple[fx.Node, ...], places: int) -> tuple[Kind, bool]:
    if ops.operation_name(node) in ("div", "divide", "true_divide"):
        if places == 1 and node.args[0] in inputs and "rounding_mode" not in node.kwargs:
            return Kind.SCALE, True
        return Kind.NON_LINEAR, False
    return (Kind.SCALE, True) if places == 1 else (Kind.PRODUCT, False)


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
