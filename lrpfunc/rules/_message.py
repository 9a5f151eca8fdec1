"""What travels along the edges of a model: relevance, or the multiplier that stands for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, Protocol, TypeGuard, final

import torch
from torch import Tensor

from lrpfunc.rules._pytree import Parametric

Form = Literal["relevance", "multiplier", "either"]


class Message(Protocol):
    """Relevance of a tensor, in one of two forms; both have the shape of the tensor, the *activation*."""

    @property
    def value(self) -> Tensor: ...

    def relevance(self, activation: Tensor) -> Tensor: ...

    def multiplier(self, activation: Tensor) -> Tensor: ...

    def unconvertible(self, activation: Tensor) -> Tensor: ...


@final
@dataclass(frozen=True)
class Relevance:
    """The relevance itself."""

    value: Tensor

    def relevance(self, activation: Tensor) -> Tensor:
        return self.value

    def multiplier(self, activation: Tensor) -> Tensor:
        return divide(self.value, activation)

    def unconvertible(self, activation: Tensor) -> Tensor:
        """What a multiplier cannot say: relevance where the activation is zero."""
        return torch.where(activation == 0, self.value, 0)


@final
@dataclass(frozen=True)
class Multiplier:
    """A tensor `m` that stands for the relevance `activation * m`."""

    value: Tensor

    def relevance(self, activation: Tensor) -> Tensor:
        return carried(activation) * self.value

    def multiplier(self, activation: Tensor) -> Tensor:
        return self.value

    def unconvertible(self, activation: Tensor) -> Tensor:
        return torch.zeros_like(self.value)


def is_message(value: object) -> TypeGuard[Relevance | Multiplier]:
    """Whether it is one of the two forms, and holds a tensor."""
    return isinstance(value, (Relevance, Multiplier)) and isinstance(value.value, Tensor)


def carried(activation: Tensor) -> Tensor:
    """The activation that relevance can belong to: an infinite one, of a mask, carries nothing.

    Masking by a multiplier of zero instead would lose the derivative with respect to the multiplier there.
    """
    return torch.where(activation.isinf(), 0, activation)


def add(messages: Iterable[Message], activation: Tensor) -> Message:
    """Adds messages that meet at one activation, in their common form if they have one."""
    messages = list(messages)
    if all(isinstance(message, Multiplier) for message in messages):
        return Multiplier(reduce(torch.add, (message.value for message in messages)))
    return Relevance(reduce(torch.add, (message.relevance(activation) for message in messages)))


def in_form(messages: Sequence[Message | None], activations: Sequence[Tensor], form: Form) -> tuple[Message, ...]:
    """The messages at several activations in one form, zeros where none came.

    In either form they stay multipliers if all of them are, and are relevance otherwise.
    """
    if form == "either":
        form = "relevance" if any(isinstance(message, Relevance) for message in messages) else "multiplier"
    cls = Relevance if form == "relevance" else Multiplier
    return tuple(
        cls(torch.zeros_like(a)) if message is None else cls(getattr(message, form)(a))
        for message, a in zip(messages, activations, strict=True)
    )


def scale(factor: float | Tensor, message: Message) -> Message:
    """The message of `factor` times the relevance."""
    return type(message)(factor * message.value)  # type: ignore[call-arg]


def divide(numerator: Tensor, denominator: Tensor, *, nonzero: bool = False) -> Tensor:
    """`numerator / denominator`, and 0 with finite derivatives where the denominator is 0, if it may be.

    Half-precision quotients are computed in float32 and returned, finite, in the numerator's dtype.
    """
    dtype = numerator.dtype
    if dtype in (torch.float16, torch.bfloat16):
        numerator, denominator = numerator.float(), denominator.float()
    if nonzero:
        quotient = numerator / denominator
    else:
        zero = denominator == 0
        quotient = torch.where(zero, 0, numerator / torch.where(zero, 1, denominator))
    if dtype is torch.float16:
        quotient = quotient.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return quotient.to(dtype)


@final
@dataclass(frozen=True, eq=False)
class Stabilizer(Parametric):
    r"""Keeps a denominator away from zero.

    .. math:: \operatorname{stab}(z) = z + \operatorname{sign}(z)\,\epsilon, \qquad \operatorname{sign}(0) = 1

    Every rule that divides takes one, or the number `epsilon` in its place. Half-precision tensors are stabilized in
    float32, where `epsilon` does not vanish; with `epsilon = 0` the rules read `x / 0` as 0. Like a rule, it is a
    pytree of the tensors inside.

    Args:
        epsilon: What is added to the magnitude. A tensor may be vmapped over or differentiated.
        clip: Raise the magnitude to at least `epsilon` instead, :math:`\operatorname{sign}(z) \max(|z|, \epsilon)`.
        norm_scale: Scale `epsilon` by the root mean square of `z` over all dimensions but the first, the batch.

    Returns:
        Called with a tensor, the stabilized tensor of the same shape; `sign=1` says that nothing in it is negative.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> lrp.Stabilizer(0.5)(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-1.5000,  0.5000,  2.5000])
        >>> lrp.Stabilizer(0.5, clip=True)(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-1.0000,  0.5000,  2.0000])
    """

    epsilon: float | Tensor = 1e-6
    clip: bool = False
    norm_scale: bool = False

    def __call__(self, z: Tensor, *, sign: int = 0) -> Tensor:
        if z.dtype in (torch.float16, torch.bfloat16):
            z = z.float()
        epsilon = self.epsilon
        if self.norm_scale:
            dims = tuple(range(1, z.ndim)) if z.ndim > 1 else tuple(range(z.ndim))
            mean = z.square().mean(dims, keepdim=True)
            zero = mean == 0  # where the square root has no derivative
            epsilon = epsilon * torch.where(zero, 0, torch.where(zero, 1, mean).sqrt())
        if self.clip:
            return _sign(z) * z.abs().clamp(min=epsilon)
        if sign > 0:
            return z + epsilon
        if isinstance(epsilon, Tensor):
            return z + (epsilon * _sign(z)).to(z.dtype)
        return torch.add(z, _sign(z), alpha=epsilon)

    def is_positive(self, dtype: torch.dtype) -> bool:
        """Whether it keeps every denominator of that dtype from zero."""
        least = torch.finfo(torch.promote_types(dtype, torch.float32)).tiny
        return isinstance(self.epsilon, (int, float)) and self.epsilon >= least and not self.norm_scale


def _sign(z: Tensor) -> Tensor:
    """1 or -1 for each element, and 1 at 0; on a CPU a tenth of what `torch.where` takes where signs are mixed."""
    return (z.detach().sign() + 0.5).sign()


def as_stabilizer(value: float | Tensor | Stabilizer) -> Stabilizer:
    return value if isinstance(value, Stabilizer) else Stabilizer(value)
