"""Modules and tensors that cannot be taken as they are, and what to write instead."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lrpfunc._errors import InputError


def check_module(module: nn.Module) -> None:
    """Refuses a module whose forward is not Python, or whose parameters are somewhere else when it is called."""
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            f"{name} is a module of TorchScript, whose forward pass takes no other parameters than its own. Make the "
            "function of the module that it was made from:\n\n    model_fn, params = lrpfunc.from_module(original)"
        )
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(
            f"{name} copies its module to several devices, and its forward pass takes no other parameters than its "
            "own. Make the function of the module inside:\n\n"
            "    model_fn, params = lrpfunc.from_module(model.module)"
        )
    for path, parameter in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(parameter):
            raise InputError(
                f"`{path}` of {name} has no shape yet, as its module is lazy: it gets one from the first input. Run "
                "the module once, and then make the function:\n\n    module(x)"
            )
        if type(parameter).__name__ == "DTensor":
            raise InputError(
                f"`{path}` of {name} is a DTensor, of which every process holds a part, as fully_shard and "
                "distribute_tensor leave it. Load all of it into a module that is not distributed:\n\n"
                "    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}\n"
                "    module.load_state_dict(whole)\n"
                "    model_fn, params = lrpfunc.from_module(module)"
            )
    for path, child in module.named_modules():
        where = f"`{path}` of {name}" if path else name
        if type(child).__name__ == "FullyShardedDataParallel":
            raise InputError(
                f"{where} is FullyShardedDataParallel, of whose parameters every process holds a part. Load all of "
                "them into a module that is not distributed, and make the function of that:\n\n"
                "    model_fn, params = lrpfunc.from_module(module)"
            )
        if hasattr(child, "_hf_hook"):
            raise InputError(
                f"{where} has a hook of accelerate, which moves parameters while the module runs, as device_map does. "
                "Load the model without device_map, or remove the hooks:\n\n"
                "    accelerate.hooks.remove_hook_from_submodules(model)"
            )


def check_tensor(tensor: Tensor) -> None:
    """Refuses a tensor that is none of shape, strides and numbers."""
    if tensor.is_nested:
        raise InputError(
            "an argument has a nested tensor, whose rows have shapes of their own: give it padded, for example "
            "torch.nested.to_padded_tensor(x, 0.0), with a mask where the model takes one"
        )
    if tensor.layout is not torch.strided:
        raise InputError(
            f"an argument has a tensor of layout {tensor.layout}, which cannot be traced: pass tensor.to_dense()"
        )
    if type(tensor).__name__ == "MaskedTensor":
        raise InputError(
            "an argument has a MaskedTensor, for which most operations of a model are not defined: pass "
            "x.to_tensor(0.0), or x.get_data() and its mask by themselves"
        )
    if type(tensor).__name__ == "DTensor":
        raise InputError("an argument has a DTensor, of which every process holds a part: pass x.full_tensor()")


@functools.lru_cache(4096)
def check_tensor_type(kind: type) -> None:
    """Refuses tensors that do otherwise than torch's: a trace sees plain ones in their place."""
    if kind.__module__.partition(".")[0] in ("torch", "torchvision"):
        return
    plain = (Tensor, nn.Parameter)  # whose subclasses have none of their own
    changed = [
        name
        for name in ("__torch_function__", "__torch_dispatch__")
        if all(_function(kind, name) is not _function(other, name) for other in plain)
    ]
    if changed:
        raise InputError(
            f"a tensor of type {kind.__module__}.{kind.__qualname__} says by its own `{changed[0]}` what operations "
            "do, and a recording does not follow that: relevance would be that of a plain tensor. Pass one, for "
            "example\n\n    x.as_subclass(torch.Tensor)"
        )


def _function(kind: type, name: str) -> Any:
    method = getattr(kind, name, None)
    return getattr(method, "__func__", method)
