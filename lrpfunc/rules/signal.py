"""The signal-takes-all rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, fx

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Kind, Layer, Role
from lrpfunc.rules._message import Form, Message, Multiplier, carried
from lrpfunc.rules._rule import Rule, added


@final
@dataclass(frozen=True, eq=False)
class SignalTakesAll(Rule):
    r"""Gives all relevance to the signal, and none to what modulates it.

    What modulates is held constant; what is left is affine in the signal, and takes the plain VJP of the multiplier.

    - normalizations, native or written out: the statistic is held, and the centring is linear. A bias absorbs;
    - attention: the weights are held, and all relevance goes to the value;
    - gates, the products in recurrent cells, the weights of routed experts, selective scans: the gate is held;
    - quotients: the divisor is held.

    Only relevance takes these for constants; derivatives of it do not.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> def model_fn(_, x):
        ...     return x[:, :1] * x[:, 1:].sigmoid()
        >>> rules = [(lrp.Gate, lrp.SignalTakesAll())] + lrp.attn_lrp()
        >>> lrp.attribute(model_fn, rules)(None, torch.tensor([[4.0, 0.0]]), target=0)
        tensor([[2., 0.]])

    References:
        L. Arras et al., "Explaining and interpreting LSTMs", in Explainable AI, Springer, 2019.
        A. Ali et al., "XAI for transformers: better explanations through conservative propagation", ICML, 2022.
    """

    form: ClassVar[Form] = "multiplier"
    several_outputs: ClassVar[bool] = True

    def propagate(self, layer: BoundLayer, *messages: Message) -> tuple[Message | None, ...]:
        pulled = layer.signal_vjp(*(message.value for message in messages))
        return tuple(None if m is None else Multiplier(m) for m in pulled)

    def absorbed(self, layer: BoundLayer, *messages: Message) -> dict[str, Tensor]:
        cause = "bias" if layer.layer.kind in (Kind.NORMALIZATION, Kind.BATCH_NORM) else "constants"
        constants = zip(messages, layer.signal_at_zero(), strict=True)
        return {cause: added(m.value * carried(c) for m, c in constants)}

    def receivers(self, layer: Layer) -> tuple[fx.Node, ...]:
        return layer.signals

    def objection(self, layer: Layer) -> str | None:
        if layer.signals or layer.role is Role.RECURRENT or layer.kind is Kind.ATTENTION:
            return None
        return (
            "SignalTakesAll serves normalizations, attention and gates; of this layer it is not known which input "
            "carries the signal, so share it out: lrpfunc.Uniform()"
        )
