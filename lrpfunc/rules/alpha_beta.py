"""The alpha-beta rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lrpfunc._errors import RuleError
from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Layer
from lrpfunc.rules._message import Message, Multiplier, Relevance, Stabilizer
from lrpfunc.rules._rule import Quotient, Rule, ZeroParams, kept, named, needs_parameters, negative, of_bias, positive


@final
@dataclass(frozen=True, eq=False)
class AlphaBeta(Rule):
    r"""Weighs positive contributions by alpha against negative ones by beta.

    .. math::
        z_a &= f(x^+; W^+, b^+) + f(x^-; W^-, 0), \qquad s_a = R / \operatorname{stab}(z_a) \\
        z_b &= f(x^+; W^-, b^-) + f(x^-; W^+, 0), \qquad s_b = R / \operatorname{stab}(z_b) \\
        R_i &= \alpha \left(x_i^+ J_{W^+}^T(s_a)_i + x_i^- J_{W^-}^T(s_a)_i\right)
             - \beta \left(x_i^+ J_{W^-}^T(s_b)_i + x_i^- J_{W^+}^T(s_b)_i\right)

    For convolutions, where evidence against the target should show. With `beta = 0` nothing is computed for it.

    Args:
        alpha: The weight of the positive contributions; `alpha - beta` must be 1, up to rounding.
        beta: The weight of the negative ones; both must not be negative.
        stabilizer: A number, a tensor, or a `Stabilizer`.
        zero_params: Names of parameters, `"weight"` or `"bias"`, that are taken to be zero.

    Raises:
        RuleError: If `alpha` and `beta` are numbers that do not fit together.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, lrp.AlphaBeta(2.0, 1.0))])
        >>> relevance_fn(torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([[1.0, 3.0, 2.0]]), target=0)
        tensor([[ 1.0000,  3.0000, -2.0000]])

    References:
        S. Bach et al., "On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance
        propagation", PLOS ONE 10(7), 2015.
    """

    alpha: float | Tensor = 2.0
    beta: float | Tensor = 1.0
    stabilizer: float | Tensor | Stabilizer = 1e-6
    zero_params: ZeroParams = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "zero_params", named(self.zero_params))
        if isinstance(self.alpha, Tensor) or isinstance(self.beta, Tensor):
            return
        if self.alpha < 0 or self.beta < 0 or not math.isclose(self.alpha - self.beta, 1, abs_tol=1e-6):
            raise RuleError(
                f"AlphaBeta(alpha={self.alpha}, beta={self.beta}) has alpha - beta = {self.alpha - self.beta:g}: "
                "relevance would not be conserved. Both must not be negative and their difference must be 1, "
                "for example AlphaBeta(alpha=2.0, beta=1.0)"
            )

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        weight, _ = kept(layer, self.zero_params)
        up, down = positive(weight), negative(weight)
        sa = self._quotient(layer, message, favour=True).s
        sb = None if self._one_sided else self._quotient(layer, message, favour=False).s
        with_x = self.alpha * layer.transpose(sa, up)
        if sb is not None:
            with_x = with_x - self.beta * layer.transpose(sb, down)
        if layer.layer.nonnegative:
            return (Multiplier(with_x),)
        against = self.alpha * layer.transpose(sa, down)
        if sb is not None:
            against = against - self.beta * layer.transpose(sb, up)
        return (Relevance(positive(layer.input) * with_x + negative(layer.input) * against),)

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        _, bias = kept(layer, self.zero_params)
        booked: dict[str, Tensor] = {"rule": (1 - self.alpha + self.beta) * message.value.sum()}
        for factor, favour, part in ((self.alpha, True, positive), (-self.beta, False, negative)):
            if favour or not self._one_sided:
                taken = self._quotient(layer, message, favour).absorbed(layer, of_bias(part, bias))
                booked = {cause: factor * amount + booked.get(cause, 0) for cause, amount in taken.items()}
        return booked

    @property
    def _one_sided(self) -> bool:
        return not isinstance(self.beta, Tensor) and self.beta == 0

    def _quotient(self, layer: BoundLayer, message: Message, favour: bool) -> Quotient:
        """Of the positive contributions, which are favoured, or of the negative ones."""
        weight, bias = kept(layer, self.zero_params)
        same, other = (positive, negative) if favour else (negative, positive)
        z = layer.affine(positive(layer.input), same(weight), of_bias(same, bias))
        if not layer.layer.nonnegative:
            z = z + layer.affine(negative(layer.input), other(weight), None)
        if favour:  # a sum of what is not negative, but for rounding
            return Quotient.of(message.value, z.clamp_min(0), self.stabilizer, sign=1)
        return Quotient.of(message.value, z, self.stabilizer)

    def objection(self, layer: Layer) -> str | None:
        return needs_parameters(self, layer)
