"""Relevance from the output of a tape back to its input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tests.oracle import rules
from tests.oracle.composites import Composite
from tests.oracle.layers import Layer, Recogniser
from tests.oracle.rules import Lost, Rule, Sent, plus
from tests.oracle.tape import record


class UncoveredError(Exception):
    """A layer that is not linear has no rule."""


@dataclass
class Result:
    """What the oracle says.

    Attributes:
        relevance: Of the input.
        start: The sum of relevance at the output.
        reached: The sum of relevance at the input.
        lost: What did not arrive, by cause.
        scale: The largest magnitude anywhere.
    """

    relevance: Tensor
    start: float
    reached: float
    lost: Lost
    scale: float


class Recording:
    """A forward pass, its layers, and relevance for any composite."""

    def __init__(self, model: object, params: object, x: Tensor):
        self.tape, self.input, self.ids, self.output = record(model, params, x)  # type: ignore[arg-type]
        self.layers = Recogniser(self.tape, self.input, self.ids).layers()

    def explain(self, composite: Composite, start: Sent) -> Result:
        """Relevance, from what starts at the output: a vector."""
        values = self.tape.values
        relevance, multiplier = torch.zeros_like(values), torch.zeros_like(values)
        is_relevance = torch.zeros(len(values), dtype=torch.bool)

        def put(ids: Tensor, sent: Sent) -> None:
            flat = ids.flatten()
            (relevance if sent.is_relevance else multiplier).index_add_(0, flat, sent.value)
            if sent.is_relevance:
                is_relevance[flat] = True

        def taken(ids: Tensor) -> Sent:
            flat = ids.flatten()
            if not bool(is_relevance[flat].any()):
                return Sent(multiplier[flat], False)
            return Sent(relevance[flat] + multiplier[flat] * rules.finite(values[flat]), True)

        if composite.cotangent:
            start = Sent(start.value, False)
        put(self.ids, start)
        scale, lost = 0.0, plus()
        came_to: set[int] = set(self.ids.flatten().tolist())
        for layer in reversed(self.layers):
            if came_to.isdisjoint(layer.output.flatten().tolist()):
                continue  # everything behind was stopped
            came = taken(layer.output)
            answer, lost_here = self.rule(composite, layer)(layer, came)
            lost = plus(lost, lost_here)
            scale = max(scale, float(came.relevance(layer.y).abs().max()))
            for ids, sent in zip(layer.inputs, answer, strict=True):
                if sent is not None:
                    put(ids, sent)
                    came_to.update(ids.flatten().tolist())
        arrived = taken(self.input)
        shown = arrived.value if composite.cotangent else arrived.relevance(values[self.input].flatten())
        begun = start.relevance(values[self.ids].flatten()).sum()
        reached = arrived.relevance(values[self.input].flatten()).sum()
        at_constants = self._at_constants(relevance, multiplier, values)
        lost = plus(lost, {"constants": at_constants})
        scale = max(scale, float(shown.abs().max()))
        return Result(shown.reshape(self.input.shape), float(begun), float(reached), lost, scale)

    def _at_constants(self, relevance: Tensor, multiplier: Tensor, values: Tensor) -> float:
        """What went to constants that lie in memory beside what depends on the input."""
        made = {0, *self.input.flatten().tolist()}
        for entry in self.tape.entries:
            made.update(entry.output.flatten().tolist())
        beside = torch.tensor([i for i in range(len(values)) if i not in made], dtype=torch.int64)
        return float((relevance[beside] + multiplier[beside] * rules.finite(values[beside])).sum())

    @cached_property
    def zeros(self) -> list[tuple[int, ...]]:
        """Where an output that rules may divide by is exactly zero, or nothing contributes to it, layer by layer."""
        found = []
        for layer in self.layers:
            if layer.kind in ("dense", "convolution"):
                found.append(tuple(torch.nonzero(layer.y * (layer.jacobians[0] @ layer.x) == 0).flatten().tolist()))
            elif layer.kind != "select":
                found.append(tuple(torch.nonzero(layer.y == 0).flatten().tolist()))
        return found

    @staticmethod
    def rule(composite: Composite, layer: Layer) -> Rule:
        if layer.kind == "select":
            return rules.moved
        if layer.kind == "scale":
            return rules.scaled
        if layer.kind == "winner":
            return rules.won
        if (found := composite.rule_for(layer)) is not None:
            return found
        linear = layer.kind in ("dense", "convolution", "linear", "sum", "total", "average", "batch_norm")
        if composite.cotangent or linear:
            return rules.linear
        raise UncoveredError(layer.operation)
