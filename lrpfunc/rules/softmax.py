"""The Taylor decomposition of the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Kind, Layer
from lrpfunc._ops.call import named
from lrpfunc.rules._message import Form, Message, Multiplier, Relevance, Stabilizer, as_stabilizer, carried, divide
from lrpfunc.rules._rule import Rule


@final
@dataclass(frozen=True, eq=False)
class TaylorSoftmax(Rule):
    r"""Distributes relevance by the first-order Taylor expansion of the softmax.

    With :math:`s = \operatorname{softmax}(x)` and :math:`R_j = s_j m_j`, the linear part is

    .. math:: R_i = x_i \left(R_i - s_i \sum\nolimits_j R_j\right),

    the plain VJP of the multiplier, and the rest a bias, whose relevance is

    - `"absorb"`: lost, as that of other biases. The same holds for `log_softmax` and `logsumexp`;
    - `"omit"`: kept, by leaving the bias out of the denominator:
      :math:`R_i = x_i s_i (v_i - \langle s, v \rangle)` with
      :math:`v_j = m_j / \operatorname{stab}(x_j - \langle s, x \rangle)`;
    - `"distribute"`: kept, in equal shares:
      :math:`\frac{1}{N} \sum_j (1 + \langle s, x \rangle - x_j) R_j` more for each of the `N` inputs.

    The softmax inside fused attention is out of reach: `Uniform` serves that whole, and absorbs. A composite that
    keeps the bias of a softmax needs attention that is written out, and says so otherwise.

    Args:
        bias: What becomes of the bias.
        stabilizer: Of `"omit"`.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda _, x: x.softmax(-1), [(lrp.Softmax, lrp.TaylorSoftmax())])
        >>> relevance_fn(None, torch.tensor([[0.0, 2.0]]), target=1)
        tensor([[-0.0000, 0.2100]])

    References:
        R. Achtibat et al., "AttnLRP: attention-aware layer-wise relevance propagation for transformers", ICML, 2024.
    """

    bias: Literal["absorb", "omit", "distribute"] = "absorb"
    stabilizer: float | Tensor | Stabilizer = 1e-6
    form: ClassVar[Form] = "multiplier"

    def __post_init__(self) -> None:
        if self.bias not in ("absorb", "omit", "distribute"):
            raise ValueError(f"bias is 'absorb', 'omit' or 'distribute', not {self.bias!r}")

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        m, x, s = message.value, carried(layer.input), layer.output
        if self.bias == "omit":
            v = divide(m, as_stabilizer(self.stabilizer)(self._centred(layer)))
            return (Multiplier(s * (v - layer.summed(s * v))),)
        (linear,) = layer.vjp(m)
        if self.bias == "absorb":
            return (Multiplier(linear),)
        finite = ~layer.input.isinf()
        share = layer.summed(self._of_bias(layer, m)) / layer.summed(finite.to(x.dtype))
        return (Relevance(x * linear + torch.where(finite, share, 0)),)

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        m = message.value
        if self.bias == "omit":
            centred = self._centred(layer)
            v = divide(m, as_stabilizer(self.stabilizer)(centred))
            return {"stabilizer": (layer.output * (m - v * centred)).sum()}
        if self.bias == "distribute":
            return {}
        if named(layer.layer.operation).name == "softmax":
            return {"nonlinearity": self._of_bias(layer, m).sum()}
        (linear,) = layer.jvp([carried(layer.input)])
        return {"nonlinearity": (m * (carried(layer.output) - linear)).sum()}

    def _of_bias(self, layer: BoundLayer, m: Tensor) -> Tensor:
        """The relevance of each output that belongs to the bias of the expansion."""
        return layer.output * m * (1 - self._centred(layer))

    def _centred(self, layer: BoundLayer) -> Tensor:
        x = carried(layer.input)
        return x - layer.summed(layer.output * x)

    def objection(self, layer: Layer) -> str | None:
        if layer.kind is not Kind.SOFTMAX:
            return "TaylorSoftmax serves softmax, log_softmax and logsumexp"
        if self.bias != "absorb" and named(layer.operation).name != "softmax":
            return f"bias={self.bias!r} is for a softmax; a log_softmax or logsumexp takes lrpfunc.TaylorSoftmax()"
        return None
