"""The z-plus rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Layer
from lrpfunc.rules._message import Message, Stabilizer
from lrpfunc.rules._rule import Rule, ZeroParams, named, needs_parameters
from lrpfunc.rules.alpha_beta import AlphaBeta


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
        object.__setattr__(self, "zero_params", named(self.zero_params))

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        return self._one_sided().propagate(layer, message)

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        return self._one_sided().absorbed(layer, message)

    def _one_sided(self) -> AlphaBeta:
        return AlphaBeta(1.0, 0.0, self.stabilizer, self.zero_params)

    def objection(self, layer: Layer) -> str | None:
        return needs_parameters(self, layer)
