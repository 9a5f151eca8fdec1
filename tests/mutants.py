"""Rules, simplifications and transforms that are each wrong in one way: what a search must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

import lrpfunc as lrp
from lrpfunc._layers import cover
from lrpfunc._layers.affine import Affine
from lrpfunc._ops.functions import batch_norm_eval
from lrpfunc._walk import propagate
from lrpfunc.rules import _message
from lrpfunc.rules._message import Message, divide


@dataclass(frozen=True, eq=False)
class Detached(lrp.Rule):
    """`Epsilon`, with a denominator that is a constant for derivatives."""

    epsilon: float = 0.1

    def propagate(self, layer: lrp.BoundLayer, message: Message) -> tuple[Message, ...]:
        s = message.value / lrp.Stabilizer(self.epsilon)(layer.output).detach()
        return (lrp.Multiplier(layer.vjp(s)[0]),)

    def absorbed(self, layer: lrp.BoundLayer, message: Message) -> dict[str, Tensor]:
        return lrp.Epsilon(self.epsilon).absorbed(layer, message)


@dataclass(frozen=True, eq=False)
class Forgetful(lrp.Rule):
    """`Epsilon`, which books what the stabilizer takes, and not what the bias takes."""

    epsilon: float = 0.1

    def propagate(self, layer: lrp.BoundLayer, message: Message) -> tuple[Message, ...]:
        return lrp.Epsilon(self.epsilon).propagate(layer, message)

    def absorbed(self, layer: lrp.BoundLayer, message: Message) -> dict[str, Tensor]:
        booked = lrp.Epsilon(self.epsilon).absorbed(layer, message)
        return {cause: amount for cause, amount in booked.items() if cause != "bias"}


@dataclass(frozen=True, eq=False)
class Signless(lrp.Rule):
    """`Epsilon`, with `sign(0) = 0` in its stabilizer, so that it divides by zero."""

    epsilon: float = 0.1

    def propagate(self, layer: lrp.BoundLayer, message: Message) -> tuple[Message, ...]:
        z = layer.output
        return (lrp.Multiplier(layer.vjp(message.value / (z + self.epsilon * z.sign()))[0]),)

    def absorbed(self, layer: lrp.BoundLayer, message: Message) -> dict[str, Tensor]:
        return lrp.Epsilon(self.epsilon).absorbed(layer, message)


class _DividedBy(torch.autograd.Function):
    """`R / z`, whose backward treats `z` as a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(relevance: Tensor, z: Tensor) -> Tensor:
        return relevance / z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.saved_tensors[0], None


@dataclass(frozen=True, eq=False)
class Handwritten(lrp.Rule):
    """`Epsilon` as an `autograd.Function`."""

    epsilon: float = 0.1

    def propagate(self, layer: lrp.BoundLayer, message: Message) -> tuple[Message, ...]:
        s = _DividedBy.apply(message.value, lrp.Stabilizer(self.epsilon)(layer.output))
        return (lrp.Multiplier(layer.vjp(s)[0]),)

    def absorbed(self, layer: lrp.BoundLayer, message: Message) -> dict[str, Tensor]:
        return lrp.Epsilon(self.epsilon).absorbed(layer, message)


@dataclass(frozen=True, eq=False)
class Confused(lrp.Rule):
    """`Epsilon`, which says that the relevance it has computed is a multiplier."""

    epsilon: float = 0.1

    def propagate(self, layer: lrp.BoundLayer, message: Message) -> tuple[Message, ...]:
        (message,) = lrp.Epsilon(self.epsilon).propagate(layer, message)
        return (lrp.Multiplier(message.relevance(layer.input)),)

    def absorbed(self, layer: lrp.BoundLayer, message: Message) -> dict[str, Tensor]:
        return lrp.Epsilon(self.epsilon).absorbed(layer, message)


@dataclass(frozen=True, eq=False)
class Overwriting(lrp.Rule):
    """`ZPlus`, which clamps the model's own weights in place."""

    def propagate(self, layer: lrp.BoundLayer, message: Message) -> tuple[Message, ...]:
        layer.parameters[0].clamp_(min=0)
        return lrp.ZPlus(0.1).propagate(layer, message)

    def absorbed(self, layer: lrp.BoundLayer, message: Message) -> dict[str, Tensor]:
        return lrp.ZPlus(0.1).absorbed(layer, message)


@dataclass(frozen=True, eq=False)
class Rectified(lrp.Rule):
    """`Epsilon` of the positive relevance only."""

    epsilon: float = 0.1

    def propagate(self, layer: lrp.BoundLayer, message: Message) -> tuple[Message, ...]:
        return lrp.Epsilon(self.epsilon).propagate(layer, lrp.Relevance(message.value.relu()))

    def absorbed(self, layer: lrp.BoundLayer, message: Message) -> dict[str, Tensor]:
        positive = lrp.Relevance(message.value.relu())
        booked = lrp.Epsilon(self.epsilon).absorbed(layer, positive)
        return {**booked, "rule": booked["rule"] + message.value.clamp(max=0).sum()}


@dataclass(frozen=True, eq=False)
class Spread(lrp.Rule):
    """The same share of all relevance for all inputs of all samples."""

    def propagate(self, layer: lrp.BoundLayer, message: Message) -> tuple[Message, ...]:
        return (lrp.Relevance((message.value.sum() / layer.input.numel()).expand(layer.input.shape)),)


@dataclass(frozen=True, eq=False)
class Scaled(lrp.Rule):
    """`Epsilon`, with a stabilizer that is scaled by all samples, or has the sign of their sum."""

    sign: bool

    def propagate(self, layer: lrp.BoundLayer, message: Message) -> tuple[Message, ...]:
        return (lrp.Multiplier(layer.vjp(message.value / self.stabilized(layer.output))[0]),)

    def stabilized(self, z: Tensor) -> Tensor:
        if self.sign:
            return z + torch.where(z.sum() < 0, -0.1, 0.1)
        return z + torch.where(z < 0, -1, 1) * (0.1 * z.abs().mean() + 0.01)


@dataclass(frozen=True, eq=False)
class Unless(lrp.Rule):
    """`Epsilon`, a tenth too much where something holds."""

    holds: Callable[[lrp.BoundLayer, Message], bool]

    def propagate(self, layer: lrp.BoundLayer, message: Message) -> tuple[Message, ...]:
        (right,) = lrp.Epsilon(0.1).propagate(layer, message)
        return (lrp.Multiplier(right.value * 1.1) if self.holds(layer, message) else right,)

    def absorbed(self, layer: lrp.BoundLayer, message: Message) -> dict[str, Tensor]:
        return lrp.Epsilon(0.1).absorbed(layer, message)


def strided(layer: lrp.BoundLayer, message: Message) -> bool:
    strides = layer.layer.nodes[-1].args[3:4]
    return "conv" in layer.layer.operation and any(2 in stride for stride in strides)  # type: ignore[operator]


def transposed(layer: lrp.BoundLayer, message: Message) -> bool:
    return strided(layer, message) and "transpose" in layer.layer.operation


def mapped_over(layer: lrp.BoundLayer, message: Message) -> bool:
    return is_batchedtensor(message.value)


@dataclass(frozen=True, eq=False)
class Noting(lrp.Rule):
    """`Epsilon`, which counts its calls."""

    def propagate(self, layer: lrp.BoundLayer, message: Message) -> tuple[Message, ...]:
        object.__setattr__(self, "seen", getattr(self, "seen", 0) + 1)
        return lrp.Epsilon(0.1).propagate(layer, message)

    def absorbed(self, layer: lrp.BoundLayer, message: Message) -> dict[str, Tensor]:
        return lrp.Epsilon(0.1).absorbed(layer, message)


RULES: dict[str, tuple[lrp.Rule, str]] = {
    "the denominator is detached": (Detached(), "exact_derivatives"),
    "the bias is forgotten": (Forgetful(), "conservation"),
    "the sign is dropped at zero": (Signless(), "conservation"),
    "it is written as an autograd.Function": (Handwritten(), "exact_derivatives"),
    "the form of a message is confused": (Confused(), "conservation"),
    "the weights are changed in place": (Overwriting(), "pure"),
    "negative relevance is dropped": (Rectified(), "linear_in_relevance"),
    "relevance is spread over the batch": (Spread(), "samples_apart"),
    "the stabilizer is scaled by the batch": (Scaled(False), "samples_apart"),
    "the sign is that of the batch": (Scaled(True), "samples_apart"),
    "strided convolutions are wrong": (Unless(strided), "conservation"),
    "strided transposed convolutions are wrong": (Unless(transposed), "conservation"),
    "it is wrong under vmap": (Unless(mapped_over), "vmap_equals_loop"),
    "the rule changes itself": (Noting(), "pure"),
}
"""What is wrong, and one of the properties that must fail."""


# --------------------------------------------------------------------------------------------------------------
# The library, broken


Break = Callable[[pytest.MonkeyPatch], None]


def fold_across_branches(patch: pytest.MonkeyPatch) -> None:
    """A batch norm is merged with the layer before it whoever else uses that, and everybody gets the merged weights."""
    right = cover.Cover._merged_affines

    def wrong(covered: Any) -> dict[Any, Affine]:
        affines = right(covered)
        for node, found in list(affines.items()):
            folded = next((u for u in node.users if u.target is batch_norm_eval), None)
            if folded is not None and not found.norm:
                affines[node] = _Folded(found, folded)
        return affines

    patch.setattr(cover.Cover, "_merged_affines", wrong)


class _Folded(Affine):
    """An affine layer with the weights of the batch norm behind it."""

    def __init__(self, found: Affine, batch_norm: Any) -> None:
        vars(self).update(vars(found), folded=batch_norm)

    def parameters(self, values: Any) -> Any:
        return replace(_plain(self), norm=(vars(self)["folded"],)).parameters(values)


def _plain(affine: Affine) -> Affine:
    return Affine(**{name: getattr(affine, name) for name in Affine.__dataclass_fields__})


def everything_is_nonnegative(patch: pytest.MonkeyPatch) -> None:
    """Rules leave out the branch for negative inputs everywhere."""
    patch.setattr(cover, "nonnegative", lambda program: set(program.graph.nodes))


def last_message_wins(patch: pytest.MonkeyPatch) -> None:
    """Where two paths meet, the walk keeps one of the messages."""
    patch.setattr(propagate, "add", lambda messages, activation: list(messages)[-1])


def quotients_are_detached(patch: pytest.MonkeyPatch) -> None:
    """A relevance becomes a multiplier with a constant denominator."""
    patch.setattr(_message, "divide", lambda numerator, denominator: divide(numerator, denominator.detach()))


LIBRARY: dict[str, tuple[Break, str]] = {
    "a batch norm is folded across a branch": (fold_across_branches, "conservation"),
    "every input is taken to be non-negative": (everything_is_nonnegative, "conservation"),
    "one of two messages is lost": (last_message_wins, "gradient_equivalence"),
    "a conversion is detached": (quotients_are_detached, "exact_derivatives"),
}
"""What is wrong, and the property that must fail."""
