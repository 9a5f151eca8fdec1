"""The z-box rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Kind, Layer
from lrpfunc.rules._message import Message, Relevance, Stabilizer
from lrpfunc.rules._rule import Quotient, Rule, ZeroParams, kept, named, needs_parameters, negative, of_bias, positive


@final
@dataclass(frozen=True, eq=False)
class ZBox(Rule):
    r"""Distributes relevance over inputs that live in a box, such as pixels.

    .. math::
        z &= f(x; W, b) - f(l; W^+, b^+) - f(h; W^-, b^-), \qquad s = R / \operatorname{stab}(z) \\
        R_i &= x_i J_W^T(s)_i - l_i J_{W^+}^T(s)_i - h_i J_{W^-}^T(s)_i

    For the first layer, when the input has known bounds `l <= x <= h`.

    Args:
        low: The lower bound: a number, or a tensor that broadcasts to the layer's input, for example of shape
            `(3, 1, 1)` for one bound a channel of an image.
        high: The upper bound, likewise.
        stabilizer: A number, a tensor, or a `Stabilizer`.
        zero_params: Names of parameters, `"weight"` or `"bias"`, that are taken to be zero.

    Raises:
        RuleError: If a bound does not broadcast to the input, or is one number a channel without the spatial axes.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, lrp.ZBox(0.0, 1.0))])
        >>> relevance_fn(torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0, 0.5]]), target=0)
        tensor([[0.3333, 0.1667]])

    References:
        G. Montavon et al., "Explaining nonlinear classification decisions with deep Taylor decomposition", Pattern
        Recognition 65, 2017.
    """

    low: float | Tensor
    high: float | Tensor
    stabilizer: float | Tensor | Stabilizer = 1e-6
    zero_params: ZeroParams = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "zero_params", named(self.zero_params))

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        weight, _ = kept(layer, self.zero_params)
        s = self._quotient(layer, message).s
        low, high = self._bounds(layer)
        relevance = layer.input * layer.transpose(s, weight)
        relevance = relevance - low * layer.transpose(s, positive(weight))
        return (Relevance(relevance - high * layer.transpose(s, negative(weight))),)

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        _, bias = kept(layer, self.zero_params)
        rest = of_bias(lambda b: b - positive(b) - negative(b), bias)
        return self._quotient(layer, message).absorbed(layer, rest)

    def _quotient(self, layer: BoundLayer, message: Message) -> Quotient:
        weight, bias = kept(layer, self.zero_params)
        low, high = self._bounds(layer)
        z = layer.affine(layer.input, weight, bias)
        z = z - layer.affine(low, positive(weight), of_bias(positive, bias))
        z = z - layer.affine(high, negative(weight), of_bias(negative, bias))
        return Quotient.of(message.value, z, self.stabilizer)

    def _bounds(self, layer: BoundLayer) -> tuple[Tensor, Tensor]:
        x = layer.input
        return tuple(torch.as_tensor(b, dtype=x.dtype, device=x.device).expand(x.shape) for b in (self.low, self.high))  # type: ignore[return-value]

    def objection(self, layer: Layer) -> str | None:
        if reason := needs_parameters(self, layer):
            return reason
        shape = layer.input_shapes[0]
        spatial = (
            layer.affine.weight_node.meta["val"].ndim - 2 if layer.kind is Kind.CONVOLUTION and layer.affine else 0
        )
        for name, bound in (("low", self.low), ("high", self.high)):
            if reason := _misfit(name, tuple(torch.as_tensor(bound).shape), shape, spatial):
                return reason
        return None


def _misfit(name: str, bound: tuple[int, ...], shape: tuple[int, ...], spatial: int) -> str | None:
    if spatial and 0 < len(bound) <= spatial:
        return (
            f"the bound `{name}` has shape {bound} for an input of shape {shape}, and torch would align it with the "
            f"last axis. For one bound a channel give it shape {(*bound, *[1] * spatial)}: "
            f"{name}.reshape({', '.join(['-1', *['1'] * spatial])})"
        )
    try:
        fits = torch.broadcast_shapes(bound, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    return None if fits else f"the bound `{name}` of shape {bound} does not broadcast to the input's shape {shape}"
