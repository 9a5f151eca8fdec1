"""Rules that serve any layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, fx

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Kind, Layer
from lrpfunc._ops.call import named
from lrpfunc.rules._message import Form, Message, Multiplier, Relevance, carried
from lrpfunc.rules._plumbing import Linear, pulled_back
from lrpfunc.rules._rule import Rule, added, batched_sum_to


@final
@dataclass(frozen=True, eq=False)
class Gradient(Rule):
    r"""The plain VJP, :math:`m_i = J^T(m)_i`: input times gradient, layer by layer.

    Args:
        of: What goes through the VJP: the `"multiplier"`, or the `"relevance"` itself, as in excitation backprop.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda _, x: x.exp(), [(lrp.operation("exp"), lrp.Gradient())])
        >>> relevance_fn(None, torch.tensor([[0.0, 1.0]]), target=1)
        tensor([[0.0000, 2.7183]])
    """

    of: Literal["multiplier", "relevance"] = "multiplier"
    several_outputs: ClassVar[bool] = True

    def takes(self, layer: Layer) -> Form:
        return self.of

    def propagate(self, layer: BoundLayer, *messages: Message) -> tuple[Message, ...]:
        return pulled_back(layer, messages)

    def absorbed(self, layer: BoundLayer, *messages: Message) -> dict[str, Tensor]:
        if self.of == "relevance":
            kept = layer.jvp([torch.ones_like(x) for x in layer.inputs])
            return {"rule": added(m.value * (1 - k) for m, k in zip(messages, kept, strict=True))}
        if layer.layer.linear:
            return Linear().absorbed(layer, *messages)
        linear = layer.jvp(list(map(carried, layer.inputs)))
        parts = zip(messages, layer.outputs, linear, strict=True)
        return {"nonlinearity": added(m.value.conj() * (carried(y) - part) for m, y, part in parts)}


@final
@dataclass(frozen=True, eq=False)
class Stop(Rule):
    """Passes nothing on: the layer is taken to be constant.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> rules = [(lrp.operation("exp"), lrp.Stop()), (lrp.Sum, lrp.Norm(0.0))]
        >>> relevance_fn = lrp.attribute(lambda _, x: x.exp() + x, rules)
        >>> relevance_fn(None, torch.tensor([[0.0, 2.0]]), target=1)
        tensor([[0., 2.]])
    """

    form: ClassVar[Form] = "either"
    several_outputs: ClassVar[bool] = True

    def propagate(self, layer: BoundLayer, *messages: Message) -> tuple[None, ...]:
        return (None,) * len(layer.inputs)

    def receivers(self, layer: Layer) -> tuple[fx.Node, ...]:
        return ()

    def absorbed(self, layer: BoundLayer, *messages: Message) -> dict[str, Tensor]:
        return {"rule": added(m.relevance(y) for m, y in zip(messages, layer.outputs, strict=True))}


@final
@dataclass(frozen=True, eq=False)
class Uniform(Rule):
    r"""Gives every operand the same share of the relevance.

    The `n` operands of a sum get :math:`R / n` each; the `n` factors of a product :math:`J^T(m / n)`, which is the
    same, before what each broadcasts is added up. A quotient is a product with the reciprocal, a statistic of degree
    `n`, such as the variance, a product of `n` factors. In fused attention the value gets :math:`J^T(m / 2)`, query and
    key :math:`J^T(m / 4)` each, as they do where it is written out and the softmax absorbs.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda _, x: x[:, :1] * x[:, 1:], [(lrp.Product, lrp.Uniform())])
        >>> relevance_fn(None, torch.tensor([[3.0, 4.0]]), target=0)
        tensor([[6., 6.]])

    References:
        R. Achtibat et al., "AttnLRP: attention-aware layer-wise relevance propagation for transformers", ICML, 2024.
    """

    def takes(self, layer: Layer) -> Form:
        return "relevance" if _adds(layer) else "multiplier"

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        if _adds(layer.layer):
            share = message.value / len(layer.inputs)
            return tuple(Relevance(batched_sum_to(share, x.shape)) for x in layer.inputs)
        shares = _shares(layer.layer)
        largest = max(shares)
        pulled = layer.vjp(largest * message.value)
        return tuple(Multiplier(m if s == largest else s / largest * m) for s, m in zip(shares, pulled, strict=True))

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        if _adds(layer.layer):
            return {}
        weighted = [share * carried(x) for share, x in zip(_shares(layer.layer), layer.inputs, strict=True)]
        (shared,) = layer.jvp(weighted)
        return {"nonlinearity": (message.value * (carried(layer.output) - shared)).sum()}

    def objection(self, layer: Layer) -> str | None:
        if layer.shares or _adds(layer) or (layer.linear and layer.places == 1):
            return None
        return "Uniform serves sums, products, quotients, statistics and attention; this layer is none of them"


def _adds(layer: Layer) -> bool:
    return layer.kind is Kind.SUM and not named(layer.operation).reduces


def _shares(layer: Layer) -> tuple[float, ...]:
    return layer.shares or (1.0,)
