"""From a `torch.nn.Module` to a pure function of its parameters and inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from lrpfunc._capture.markers import current_recorder
from lrpfunc._capture.refused import check_module
from lrpfunc._errors import InputError


def structural_copy(module: nn.Module) -> nn.Module:
    """A copy with modules and containers of its own that shares every tensor and every other value.

    Calling a module with other parameters swaps them in place for a moment. That must never be seen by another
    thread, so it is done to a copy.
    """
    shared: dict[int, Any] = {}
    pending: list[Any] = list(module.modules())
    visited = {id(m) for m in pending}
    while pending:
        obj = pending.pop()
        if isinstance(obj, nn.Module):
            children = list(vars(obj).values())
        else:
            children = list(obj.values()) if isinstance(obj, dict) else list(iter(obj))  # without its length
        for child in children:
            if id(child) in visited:
                continue
            visited.add(id(child))
            if isinstance(child, (dict, list, tuple, set, frozenset, nn.Module)):
                pending.append(child)
            elif not callable(getattr(child, "__func__", None)):  # bound methods follow their copied module
                shared[id(child)] = child
    # What `fx` makes is otherwise compiled anew, from a graph that is then told that it belongs to the copy.
    graphs = [obj for obj in module.modules() if isinstance(obj, fx.GraphModule)]
    shared |= {id(obj): object.__new__(type(obj)) for obj in graphs}
    for obj in graphs:
        vars(shared[id(obj)]).update(copy.deepcopy(vars(obj), shared))
    return copy.deepcopy(module, shared)


@final
@dataclass(frozen=True)
class ModelFunction:
    """The pure function that `from_module` returns."""

    module: nn.Module
    output: Callable[[Any], Any] | None = None
    return_buffers: bool = False

    def __repr__(self) -> str:
        return f"ModelFunction({type(self.module).__name__})"

    def __call__(self, params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        module = structural_copy(self.module)
        if recorder := current_recorder():
            recorder.watch(module)
        # A module may assign a buffer, which then is in the dictionary, or update it in place, which needs a copy.
        state = dict(params)
        names = [name for name, _ in module.named_buffers() if name in params] if self.return_buffers else []
        state |= {name: params[name].clone() for name in names}
        output = self._explained(functional_call(module, state, args, kwargs))
        return (output, {name: state[name] for name in names}) if self.return_buffers else output

    def _explained(self, output: Any) -> Any:
        return output if self.output is None else self.output(output)


def from_module(
    module: nn.Module,
    *,
    output: Callable[[Any], Any] | None = None,
    return_buffers: bool = False,
    frozen: bool = False,
) -> tuple[ModelFunction, dict[str, Tensor]]:
    """A pure function `model_fn(params, *args, **kwargs)` and the parameters to call it with.

    The module is never touched: it is copied structurally for each call, and its own tensors are shared. A change
    of the module (`eval()`, a replaced submodule or attribute) is seen at the next call.

    Args:
        module: The module to explain.
        output: Picks what is explained from the module's output, for example `lambda out: out.logits`.
        return_buffers: Return `(output, buffers)`, with the buffers as the forward pass leaves them, so that the
            running statistics of a batch norm in training mode can go on learning. Use it with `has_aux=True`.
        frozen: Give the parameters without `requires_grad`, if nobody is to differentiate with respect to them. Else
            relevance keeps what that needs, as every result of a module with parameters does: several times the memory.

    Returns:
        The function, and a dictionary from names, as in `module.named_parameters()`, to the live floating-point
        parameters and buffers, detached if they are `frozen`. Buffers of other types are read from the module at each
        call; with `return_buffers=True` they are part of the dictionary too.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> model_fn, params = lrp.from_module(torch.nn.Linear(3, 2))
        >>> model_fn(params, torch.ones(1, 3)).shape
        torch.Size([1, 2])
        >>> sorted(params)
        ['bias', 'weight']

    Raises:
        InputError: If the parameters are not in the module when it is called, as in one that is distributed or lazy.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"from_module takes a torch.nn.Module, not {type(module).__name__}. A plain function f(params, x) needs "
            "no conversion: write lrpfunc.attribute(f)(params, x)"
        )
    check_module(module)
    params: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    params |= {name: b for name, b in module.named_buffers() if return_buffers or b.is_floating_point()}
    if frozen:
        params = {name: tensor.detach() for name, tensor in params.items()}
    return ModelFunction(module, output, return_buffers), params


def update_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Writes the buffers that a forward pass has left behind into the module: its running statistics go on learning.

    Args:
        module: The module, whose buffers are written to in place.
        buffers: The auxiliary output of a function that `from_module(module, return_buffers=True)` made.

    Raises:
        InputError: If the module has no such buffers.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> norm = torch.nn.BatchNorm1d(2).train()
        >>> model_fn, params = lrp.from_module(norm, return_buffers=True)
        >>> fn = lrp.attribute(model_fn, lrp.epsilon(), has_aux=True)
        >>> relevance, buffers = fn(params, torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> lrp.update_buffers(norm, buffers)
        >>> norm.running_mean
        tensor([0.2000, 0.0000])
    """
    own = dict(module.named_buffers())
    if unknown := sorted(buffers.keys() - own.keys()):
        raise InputError(
            f"{type(module).__name__} has no buffer {unknown[0]!r}: it has {', '.join(own) or 'none'}. Give the "
            "buffers that belong to this very module, and not to one that contains it"
        )
    if wrong := [name for name, value in buffers.items() if value.shape != own[name].shape]:
        raise InputError(
            f"the buffer {wrong[0]!r} has shape {tuple(own[wrong[0]].shape)}, and is given one of shape "
            f"{tuple(buffers[wrong[0]].shape)}, as by vmap over several forward passes: pick one of them"
        )
    with torch.no_grad():
        for name, value in buffers.items():
            own[name].copy_(value)
