"""Rules that look at the weights alone, or at neither weights nor input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Layer
from lrpfunc.rules._message import Message, Relevance, Stabilizer
from lrpfunc.rules._rule import Quotient, Rule, ZeroParams, kept, named, needs_parameters, of_bias


@final
@dataclass(frozen=True, eq=False)
class WSquare(Rule):
    r"""Distributes relevance in proportion to the squared weights, whatever the input.

    .. math:: R_i = J_{W^2}^T\!\left(\frac{R}{\operatorname{stab}(z)}\right)_i, \qquad z = f(1; W^2, b^2)

    For the first layer, when its input is unbounded.

    Args:
        stabilizer: A number, a tensor, or a `Stabilizer`.
        zero_params: Names of parameters, `"weight"` or `"bias"`, that are taken to be zero.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, lrp.WSquare())])
        >>> relevance_fn(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 2.0]]), target=0)
        tensor([[1.0000, 4.0000]])

    References:
        G. Montavon et al., "Explaining nonlinear classification decisions with deep Taylor decomposition", Pattern
        Recognition 65, 2017.
    """

    stabilizer: float | Tensor | Stabilizer = 1e-6
    zero_params: ZeroParams = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "zero_params", named(self.zero_params))

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        return (Relevance(layer.transpose(self._quotient(layer, message).s, self._parameters(layer)[0])),)

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        return self._quotient(layer, message).absorbed(layer, self._parameters(layer)[1])

    def _parameters(self, layer: BoundLayer) -> tuple[Tensor, Tensor | None]:
        weight, bias = kept(layer, self.zero_params)
        return weight.square(), of_bias(torch.square, bias)

    def _quotient(self, layer: BoundLayer, message: Message) -> Quotient:
        z = layer.affine(torch.ones_like(layer.input), *self._parameters(layer))
        return Quotient.of(message.value, z, self.stabilizer)

    def objection(self, layer: Layer) -> str | None:
        return needs_parameters(self, layer)


@final
@dataclass(frozen=True, eq=False)
class Flat(Rule):
    r"""Distributes relevance evenly over the inputs a unit looks at.

    .. math:: R_i = J_1^T\!\left(\frac{R}{\operatorname{stab}(z)}\right)_i, \qquad z = f(1; 1, 0)

    For the first layer, when its exact pixels do not matter. Zero padding takes no relevance.

    Args:
        stabilizer: A number, a tensor, or a `Stabilizer`.
        zero_params: Names of parameters that are taken to be zero; with `"weight"` all relevance is absorbed.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, lrp.Flat())])
        >>> relevance_fn(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 2.0]]), target=0)
        tensor([[2.5000, 2.5000]])

    References:
        S. Lapuschkin et al., "Unmasking Clever Hans predictors and assessing what machines really learn", Nature
        Communications 10, 2019.
    """

    stabilizer: float | Tensor | Stabilizer = 1e-6
    zero_params: ZeroParams = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "zero_params", named(self.zero_params))

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        return (Relevance(layer.transpose(self._quotient(layer, message).s, self._weight(layer))),)

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        return self._quotient(layer, message).absorbed(layer, None)

    def _weight(self, layer: BoundLayer) -> Tensor:
        weight, _ = layer.parameters
        return torch.zeros_like(weight) if "weight" in (self.zero_params or ()) else torch.ones_like(weight)

    def _quotient(self, layer: BoundLayer, message: Message) -> Quotient:
        z = layer.affine(torch.ones_like(layer.input), self._weight(layer), None)
        return Quotient.of(message.value, z, self.stabilizer)

    def objection(self, layer: Layer) -> str | None:
        return needs_parameters(self, layer)
