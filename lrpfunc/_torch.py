"""What lrpfunc uses of torch that torch does not type or export, in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.fx.node import map_arg as map_arg

P = ParamSpec("P")
T = TypeVar("T")


def hashable(value: Any) -> Any:
    """The arguments of a node as a dictionary's key."""
    if isinstance(value, (list, tuple)):
        return tuple(map(hashable, value))
    if isinstance(value, dict):
        return tuple((key, hashable(item)) for key, item in value.items())
    return value if isinstance(value, fx.Node) else (type(value), repr(value))  # 1, 1.0 and True are not the same


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, around which torch.compile breaks its graph."""
    return torch.compiler.disable(function)  # pyright: ignore


def constant(tensors: Iterable[Any]) -> list[Any]:
    """Tensors that are no inputs; a compiler that traces the call takes them for constants."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    lift = torch.ops.aten.lift_fresh_copy
    return [lift(value) if type(value) in (Tensor, torch.nn.Parameter) else value for value in tensors]


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a torch.func transform that is running has wrapped the tensor."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.is_functorch_wrapped_tensor(tensor)


def is_differentiated(tensor: Any) -> bool:
    """Whether somebody may take derivatives with respect to `tensor`, by torch.func or by autograd."""
    if not isinstance(tensor, Tensor):  # a random generator
        return False
    return is_wrapped(tensor) or (tensor.requires_grad and torch.is_grad_enabled()) or _has_tangent(tensor)


def beyond_first_derivative(tensor: Tensor) -> bool:
    """Whether `tensor` is under several derivatives, a forward derivative or a `vmap`."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if _has_tangent(tensor):
        return True
    levels = 0
    while functorch.is_functorch_wrapped_tensor(tensor):
        if not functorch.is_gradtrackingtensor(tensor):
            return True
        levels += 1
        tensor = functorch.get_unwrapped(tensor)
    return levels + tensor.requires_grad > 1


def mapped_over(tensor: Tensor) -> frozenset[int] | None:
    """The levels of `vmap` that a tensor is mapped over; `None` if somebody may take derivatives of it."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    levels: set[int] = set()
    while functorch.is_functorch_wrapped_tensor(tensor):
        if not functorch.is_batchedtensor(tensor):
            return None
        levels.add(functorch.maybe_get_level(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return None if is_differentiated(tensor) else frozenset(levels)


def unmapped(tensor: Tensor) -> Tensor | None:
    """All that a tensor stands for inside of `vmap`, mapped dimensions first; `None` if that is not how it lies."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_functorch_wrapped_tensor(tensor):
        if not functorch.is_batchedtensor(tensor) or functorch.maybe_get_bdim(tensor) != 0:
            return None
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _has_tangent(tensor: Tensor) -> bool:
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def inside_transform() -> bool:
    """Whether a torch.func transform is running in this thread."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None


def outside_transforms() -> contextlib.AbstractContextManager[Any]:
    """Runs what is in it as if none of them were."""
    return temporarily_clear_interpreter_stack()


def grad_level() -> int:
    """How many `grad`, `vjp` and the like are running in this thread; others have no grad mode of their own."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    stack = functorch.get_interpreter_stack() or ()
    return sum(interpreter.key() == functorch.TransformType.Grad for interpreter in stack)


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp` without an auxiliary output."""
    output, pullback, *_ = torch.func.vjp(function, *primals)
    return output, pullback


def jvp(function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """The derivative in a direction, as the VJP of the VJP: more operations have that than forward derivatives."""
    output, pullback = vjp(function, *primals)
    cotangent = pytree.tree_map(torch.zeros_like, output)
    return vjp(pullback, cotangent)[1](tangents)[0]
