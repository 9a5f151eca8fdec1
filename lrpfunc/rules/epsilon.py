"""LRP-epsilon, and its use for layers without parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Layer
from lrpfunc.rules._message import Form, Message, Multiplier, Stabilizer, as_stabilizer, carried
from lrpfunc.rules._rule import Quotient, Rule, ZeroParams, kept, named, needs_linear, needs_parameters


@final
@dataclass(frozen=True, eq=False)
class Epsilon(Rule):
    r"""Distributes relevance in proportion to the contributions to the pre-activation.

    .. math:: R_i = x_i \, J_W^T\!\left(\frac{R}{\operatorname{stab}(z)}\right)_i, \qquad z = f(x; W, b)

    For dense layers, and wherever the explanation should stay faithful to the gradient; a larger `epsilon` absorbs the
    relevance of weak and contradictory contributions. Serves any linear layer.

    Args:
        epsilon: A number, a tensor, or a `Stabilizer`. With 0 the rule is LRP-0.
        zero_params: Names of parameters, `"weight"` or `"bias"`, that are taken to be zero.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, lrp.Epsilon(0.5))])
        >>> relevance_fn(torch.ones(2, 1), torch.tensor([[1.0, 3.0]]), target=0)
        tensor([[0.8889, 2.6667]])

    References:
        S. Bach et al., "On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance
        propagation", PLOS ONE 10(7), 2015.
    """

    epsilon: float | Tensor | Stabilizer = 1e-6
    zero_params: ZeroParams = None
    form: ClassVar[Form] = "either"

    def __post_init__(self) -> None:
        object.__setattr__(self, "zero_params", named(self.zero_params))

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        s = self._quotient(layer, message).s
        if layer.layer.affine is not None:
            weight, _ = kept(layer, self.zero_params)
            return (Multiplier(layer.transpose(s, weight)),)
        return tuple(Multiplier(m) for m in layer.vjp(s))

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        quotient = self._quotient(layer, message)
        if layer.layer.affine is not None:
            return quotient.absorbed(layer, kept(layer, self.zero_params)[1])
        (constants,) = layer.at_zero()
        return {**quotient.absorbed(layer, None), "constants": (quotient.s * carried(constants)).sum()}

    def _quotient(self, layer: BoundLayer, message: Message) -> Quotient:
        if self.zero_params:
            z = layer.affine(layer.input, *kept(layer, self.zero_params))
            return Quotient.of(message.relevance(layer.output), z, self.epsilon)
        if layer.rectified is not None and not as_stabilizer(self.epsilon).norm_scale:
            # It is z wherever there is relevance.
            return Quotient.of(message.relevance(layer.rectified), layer.rectified, self.epsilon, sign=1)
        return Quotient.of(message.relevance(layer.output), layer.output, self.epsilon)

    def objection(self, layer: Layer) -> str | None:
        return needs_parameters(self, layer) if self.zero_params else needs_linear(self, layer)


@final
@dataclass(frozen=True, eq=False)
class Norm(Rule):
    r"""Distributes relevance in proportion to the contributions to a sum or an average.

    .. math:: R_i = x_i \, J^T\!\left(\frac{R}{\operatorname{stab}(z)}\right)_i, \qquad z = f(x)

    Args:
        stabilizer: A number, a tensor, or a `Stabilizer`.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda _, x: x.mean(-1, keepdim=True), [(lrp.AvgPool, lrp.Norm())])
        >>> relevance_fn(None, torch.tensor([[1.0, 3.0]]), target=0)
        tensor([[0.5000, 1.5000]])

    References:
        C. J. Anders et al., "Software for dataset-wide XAI: from local explanations to global insights with Zennit,
        CoRelAy, and ViRelAy", arXiv:2106.13200, 2021.
    """

    stabilizer: float | Tensor | Stabilizer = 1e-6
    form: ClassVar[Form] = "either"

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        return Epsilon(self.stabilizer).propagate(layer, message)

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        return Epsilon(self.stabilizer).absorbed(layer, message)

    def objection(self, layer: Layer) -> str | None:
        return needs_linear(self, layer)
