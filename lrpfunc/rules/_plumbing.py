"""The rules of layers that need none: linear operations, and operations that only move values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Kind, Layer
from lrpfunc.rules._message import Message, Multiplier, Relevance, carried
from lrpfunc.rules._rule import Form, Rule, batched_sum_to


@final
@dataclass(frozen=True, eq=False)
class Linear(Rule):
    """LRP-0: the plain VJP of the multiplier, exact for whatever is affine in its inputs."""

    form: ClassVar[Form] = "multiplier"

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        return tuple(Multiplier(m) for m in layer.vjp(message.value))

    def pull(self, layer: BoundLayer, *multipliers: Tensor) -> tuple[Tensor, ...]:
        return layer.vjp(*multipliers)

    def pulled(self, layer: BoundLayer) -> tuple[Tensor, ...]:
        return layer.jvp(list(map(carried, layer.inputs)))

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        has_bias = layer.layer.kind in (Kind.DENSE, Kind.CONVOLUTION, Kind.BATCH_NORM)
        return {"bias" if has_bias else "constants": (message.value * carried(layer.at_zero())).sum()}


@final
@dataclass(frozen=True, eq=False)
class Select(Rule):
    """Either form goes where the value came from."""

    form: ClassVar[Form] = "either"

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        return tuple(type(message)(m) for m in layer.vjp(message.value))  # type: ignore[call-arg]

    def pull(self, layer: BoundLayer, *values: Tensor) -> tuple[Tensor, ...]:
        return layer.vjp(*values)

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        if layer.layer.kind is Kind.WINNER:
            return {}
        (chosen,) = layer.jvp([torch.ones_like(x) for x in layer.inputs])
        return {"constants": torch.where(chosen == 0, message.relevance(layer.output), 0).sum()}


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


def default_rule(layer: Layer) -> Rule | None:
    """The rule of a layer that no composite covers; `None` if it needs one."""
    if layer.kind in (Kind.SELECT, Kind.WINNER):
        return Select()
    if layer.kind is Kind.SCALE:
        return Scale()
    return Linear() if layer.linear else None


def several(layer: BoundLayer, rule: Rule, messages: dict[fx.Node, Message]) -> tuple[Message | None, ...]:
    """The messages at the inputs of an operation with several outputs, some of which may have none.

    Operations that select hand either form on; all others take the multiplier.
    """
    nodes = [node for node in layer.layer.outputs if node is not None]
    forms = {type(message) for message in messages.values()}
    form = Multiplier if forms == {Multiplier} or not isinstance(rule, Select) else Relevance
    values = []
    for node in nodes:
        if node not in messages:
            values.append(torch.zeros_like(layer.values[node]))
        elif form is Multiplier:
            values.append(messages[node].multiplier(layer.values[node]))
        else:
            values.append(messages[node].relevance(layer.values[node]))
    return tuple(None if m is None else form(m) for m in rule.pull(layer, *values))


def absorbed_by_several(layer: BoundLayer, rule: Rule, messages: dict[fx.Node, Message]) -> dict[str, Tensor]:
    """What an operation with several outputs does not pass on: `account`, for what `several` does."""
    if layer.layer.kind is Kind.WINNER:
        return {}
    nodes = [node for node in layer.layer.outputs if node is not None]
    selects = isinstance(rule, Select)
    parts = layer.jvp([torch.ones_like(x) for x in layer.inputs]) if selects else rule.pulled(layer)
    lost = torch.zeros((), dtype=parts[0].dtype, device=parts[0].device)
    for node, part in zip(nodes, parts, strict=True):
        if node not in messages:
            continue
        value = layer.values[node]
        if selects:
            lost = lost + torch.where(part == 0, messages[node].relevance(value), 0).sum()
        else:
            lost = lost + (messages[node].multiplier(value) * (carried(value) - part)).sum()
            lost = lost + messages[node].unconvertible(value).sum()
    return {"constants" if selects else "nonlinearity": lost}
