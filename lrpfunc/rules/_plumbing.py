"""The rules of layers that need none: linear operations, and operations that only move values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Kind, Layer
from lrpfunc.rules._message import Form, Message, Multiplier, Relevance, carried
from lrpfunc.rules._rule import Rule, added, batched_sum_to


@final
@dataclass(frozen=True, eq=False)
class Linear(Rule):
    """LRP-0: the plain VJP of the multiplier, exact for whatever is affine in its inputs."""

    form: ClassVar[Form] = "multiplier"
    several_outputs: ClassVar[bool] = True

    def propagate(self, layer: BoundLayer, *messages: Message) -> tuple[Message, ...]:
        return tuple(Multiplier(m) for m in layer.vjp(*(message.value for message in messages)))

    def absorbed(self, layer: BoundLayer, *messages: Message) -> dict[str, Tensor]:
        has_bias = layer.layer.kind in (Kind.DENSE, Kind.CONVOLUTION, Kind.BATCH_NORM)
        constants = zip(messages, layer.at_zero(), strict=True)
        return {"bias" if has_bias else "constants": added(m.value * carried(c) for m, c in constants)}


@final
@dataclass(frozen=True, eq=False)
class Select(Rule):
    """Either form goes where the value came from."""

    form: ClassVar[Form] = "either"
    several_outputs: ClassVar[bool] = True

    def propagate(self, layer: BoundLayer, *messages: Message) -> tuple[Message, ...]:
        return pulled_back(layer, messages)

    def absorbed(self, layer: BoundLayer, *messages: Message) -> dict[str, Tensor]:
        if layer.layer.kind is Kind.WINNER and not layer.layer.competes_with_constants:
            return {}
        chosen = layer.jvp([torch.ones_like(x) for x in layer.inputs])
        places = zip(messages, layer.outputs, chosen, strict=True)
        if layer.layer.kind is Kind.WINNER:  # among equals, constants may be
            return {"constants": added(m.relevance(y) * (1 - c) for m, y, c in places)}
        return {"constants": added(torch.where(c == 0, m.relevance(y), 0) for m, y, c in places)}


@final
@dataclass(frozen=True, eq=False)
class Scale(Rule):
    """Scaling leaves relevance as it is, where the factor is not zero; a multiplier takes the factor."""

    form: ClassVar[Form] = "either"

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        if isinstance(message, Multiplier):
            return tuple(Multiplier(m) for m in layer.vjp(message.value))
        passed = torch.where(self._factor(layer) == 0, 0, message.value)
        return (Relevance(batched_sum_to(passed, layer.input.shape)),)

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        if isinstance(message, Multiplier):
            return {}
        return {"constants": torch.where(self._factor(layer) == 0, message.value, 0).sum()}

    @staticmethod
    def _factor(layer: BoundLayer) -> Tensor:
        (factor,) = layer.jvp([torch.ones_like(layer.input)])
        return factor


def pulled_back(layer: BoundLayer, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The plain VJP of what the messages hold, whichever form that has."""
    form = type(messages[0])
    return tuple(form(m) for m in layer.vjp(*(message.value for message in messages)))  # type: ignore[call-arg]


def default_rule(layer: Layer) -> Rule | None:
    """The rule of a layer that no composite covers; `None` if it needs one."""
    if layer.kind in (Kind.SELECT, Kind.WINNER):
        return Select()
    if layer.kind is Kind.SCALE:
        return Scale()
    return Linear() if layer.linear else None
