"""A relevance function inside torch.compile: one operation of Dynamo's graph, which the compiler then sees through.

Dynamo cannot follow how a model function is captured. What it may put into its graph as a whole takes tensors, numbers
and plain containers of them, and returns tensors; the rest of a call goes past it, by a name and a description.

This module is imported while Dynamo traces a call, as Dynamo runs `import` statements for real: its decorators import
`torch._dynamo`, which takes longer than `import torch`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lrpfunc._api.target import At, Contrast, Made, OneHot
from lrpfunc._capture.environment import Environment
from lrpfunc._capture.identity import identity
from lrpfunc._capture.isolation import surroundings
from lrpfunc._errors import CaptureError
from lrpfunc._torch import install_guard, is_constant, version_of


class Function(Protocol):
    """What can be called inside torch.compile."""

    @property
    def reads(self) -> tuple[Any, ...]: ...

    @property
    def bound_tensors(self) -> Sequence[Tensor]: ...

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Any: ...

    def value(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


_functions: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_results: dict[str, Any] = {}


def call_in_graph(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Any:
    """`function.run(args, kwargs, target)`, as Dynamo traces it."""
    handle = _guarded(function)
    if _is_function(target):
        # Dynamo follows the target itself; what the graph then has of the forward pass twice, the compiler merges.
        outputs = _value(handle, args, kwargs)
        target = ("relevance", target(_rebuilt(_shape(handle), outputs)))
    elif isinstance(target, Made):
        target = _encoded(target)
    results = _run(handle, args, kwargs, target)
    return _rebuilt(_shape(handle), results)


@torch.compiler.disable(reason="lrpfunc makes a function here, and a graph returns tensors")
def call_outside(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`function(*args, **kwargs)`, around which Dynamo breaks its graph."""
    return function(*args, **kwargs)


@torch.compiler.assume_constant_result
def _guarded(function: Function) -> str:
    """The name of `function` in graphs, for as long as nothing that it reads has changed; then it is traced again.

    Dynamo runs this for real, and guards that `function` is the same object. A name is a string because a number would
    be taken for one that may change.
    """
    handle = str(identity(function))
    _functions[handle] = function
    install_guard(function, _state, "something that the model function or a rule reads has changed")
    return handle


def _state(function: Function) -> Hashable:
    """What of the function and its surroundings is part of compiled code.

    Some of the tensors that it closes over are constants there. One that is replaced or written to is another constant.
    Others may change, as a module's own parameters do that are given as an argument.
    """
    environment = Environment(*function.reads, transformed=True)
    closed = [tensor if is_constant(tensor) else None for tensor in environment.tensors]
    constants = [t if t is None else (identity(t), version_of(t)) for t in (*closed, *function.bound_tensors)]
    return environment.key, tuple(constants), *surroundings()


@torch.compiler.allow_in_graph
def _run(handle: str, args: Any, kwargs: Any, target: Any) -> tuple[Tensor, ...]:
    return _flat(handle, _functions[handle].run(_plain(args), _plain(kwargs), _decoded(target)))


@torch.compiler.allow_in_graph
def _value(handle: str, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    return _flat(handle, _functions[handle].value(_plain(args), _plain(kwargs)))


def _is_function(target: Any) -> bool:
    if isinstance(target, At):
        return _is_function(target.index)
    return callable(target) and not isinstance(target, (Tensor, OneHot, Contrast))


def _encoded(target: Any) -> Any:
    if isinstance(target, OneHot):
        return ("one_hot", target.index, target.value)
    if isinstance(target, Contrast):
        return ("contrast", target.plus, target.minus)
    return ("at", target.position, _encoded(target.index)) if isinstance(target, At) else target


def _decoded(target: Any) -> Any:
    match target := _plain(target):
        case ("one_hot", index, value):
            return OneHot(index, value)
        case ("contrast", plus, minus):
            return Contrast(plus, minus)
        case ("at", position, index):
            return At(position, _decoded(index))
        case ("relevance", relevance):
            return lambda _: relevance
    return target


def _plain(value: Any) -> Any:
    """Containers of a graph, which refuse to be changed, as ordinary ones, and numbers as they are in this call."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) is tuple or isinstance(value, list):
        return (tuple if isinstance(value, tuple) else list)(map(_plain, value))
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return int(value) if isinstance(value, torch.SymInt) else float(value)
    return value


# --------------------------------------------------------------------------------------------------------------
# What comes back: the tensors through the graph, and how they stood together as a constant


def _flat(handle: str, result: Any) -> tuple[Tensor, ...]:
    tensors: list[Tensor] = []
    if handle not in _results:
        weakref.finalize(_functions[handle], _results.pop, handle, None)
    _results[handle] = _described(result, tensors)
    return tuple(tensors)


def _described(result: Any, tensors: list[Tensor]) -> tuple[Any, ...]:
    if isinstance(result, Tensor):
        tensors.append(result)
        return ("tensor", len(tensors) - 1)
    if isinstance(result, dict):
        return ("dict", tuple(result), tuple(_described(item, tensors) for item in result.values()))
    if type(result) in (list, tuple):
        return (type(result).__name__, tuple(_described(item, tensors) for item in result))
    if result is None or isinstance(result, (int, float, str)):
        return ("constant", result)
    raise CaptureError(
        f"a compiled relevance function cannot return {type(result).__name__}, which the model function takes or "
        "returns: use tuples, lists and dicts, for example\n\n"
        "    model_fn, params = lrpfunc.from_module(module, output=lambda out: out.logits)"
    )


@torch.compiler.assume_constant_result
def _shape(handle: str) -> Any:
    return _results[handle]


def _rebuilt(shape: Any, tensors: tuple[Tensor, ...]) -> Any:
    kind = shape[0]
    if kind == "tensor":
        return tensors[shape[1]]
    if kind == "constant":
        return shape[1]
    if kind == "dict":
        return {key: _rebuilt(item, tensors) for key, item in zip(shape[1], shape[2], strict=True)}
    items = [_rebuilt(item, tensors) for item in shape[1]]
    return tuple(items) if kind == "tuple" else items
