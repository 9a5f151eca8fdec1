"""The z-plus rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lrpfunc._graph import BoundLayer, Layer
from lrpfunc._message import Message, Multiplier, Relevance, Stabilizer, as_stabilizer, divide
from lrpfunc.rules._rule import (
    Rule,
    ZeroParams,
    kept,
    named,
    needs_parameters,
    negative,
    positive,
    shares,
    signed,
    stabilized,
)


@final
@dataclass(frozen=True, eq=False)
class ZPlus(Rule):
    r"""Distributes relevance over the positive contributions only.

    .. math::
        s = \frac{R}{\operatorname{stab}(z)}, \qquad z = f(x^+; W^+, b^+) + f(x^-; W^-, 0), \qquad
        R_i = x_i^+ J_{W^+}^T(s)_i + x_i^- J_{W^-}^T(s)_i

    For convolutions: positive relevance stays positive, and the maps are smooth. Where the input is known to be
    non-negative, after a ReLU for example, the second branch is left out.

    Args:
        stabilizer: A number, a tensor, or a `Stabilizer`.
        zero_params: Names of parameters, `"weight"` or `"bias"`, that are taken to be zero.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, lrp.ZPlus())])
        >>> relevance_fn(torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([[1.0, 3.0, 2.0]]), target=0)
        tensor([[0.5000, 1.5000, 0.0000]])

    References:
        G. Montavon et al., "Explaining nonlinear classification decisions with deep Taylor decomposition", Pattern
        Recognition 65, 2017.
    """

    stabilizer: float | Tensor | Stabilizer = 1e-6
    zero_params: ZeroParams = None

    def __post_init__(self) -> None:
        named(self.zero_params)

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        _, _, s = self._quotient(layer, message)
        weight, _ = kept(layer, self.zero_params)
        favoured = layer.transpose(s, positive(weight))
        if layer.layer.nonnegative:
            return (Multiplier(favoured),)
        x = layer.input
        return (Relevance(positive(x) * favoured + negative(x) * layer.transpose(s, negative(weight))),)

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        z, denominator, s = self._quotient(layer, message)
        bias = signed(kept(layer, self.zero_params)[1], positive)
        return {"bias": shares(layer, s, bias), "stabilizer": stabilized(message.value, z, denominator, s)}

    def _quotient(self, layer: BoundLayer, message: Message) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = kept(layer, self.zero_params)
        z = layer.affine(positive(layer.input), positive(weight), signed(bias, positive))
        if not layer.layer.nonnegative:
            z = z + layer.affine(negative(layer.input), negative(weight), None)
        denominator = as_stabilizer(self.stabilizer)(z)
        return z, denominator, divide(message.value, denominator)

    def objection(self, layer: Layer) -> str | None:
        return needs_parameters(self, layer)
