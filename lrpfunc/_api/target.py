"""Where in the output relevance starts."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, final

import torch
from torch import Tensor

from lrpfunc import _tree as tree
from lrpfunc._errors import TargetError
from lrpfunc.rules._equality import Description
from lrpfunc.rules._message import Message, Multiplier, Relevance


class Array(Protocol):
    """An array of NumPy's, which may not be installed."""

    def __array__(self) -> Any: ...


Index = int | Tensor | Sequence[int] | Array
Target = Index | Callable[[Any], Any] | None


@final
@dataclass(frozen=True, eq=False)
class OneHot(Description):
    """A target that `one_hot` makes."""

    index: int | Tensor
    value: float | Tensor | None = None

    def start(self, output: Tensor) -> Message:
        mask = _indicator(output, self.index)
        if self.value is None:
            return Multiplier(mask)
        return Relevance(mask * (_for_samples(self.value, output) if isinstance(self.value, Tensor) else self.value))

    def __call__(self, output: Tensor) -> Tensor:
        return self.start(output).relevance(output)


@final
@dataclass(frozen=True, eq=False)
class Contrast(Description):
    """A target that `contrast` makes."""

    plus: int | Tensor
    minus: int | Tensor

    def start(self, output: Tensor) -> Message:
        return Multiplier(_indicator(output, self.plus) - _indicator(output, self.minus))

    def __call__(self, output: Tensor) -> Tensor:
        return self.start(output).relevance(output)


@final
@dataclass(frozen=True, eq=False)
class At(Description):
    """A target that `at` makes."""

    position: int | Tensor
    index: Any

    def start(self, output: Tensor) -> Message:
        if output.ndim < 2:
            raise TargetError(
                f"lrpfunc.at(position={self.position!r}, ...) takes an output of shape (N, positions, classes), not of "
                f"shape {tuple(output.shape)}: write target={self.index!r}"
            )
        place = _indicator(output[..., 0], self.position, "positions")
        there = torch.where(place.unsqueeze(-1) == 1, output, 0).sum(-2)
        (message,) = start(self.index, there)
        return type(message)(place.unsqueeze(-1) * message.value.unsqueeze(-2))  # type: ignore[call-arg]

    def __call__(self, output: Tensor) -> Tensor:
        return self.start(output).relevance(output)


Made = OneHot, Contrast, At
"""Targets that functions of lrpfunc make."""


def one_hot(target: Index, value: float | Tensor | None = None) -> OneHot:
    """Relevance starts at one output, with the logit there or with a constant.

    Args:
        target: The index on the last axis, as for `target=`.
        value: What to start with: a number, or a tensor with one for each sample, of shape `(N,)`; `None` is the logit.

    Returns:
        A target. Called with an output of shape `(N, C)` or `(C,)` it gives the starting relevance, of that shape.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> lrp.one_hot(1, value=1.0)(torch.tensor([[3.0, 5.0]]))
        tensor([[0., 1.]])
    """
    return OneHot(plain(target), value)


def contrast(plus: Index, minus: Index) -> Contrast:
    """What speaks for one output rather than another: `+logit` at `plus`, `-logit` at `minus`.

    Args:
        plus: An index on the last axis, as for `target=`.
        minus: Another one.

    Returns:
        A target. Called with an output of shape `(N, C)` or `(C,)` it gives the starting relevance, of that shape.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> lrp.contrast(1, 0)(torch.tensor([[3.0, 5.0]]))
        tensor([[-3.,  5.]])
    """
    return Contrast(plain(plus), plain(minus))


def at(position: Index, index: Target) -> At:
    """Relevance starts at one position of a sequence, for logits of shape `(N, positions, classes)`.

    Args:
        position: Which position, negative from the end; a tensor has one for each sample, of shape `(N,)`.
        index: A target for the logits of shape `(N, classes)` at that position.

    Returns:
        A target. Called with an output of shape `(N, positions, classes)` it gives the starting relevance.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> lrp.at(position=-1, index=2)(torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]))
        tensor([[[0., 0., 0.],
                 [0., 0., 6.]]])
        >>> lrp.at(position=0, index=lrp.predicted)(torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]))
        tensor([[[0., 0., 3.],
                 [0., 0., 0.]]])
    """
    return At(plain(position), plain(index))


def predicted(output: Tensor) -> Tensor:
    """A target: for each sample the class with the largest logit.

    Args:
        output: Logits of shape `(N, C)` or `(C,)`.

    Returns:
        The indices, on the last axis.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, lrp.epsilon())
        >>> relevance_fn(torch.eye(2), torch.tensor([[1.0, 3.0]]), target=lrp.predicted)
        tensor([[0.0000, 3.0000]])
    """
    return output.argmax(-1)


def plain(target: Any) -> Any:
    """A list of integers, or an array of NumPy's, as the tensor that it stands for; any other target as it is."""
    numpy = sys.modules.get("numpy")  # who has an array has imported it
    if numpy is not None and isinstance(target, numpy.ndarray):
        return torch.as_tensor(target)
    is_index = isinstance(target, (list, tuple)) and len(target) > 0 and all(map(_is_index, target))
    return torch.tensor([operator.index(index) for index in target]) if is_index else target


def _is_index(target: Any) -> bool:
    return hasattr(target, "__index__") and not isinstance(target, (bool, Tensor))


def form(target: Any) -> type[Relevance] | type[Multiplier]:
    """The form of the messages that `start` gives."""
    if isinstance(target, OneHot):
        return Multiplier if target.value is None else Relevance
    if isinstance(target, At):
        return form(target.index)
    if isinstance(target, Tensor) and target.is_floating_point():
        return Relevance
    return Relevance if callable(target) and not isinstance(target, (Contrast, Tensor)) else Multiplier


def tensors_of(target: Any) -> list[Tensor]:
    """The tensors that the target is made of."""
    if isinstance(target, Made):
        return [tensor for field in fields(target) for tensor in tensors_of(getattr(target, field.name))]
    return [target] if isinstance(target, Tensor) else []


def start(target: Any, output: Any) -> list[Message]:
    """The messages at the tensors of the output."""
    leaves, spec = tree.flatten(output)
    if target is None:
        return [Multiplier(torch.ones_like(leaf)) for leaf in leaves if isinstance(leaf, Tensor)]
    if isinstance(target, At):
        return [target.start(_tensor(leaves, target))]
    if isinstance(target, (OneHot, Contrast)):
        return [target.start(_single(leaves, target))]
    if _is_index(target):
        return [OneHot(operator.index(target)).start(_single(leaves, target))]
    if isinstance(target, Tensor) and not target.is_floating_point():
        return [OneHot(target).start(_single(leaves, target))]
    if not callable(target):
        return relevances(target, leaves, spec)
    value = plain(target(output))
    if _is_index(value) or (isinstance(value, Tensor) and not value.is_floating_point()):
        (message,) = start(value, output)
        return [Relevance(message.relevance(_single(leaves, value)))]
    return relevances(value, leaves, spec)


def relevances(value: Any, leaves: list[Any], spec: Any) -> list[Message]:
    """A pytree of starting relevance, checked against the output it is for."""
    given, given_spec = tree.flatten(value)
    if given_spec != spec:
        raise TargetError(
            f"the starting relevance has the structure {given_spec}, the output has {spec}: give one tensor for each "
            "tensor of the output, in the same containers"
        )
    messages: list[Message] = []
    for relevance, leaf in zip(given, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            continue
        if not isinstance(relevance, Tensor) or not relevance.is_floating_point():
            described = f"a {relevance.dtype} tensor" if isinstance(relevance, Tensor) else repr(relevance)
            raise TargetError(
                f"the starting relevance must be a floating-point tensor, not {described}. A target is an integer, a "
                "tensor of integers, a floating-point tensor like the output, or a function from the output to one"
            )
        if relevance.shape != leaf.shape:
            raise TargetError(
                f"the starting relevance has shape {tuple(relevance.shape)}, the output {tuple(leaf.shape)}. Relevance "
                "starts at each element of the output: write, for example, target=lambda out: relevance.expand_as(out)"
            )
        if relevance.device != leaf.device:
            raise TargetError(
                f"the starting relevance is on {relevance.device}, the output on {leaf.device}: make it there, for "
                "example with device=x.device"
            )
        messages.append(Relevance(relevance.to(leaf.dtype)))
    return messages


def _tensor(leaves: list[Any], target: Any) -> Tensor:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if len(leaves) == 1 and len(tensors) == 1:
        return tensors[0]
    shapes = [tuple(leaf.shape) for leaf in tensors]
    raise TargetError(
        f"target={target!r} indexes an output that is one tensor, but the output has {len(leaves)} leaves, of shapes "
        f"{shapes}. Pick one of them, for example\n\n"
        "    model_fn, params = lrpfunc.from_module(module, output=lambda out: out.logits)"
    )


def _single(leaves: list[Any], target: Any) -> Tensor:
    output = _tensor(leaves, target)
    if output.ndim in (1, 2):
        return output
    shown = "lrpfunc.predicted" if isinstance(target, Tensor) and target.ndim > 0 else repr(target)
    raise TargetError(
        f"target={target!r} indexes the last axis of an output of 1 or 2 dimensions, but the output has shape "
        f"{tuple(output.shape)}. For one position of a sequence, whose logits have shape (N, positions, classes), or "
        "with a function for any other start, write\n\n"
        f"    target=lrpfunc.at(position=-1, index={shown})\n"
        "    target=lambda out: torch.zeros_like(out).index_fill(1, torch.tensor([3]), 1) * out"
    )


def _for_samples(value: Tensor, output: Tensor) -> Tensor:
    """A value, or one a sample, so that it multiplies an output."""
    if value.ndim > 0 and value.shape != output.shape[:-1]:
        raise TargetError(
            f"value has shape {tuple(value.shape)}, but an output of shape {tuple(output.shape)} takes a single number"
            + (f", or one a sample, of shape {tuple(output.shape[:-1])}" if output.ndim > 1 else "")
            + ". For relevance shaped like the output, pass it as the target itself"
        )
    return value.to(device=output.device, dtype=output.dtype).unsqueeze(-1)


def _indicator(output: Tensor, index: int | Tensor, noun: str = "classes") -> Tensor:
    """1 at the index on the last axis, 0 elsewhere, shaped like the output."""
    classes = output.shape[-1]
    batch = output.shape[:-1]
    if isinstance(index, Tensor) and (index.is_floating_point() or index.is_complex() or index.dtype is torch.bool):
        raise TargetError(f"an index must be an integer, not a tensor of {index.dtype}: write target.long()")
    if not isinstance(index, (Tensor, int)) or isinstance(index, bool):
        raise TargetError(f"an index must be an integer, not {index!r}")
    if not isinstance(index, Tensor):
        if not -classes <= index < classes:
            raise TargetError(
                f"target={index} is out of range for an output of shape {tuple(output.shape)} with {classes} {noun}: "
                f"use an index from {-classes} to {classes - 1}"
            )
        index = torch.tensor(index % classes, device=output.device)
    elif index.ndim > 0 and index.shape != batch:
        raise TargetError(
            f"target has shape {tuple(index.shape)}, but an output of shape {tuple(output.shape)} takes a single index "
            + (f"or one a sample, of shape {tuple(batch)}" if batch else "only; to try several, use torch.vmap")
        )
    index = index.to(device=output.device, dtype=torch.int64)
    index = torch.where(index < 0, index + classes, index).expand(batch).unsqueeze(-1)
    # `scatter` checks its bounds; comparing with arange would silently give zero.
    try:
        return torch.zeros_like(output).scatter(-1, index, torch.ones_like(output[..., :1]))
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        raise TargetError(
            f"the target tensor has an index out of range for an output of shape {tuple(output.shape)} with {classes} "
            f"{noun}: use indices from {-classes} to {classes - 1}"
        ) from error
