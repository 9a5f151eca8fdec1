"""What a trace left where nobody looked for it: scripted modules put back, and tensors without numbers named."""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrpfunc._torch import forget_optimized, scripted_state, set_scripted_state, version_of


def restoring_scripts(objects: Iterable[Any]) -> Callable[[], None]:
    """Remembers the state of scripted modules; what it returns puts it back.

    TorchScript runs apart from Python. What it assigns to a module stays there, and what it writes to the tensors of
    one is written for real, since no mode sees it.
    """
    scripted = [obj for obj in objects if isinstance(obj, (torch.jit.ScriptModule, torch.jit.ScriptFunction))]
    for obj in scripted:
        forget_optimized(obj)
    found = {id(m): m for obj in scripted if isinstance(obj, torch.jit.ScriptModule) for m in obj.modules()}
    modules = [(m, scripted_state(m)) for m in found.values() if isinstance(m, torch.jit.ScriptModule)]
    buffers = {id(buffer): buffer for module, _ in modules for buffer in module.buffers(recurse=False)}
    copies = [(buffer, version_of(buffer), buffer.detach().clone()) for buffer in buffers.values()]

    def put_back() -> None:
        for module, before in modules:
            now = scripted_state(module)
            set_scripted_state(module, {name: old for name, old in before.items() if not _is_same(now[name], old)})
        for buffer, version, copy in copies:
            if version_of(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(copy)

    return put_back


def _is_same(now: Any, before: Any) -> bool:
    """Whether nobody has assigned another; lists and dictionaries come out of a scripted module as copies."""
    if isinstance(now, dict) and isinstance(before, dict):
        return _is_same(list(now.items()), list(before.items()))
    if isinstance(now, (list, tuple)) and isinstance(before, (list, tuple)):
        return len(now) == len(before) and all(map(_is_same, now, before))
    return now is before or (not isinstance(now, Tensor) and type(now) is type(before) and now == before)


# -- what holds a tensor


def holder(tensors: Sequence[Tensor]) -> str | None:
    """The name of a variable, an attribute or an item that holds one of the tensors and is none of torch's."""
    level: dict[int, tuple[Any, str]] = {id(tensor): (tensor, "") for tensor in tensors}
    seen = {*level, id(tensors), id(level)}
    for _ in range(_DEPTH):  # each step looks through all objects of the process
        around: dict[int, tuple[Any, str]] = {}
        for referrer in gc.get_referrers(*(obj for obj, _ in level.values())):
            if id(referrer) in seen or isinstance(referrer, (types.FrameType, tuple, type, Tensor)):
                continue
            seen.add(id(referrer))
            key, path = next(((key, level[id(x)][1]) for key, x in _items(referrer) if id(x) in level), ("...", ""))
            if isinstance(referrer, dict) and isinstance(referrer.get("__name__"), str):
                if not referrer["__name__"].startswith(_NOBODYS):
                    return f"{referrer['__name__']}.{key}{path}"
            elif isinstance(referrer, (dict, list, set)):
                around[id(referrer)] = referrer, f"[{key!r}]{path}"
            elif not type(referrer).__module__.startswith(_NOBODYS):
                return f"{type(referrer).__qualname__}.{key}{path}"
        level = around
    return None


_DEPTH = 4
_NOBODYS = ("torch.", "lrpfunc.", "builtins", "weakref", "functools")  # a cache keeps what was taken out for a while


def _items(container: Any) -> list[tuple[Any, Any]]:
    if isinstance(container, (list, set)):
        return list(enumerate(container))
    own = getattr(container, "__dict__", {})
    return list(container.items()) if isinstance(container, dict) else [("__dict__", own), *own.items()]
