"""LRP-gamma, for inputs of either sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Layer
from lrpfunc.rules._message import Form, Message, Multiplier, Relevance, Stabilizer
from lrpfunc.rules._rule import (
    Quotient,
    Rule,
    ZeroParams,
    kept,
    named,
    needs_parameters,
    negative,
    of_bias,
    positive,
    where_positive,
)


@final
@dataclass(frozen=True, eq=False)
class Gamma(Rule):
    r"""Favours positive contributions, by strengthening the positive weights.

    `Epsilon` with every weight and bias :math:`w` replaced by :math:`w + \gamma w^+`, generalized to inputs and
    outputs of either sign. With :math:`W_p = W + \gamma W^+`, :math:`W_n = W + \gamma W^-` and
    :math:`y = f(x; W, b)`:

    .. math::
        s_p &= [y > 0] \, R / \operatorname{stab}\left(f(x^+; W_p, b_p) + f(x^-; W_n, 0)\right) \\
        s_n &= [y < 0] \, R / \operatorname{stab}\left(f(x^+; W_n, b_n) + f(x^-; W_p, 0)\right) \\
        R_i &= x_i^+ \left(J_{W_p}^T(s_p) + J_{W_n}^T(s_n)\right)_i
             + x_i^- \left(J_{W_n}^T(s_p) + J_{W_p}^T(s_n)\right)_i

    For convolutions. `gamma = 0` is `Epsilon`; for positive outputs, a large `gamma` comes close to `ZPlus`.

    Args:
        gamma: How much to strengthen them. A tensor may be vmapped over or differentiated.
        stabilizer: A number, a tensor, or a `Stabilizer`.
        zero_params: Names of parameters, `"weight"` or `"bias"`, that are taken to be zero.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, lrp.Gamma(1.0))])
        >>> relevance_fn(torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([[1.0, 3.0, 2.0]]), target=0)
        tensor([[ 0.6667,  2.0000, -0.6667]])

    References:
        G. Montavon et al., "Layer-wise relevance propagation: an overview", in Explainable AI, Springer, 2019.
    """

    gamma: float | Tensor = 0.25
    stabilizer: float | Tensor | Stabilizer = 1e-6
    zero_params: ZeroParams = None
    form: ClassVar[Form] = "either"

    def __post_init__(self) -> None:
        object.__setattr__(self, "zero_params", named(self.zero_params))

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        weight, _ = kept(layer, self.zero_params)
        up, down = self._raised(weight), self._lowered(weight)
        sp = self._quotient(layer, message, 1).s
        with_x = layer.transpose(sp, up)
        against = None if layer.layer.nonnegative else layer.transpose(sp, down)
        if layer.rectified is None:  # otherwise there is relevance only where the output is positive
            sn = self._quotient(layer, message, -1).s
            with_x = with_x + layer.transpose(sn, down)
            against = None if against is None else against + layer.transpose(sn, up)
        if against is None:
            return (Multiplier(with_x),)
        return (Relevance(positive(layer.input) * with_x + negative(layer.input) * against),)

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        _, bias = kept(layer, self.zero_params)
        above = self._quotient(layer, message, 1).absorbed(layer, of_bias(self._raised, bias))
        below = self._quotient(layer, message, -1).absorbed(layer, of_bias(self._lowered, bias))
        booked = {cause: above[cause] + below[cause] for cause in above}
        lost = torch.where(layer.output == 0, message.relevance(layer.output), 0).sum()
        booked["rule"] = booked["rule"] + lost
        return booked

    def _quotient(self, layer: BoundLayer, message: Message, sign: int) -> Quotient:
        """Of the relevance where the output has the given sign."""
        weight, bias = kept(layer, self.zero_params)
        same, other = (self._raised, self._lowered) if sign > 0 else (self._lowered, self._raised)
        z = layer.affine(positive(layer.input), same(weight), of_bias(same, bias))
        if not layer.layer.nonnegative:
            z = z + layer.affine(negative(layer.input), other(weight), None)
        if layer.rectified is not None:
            rectified = message.relevance(layer.rectified)
            return Quotient.of(rectified if sign > 0 else torch.zeros_like(rectified), z, self.stabilizer)
        decides = layer.output if sign > 0 else -layer.output
        part = where_positive(decides, message.relevance(layer.output))
        return Quotient.of(part, z, self.stabilizer)

    def _raised(self, parameter: Tensor) -> Tensor:
        return parameter + self.gamma * positive(parameter)

    def _lowered(self, parameter: Tensor) -> Tensor:
        return parameter + self.gamma * negative(parameter)

    def objection(self, layer: Layer) -> str | None:
        if isinstance(self.gamma, Tensor) and self.gamma.ndim > 0:
            return f"gamma has shape {tuple(self.gamma.shape)}; it is one number, and to try several use torch.vmap"
        return needs_parameters(self, layer)
