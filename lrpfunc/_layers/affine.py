"""Affine layers, and the operations around them that are one layer with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lrpfunc._ops.call import call, of
from lrpfunc._ops.functions import batch_norm_eval, batch_norm_scale
from lrpfunc._ops.operator import Kind
from lrpfunc._torch import aten, map_arg


@dataclass(frozen=True, eq=False)
class Affine:
    """A layer as a function `f(x; weight, bias)`, linear in `x` and in the parameters.

    Attributes:
        node: The dense operation or convolution.
        input, weight, bias: The positions of its operands; for `einsum` positions in its list of operands.
        convolution: Which of the two it is.
        views: Changes of shape between the operation and the addition.
        addition: A node that adds a constant to the result, the layer's bias then.
        norm: What scales and shifts each output feature by constants, and is merged with it: a batch norm in
            evaluation mode, or one that is written out, as `torchvision.ops.FrozenBatchNorm2d` is.
    """

    node: fx.Node
    input: int
    weight: int
    bias: int | None
    convolution: bool
    views: tuple[fx.Node, ...] = ()
    addition: fx.Node | None = None
    norm: tuple[fx.Node, ...] = ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return tuple(n for n in (self.node, *self.views, self.addition, *self.norm) if n is not None)

    @property
    def input_node(self) -> fx.Node:
        return self._operands()[self.input]

    @property
    def weight_node(self) -> fx.Node:
        return self._operands()[self.weight]

    @property
    def bias_node(self) -> fx.Node | None:
        if self.addition is not None:
            return _other(self.addition, (self.node, *self.views)[-1])
        if self.node.kwargs.get("beta", 1) == 0:
            return None  # torch does not even read it: there may be anything in it
        operands = self._operands()
        return operands[self.bias] if self.bias is not None and len(operands) > self.bias else None

    def _operands(self) -> Any:
        return self.node.args[1] if of(self.node).name == "einsum" else self.node.args

    # -- with values

    def parameters(self, values: Mapping[fx.Node, Any]) -> tuple[Tensor, Tensor | None]:
        """The effective weight and bias: differentiable functions of the model's own."""
        alpha, beta = self._factors()
        weight = _times(alpha, values[self.weight_node])
        bias = None if self.bias_node is None else _times(beta, values[self.bias_node])
        if not self.norm:
            return weight, bias
        scale, shift = self._scale_and_shift(values)
        if bias is not None:
            shift = shift + bias.reshape(-1) * scale
        # A batch norm may be more precise than its convolution, which takes one dtype.
        return _scale_outputs(self, weight, scale).to(weight.dtype), shift.to(weight.dtype)

    def _factors(self) -> tuple[Any, Any]:
        """What the layer multiplies its weight and its bias by."""
        alpha, beta = self.node.kwargs.get("alpha", 1), self.node.kwargs.get("beta", 1)
        if self.addition is None:
            return alpha, beta
        factor: Any = self.addition.kwargs.get("alpha", 1)  # of its second operand, whichever that is
        if self.addition.args[0] is self.bias_node:
            return alpha * factor, 1
        return alpha, -factor if of(self.addition).name == "sub" else factor

    def _scale_and_shift(self, values: Mapping[fx.Node, Any]) -> tuple[Tensor, Tensor]:
        """What each output feature is multiplied by, and what is added to it then."""
        first, *_ = self.norm
        if first.target is batch_norm_eval:
            args: Any = [values[a] if isinstance(a, fx.Node) else a for a in first.args[1:]]
            return batch_norm_scale(*args)
        previous = self.node if self.addition is None else self.addition
        scale: Any = 1
        shift: Any = 0
        for node in self.norm:
            constant = values[_other(node, previous)].reshape(-1)
            previous = node
            match of(node).name:
                case "mul":
                    scale, shift = scale * constant, shift * constant
                case "div":
                    scale, shift = scale / constant, shift / constant
                case "add":
                    shift = shift + constant
                case "sub":
                    shift = shift - constant
        return scale, shift

    def __call__(self, values: Mapping[fx.Node, Any], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`f(x; weight, bias)` for an effective weight and bias, with everything else as the model has it."""
        operands = list(self._operands())
        operands[self.input], operands[self.weight] = x, weight
        if self.bias == 0:  # it adds a product to its first operand
            return self._add(torch.matmul(operands[1], operands[2]), bias)
        native = self._takes(bias)
        if self.bias is not None:
            operands += [None] * (self.bias + 1 - len(operands))
            operands[self.bias] = bias if native else None
        args, kwargs = map_arg((tuple(operands), self.node.kwargs), values.__getitem__)
        z = call(self.node, (self.node.args[0], list(args)) if of(self.node).name == "einsum" else args, kwargs)
        return z if native else self._add(z, bias)

    def _takes(self, bias: Tensor | None) -> bool:
        """Whether the operation itself can add the bias: one number a feature, on the axis it expects."""
        if bias is None or self.bias is None or bias.ndim != 1:
            return False
        if self.views:
            return False
        return not self.convolution or self.addition is None or bool(self.norm)

    def _add(self, z: Tensor, bias: Tensor | None) -> Tensor:
        for view in self.views:
            z = view.target(z, *view.args[1:], **view.kwargs)  # type: ignore[operator]
        return z if bias is None else z + bias


def _other(node: fx.Node, operand: fx.Node) -> fx.Node:
    """The other one of two operands."""
    first, second = node.args[:2]
    return second if first is operand else first  # type: ignore[return-value]


def _times(factor: Any, tensor: Tensor) -> Tensor:
    return tensor if factor == 1 else factor * tensor


def _scale_outputs(affine: Affine, weight: Tensor, scale: Tensor) -> Tensor:
    name = of(affine.node).name
    if not affine.convolution:
        return weight * (scale.unsqueeze(-1) if of(affine.node).features == 0 else scale)
    transposed = name.startswith("conv_transpose") or (name == "convolution" and affine.node.args[6])
    if not transposed:
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    groups = _groups(affine.node)
    spatial = [1] * (weight.ndim - 2)
    grouped = weight.reshape(groups, -1, *weight.shape[1:]) * scale.reshape(groups, 1, -1, *spatial)
    return grouped.reshape(weight.shape)


def _groups(node: fx.Node) -> int:
    """The `groups` of a transposed convolution."""
    position = 8 if of(node).name == "convolution" else 6
    return int(node.args[position]) if len(node.args) > position else 1  # type: ignore[arg-type]


def find_affine(node: fx.Node, active: set[fx.Node]) -> Affine | None:
    """`node` as an affine layer, if exactly one of its operands depends on the explained input and it is not a bias."""
    operator = of(node)
    if operator.kind not in (Kind.DENSE, Kind.CONVOLUTION):
        return None
    operands: Any = node.args
    factors = operator.operands
    if operator.name == "einsum":
        operands = node.args[1]
        factors = tuple(range(len(operands)))
    varying = [i for i, operand in enumerate(operands) if isinstance(operand, fx.Node) and operand in active]
    if len(factors) != 2 or len(varying) != 1 or varying[0] not in factors:
        return None
    (weight,) = (place for place in factors if place != varying[0])
    return Affine(node, varying[0], weight, operator.addend, operator.kind is Kind.CONVOLUTION)


def merge(found: Affine, active: set[fx.Node], kept: set[fx.Node]) -> Affine:
    """`found` with the addition of a constant and the batch norm that follow it and nothing else does."""
    follower = _only_user(found.node, kept)
    if found.bias_node is None:
        views: list[fx.Node] = []
        last, addition = found.node, follower
        while addition is not None and of(addition).reshapes:
            views.append(addition)
            last, addition = addition, _only_user(addition, kept)
        if addition is not None and _adds_constant(last, addition, active):
            found = replace(found, views=tuple(views), addition=addition)
            follower = _only_user(addition, kept)
    if follower is None or not _has_features(found):
        return found
    norm = (follower,) if _normalizes(found, follower) else _written_norm(found, follower, active, kept)
    return replace(found, norm=norm)


def _only_user(node: fx.Node, kept: set[fx.Node]) -> fx.Node | None:
    """The one operation that uses `node`. A batch norm's update of its statistics would be another."""
    users = list(node.users)
    return users[0] if len(users) == 1 and node not in kept and users[0].op == "call_function" else None


def _adds_constant(node: fx.Node, follower: fx.Node, active: set[fx.Node]) -> bool:
    if follower.target not in (aten.add.Tensor, aten.sub.Tensor):
        return False
    if follower.target is aten.sub.Tensor and follower.args[0] is not node:
        return False
    others = [a for a in follower.args[:2] if a is not node]
    value = node.meta["val"]
    return (
        len(others) == 1
        and isinstance(others[0], fx.Node)
        and others[0] not in active
        and follower.meta["val"].shape == value.shape
        and follower.meta["val"].dtype == value.dtype
    )


def _has_features(found: Affine) -> bool:
    """Whether what follows may act on one axis of output features, the bias so far among them."""
    value = found.nodes[-1].meta["val"]
    if found.views or (found.input, found.weight) not in ((0, 1), (1, 2)):
        return False
    if not found.convolution and (value.ndim == 0 or of(found.node).features is None):
        return False
    if found.convolution and value.ndim != found.weight_node.meta["val"].ndim:
        return False  # an unbatched convolution: its first dimension is the channels
    bias = found.bias_node
    return bias is None or (found.convolution and found.addition is None) or _is_per_feature(bias, found)


def _is_per_feature(constant: fx.Node, found: Affine) -> bool:
    """Whether a constant has one number for each output feature."""
    value, shape = found.nodes[-1].meta["val"], tuple(constant.meta["val"].shape)
    features = [1] * value.ndim
    axis = 1 if found.convolution else -1
    features[axis] = value.shape[axis]
    return (1,) * (value.ndim - len(shape)) + shape == tuple(features)


def _normalizes(found: Affine, follower: fx.Node) -> bool:
    """Whether `follower` is a batch norm in evaluation mode over the output features."""
    previous = found.nodes[-1]
    if follower.target is not batch_norm_eval or follower.args[0] is not previous:
        return False
    if any(previous is a for a in follower.args[1:]):
        return False
    return found.convolution or previous.meta["val"].ndim == 2


def _written_norm(
    found: Affine, follower: fx.Node | None, active: set[fx.Node], kept: set[fx.Node]
) -> tuple[fx.Node, ...]:
    """The operations by which constants scale and shift each output feature, if they do both.

    A scale alone is a layer of its own, as in LayerScale.
    """
    last, value, chain = found.nodes[-1], found.nodes[-1].meta["val"], list[fx.Node]()
    while follower is not None and follower.target in _BY_CONSTANT and not follower.kwargs:
        other, result = _other(follower, last), follower.meta["val"]
        commutes = of(follower).name in ("mul", "add")
        if not isinstance(other, fx.Node) or other in active or not (commutes or follower.args[0] is last):
            break
        if not _is_per_feature(other, found) or (result.shape, result.dtype) != (value.shape, value.dtype):
            break
        chain.append(follower)
        last, follower = follower, _only_user(follower, kept)
    names = {of(node).name for node in chain}
    return tuple(chain) if names & {"mul", "div"} and names & {"add", "sub"} else ()


_BY_CONSTANT = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)
