"""What a function reads besides its arguments: closures, globals, defaults, attributes.

A captured program may be used again only while all of that is unchanged, and the tensors among it must be read anew at
each call. `Environment` walks it and gives a hashable key of the values and the tensors in a stable order.
"""

from __future__ import annotations

import collections
import contextvars
import enum
import functools
import hashlib
import os
import sys
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from lrpfunc._capture.identity import (
    describe_tensor,
    is_custom_function,
    is_frozen,
    is_installed,
    names_read,
    serial,
    slots,
)
from lrpfunc._capture.memory import CACHED, LONG, holds
from lrpfunc._errors import CaptureError
from lrpfunc._torch import is_wrapped

_PLAIN = frozenset({int, str, bytes, bool, type(None), torch.dtype, torch.device, torch.memory_format, range})
_ATOMS = (*_PLAIN, float, complex, enum.Enum)
_CONTAINERS = frozenset({dict, collections.OrderedDict, list, tuple, set, frozenset})


class _Root(str):
    """The name of a variable, where the path to an object starts anew."""


class Environment:
    """The values and tensors that `roots` can read.

    Args:
        roots: What to walk.
        transformed: Whether there may be tensors that a transform has wrapped.
        remember: Whether `forget` will be called.

    Attributes:
        key: Equal for two walks if and only if nothing but the numbers inside tensors changed between them.
        tensors: The tensors met, each once, in an order that is the same for equal keys.
        custom: The custom subclasses of `torch.autograd.Function` met.
    """

    # NOTE: [one flat key] This walk is part of every call, and what it costs is mostly the containers that it makes
    # and the garbage collector then looks through. So the key is one tuple. It can be read back without ambiguity:
    # what stands for an object starts with its type or a tag, and then has a fixed length, a number of items, or `...`
    # at its end.

    def __init__(self, *roots: Any, transformed: bool = False, remember: bool = False):
        self._transformed = transformed
        self.tensors: list[Tensor] = []
        self.custom: list[type] = []
        self._parts: list[Hashable] = []
        self._path: list[Any] = []
        self._seen: dict[int, int] = {}
        self._keep: list[Any] = []  # what must outlive the walk, so that no id is reused during it
        self._remember = remember
        self._memories: list[tuple[Callable[[], Any], Callable[[], None]]] = []
        for root in roots:
            self._visit(root, _Root("model_fn"))
        self.key: Hashable = tuple(self._parts)

    def forget(self, is_foreign: Callable[[Any], bool]) -> None:
        """Undoes what a trace left in memory: containers, variables and caches that hold its own tensors.

        A function may remember what it computed, for example a grid or the activations a hook collects. What it
        computed while it was traced is of no use outside the trace.
        """
        for read, restore in self._memories:
            if holds(read(), is_foreign):
                restore()

    def _visit(self, obj: Any, step: Any) -> None:
        """Adds what stands for `obj`; `step` is the attribute, key or index it was reached by, or nothing to tell."""
        kind = type(obj)
        if kind in _PLAIN:
            self._parts += (kind, obj)
        elif kind in _CONTAINERS and not obj:
            self._parts += (kind, 0)
            if self._remember:
                self._remember_container(obj)
        elif isinstance(obj, _ATOMS):
            self._parts += (kind, repr(obj) if isinstance(obj, (float, complex)) else obj)
        elif kind is tuple and all(type(item) is int for item in obj):
            self._parts += (tuple, obj)
        elif (place := self._seen.setdefault(id(obj), len(self._seen))) < len(self._keep):
            self._parts += ("seen", place)
        else:
            self._keep.append(obj)
            self._path.append(step)
            getattr(self, _describer(kind))(obj)
            self._path.pop()

    def _method(self, method: types.MethodType) -> None:
        self._parts.append("method")
        self._visit(method.__func__, None)
        self._visit(method.__self__, "__self__")

    def _partial(self, partial: functools.partial[Any]) -> None:
        self._parts.append("partial")
        for part in (partial.func, partial.args, partial.keywords):
            self._visit(part, None)

    def _cached(self, function: Any) -> None:
        if self._remember:
            self._memories.append((lambda: [CACHED] if function.cache_info().currsize else [], function.cache_clear))
        self._parts.append("cached")
        self._visit(function.__wrapped__, None)

    def _context(self, variable: contextvars.ContextVar[Any]) -> None:
        self._parts += ("context", serial(variable))
        self._visit(variable.get(None), None)

    def _bytes(self, obj: Any) -> None:
        self._parts += (type(obj), bytes(obj))

    def _array(self, obj: Any) -> None:
        digest = hashlib.blake2b(obj.tobytes()).digest()
        self._parts += ("array", getattr(obj, "shape", len(obj)), str(getattr(obj, "dtype", "")), digest)

    def _container(self, obj: Any) -> None:
        if self._remember:
            self._remember_container(obj)
        if isinstance(obj, dict):
            items = list(obj.items())
            self._parts += (type(obj), len(items))
            for key, value in items:
                self._visit(key, None)
                self._visit(value, key)
        elif isinstance(obj, (set, frozenset)):
            self._parts += (type(obj), frozenset(map(self._apart, obj)))
        elif len(obj) > LONG and all(type(item) in (int, float) for item in obj):
            self._parts += (type(obj), hashlib.blake2b(repr(obj).encode()).digest())
        else:
            contents = list(obj)
            self._parts += (type(obj), len(contents))
            for index, item in enumerate(contents):
                self._visit(item, index)

    def _remember_container(self, obj: Any) -> None:
        if isinstance(obj, dict):
            before = dict(obj)
            self._memories.append((lambda: obj, lambda: (obj.clear(), obj.update(before))[0]))
        elif isinstance(obj, (list, collections.deque)):
            contents = list(obj)
            self._memories.append((lambda: obj, lambda: (obj.clear(), obj.extend(contents))[0]))

    def _apart(self, obj: Any) -> Hashable:
        """What stands for `obj`, by itself."""
        parts, self._parts = self._parts, []
        self._visit(obj, None)
        apart, self._parts = tuple(self._parts), parts
        return apart

    def _tensor(self, tensor: Tensor) -> None:
        if is_wrapped(tensor) and not self._transformed:
            name = self._name()
            raise CaptureError(
                f"the model function closes over `{name}`, a tensor of shape {tuple(tensor.shape)} that an outer "
                "vmap, grad or jvp transforms. A closure cannot be traced apart from that transform. Pass the tensor "
                "as an argument instead, for example\n\n    relevance_fn({**params, "
                f"{name.rpartition('.')[2]!r}: {name.rpartition('.')[2]}}}, x)"
            )
        if tensor.layout is not torch.strided:  # a trace keeps it as it is
            self._parts += ("sparse", serial(tensor))
        else:
            self.tensors.append(tensor)
            self._parts += ("tensor", *describe_tensor(tensor))

    def _name(self) -> str:
        name = ""
        for step in self._path:
            if isinstance(step, _Root):
                name = step
            elif step is not None:
                name += f"[{step}]" if isinstance(step, int) else f".{step}"
        return name

    def _function(self, fn: types.FunctionType) -> None:
        self._parts += ("function", fn.__code__)
        for variable, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            try:
                contents = cell.cell_contents
            except ValueError:  # not assigned yet
                self._parts.append("unassigned")
                continue
            if self._remember:
                restore = functools.partial(_set_cell, cell, contents)
                self._memories.append((lambda c=cell: [c.cell_contents], restore))
            self._visit(contents, _Root(variable))
        if not is_installed(fn.__code__.co_filename):
            self._globals(fn)
        for part in (fn.__defaults__, fn.__kwdefaults__, vars(fn)):
            self._visit(part, _Root(fn.__name__))

    def _globals(self, fn: types.FunctionType) -> None:
        names, attributes = names_read(fn.__code__)
        space = fn.__globals__
        for name in names:
            if name not in space:
                continue
            value = space[name]
            if self._remember:
                restore = functools.partial(space.__setitem__, name, value)
                self._memories.append((lambda n=name: [space.get(n)], restore))
            self._parts.append(name)
            self._visit(value, _Root(name))
            if isinstance(value, types.ModuleType):
                self._module_attributes(value, attributes, name)
        if attributes & {"environ", "getenv"}:
            self._parts.append(tuple(sorted(os.environ.items())))
        self._parts.append(...)

    def _module(self, module: types.ModuleType) -> None:
        self._parts += ("module", module.__name__)

    def _module_attributes(self, module: types.ModuleType, attributes: frozenset[str], name: str) -> None:
        """What code reads of a module of the user's own, and of the modules inside it."""
        if is_installed(getattr(module, "__file__", None) or "<frozen"):
            return
        for attribute in sorted(attributes & vars(module).keys()):
            value = vars(module)[attribute]
            self._parts.append(attribute)
            self._visit(value, _Root(f"{name}.{attribute}"))
            if isinstance(value, types.ModuleType):
                self._module_attributes(value, attributes, f"{name}.{attribute}")
        self._parts.append(...)

    def _class(self, cls: type) -> None:
        """What instances inherit: everything of the user's classes, and what the user put into installed ones."""
        if is_custom_function(cls):
            self.custom.append(cls)
        self._parts += ("class", serial(cls))
        for base in cls.__mro__:
            home = getattr(sys.modules.get(base.__module__), "__file__", None)
            own = base.__module__ == "__main__" or (home is not None and not is_installed(home))
            for name, member in list(vars(base).items()):
                if own and not (name.startswith(("__", "_abc_")) and not callable(member)):
                    self._parts.append(name)
                    self._visit(_plain(member), _Root(f"{base.__name__}.{name}"))
                elif type(member) is types.FunctionType and not is_installed(member.__code__.co_filename):
                    self._parts.append(name)
                    self._visit(member, _Root(name))
        self._parts.append(...)

    def _instance(self, obj: Any) -> None:
        kind = type(obj)
        own = getattr(obj, "__dict__", None)
        attributes = list(own.items()) if isinstance(own, dict) else []
        if self._remember and isinstance(own, dict):
            before = dict(own)
            self._memories.append((lambda: own, lambda: (own.clear(), own.update(before))[0]))
        attributes += [(slot, getattr(obj, slot)) for slot in slots(kind) if hasattr(obj, slot)]
        # All that a frozen dataclass is stands in its fields; of another object there may be more to know.
        self._parts += ("instance", None if is_frozen(kind) else serial(obj), len(attributes))
        self._visit(kind, None)
        for key, value in attributes:
            self._parts.append(key)
            # A module's own dictionaries of children and parameters are not part of the path its tensors are named by.
            self._visit(value, None if key in _UNNAMED else key)


_UNNAMED = frozenset({"_parameters", "_buffers", "_modules"})
_DESCRIBERS: tuple[tuple[Any, str], ...] = (
    (Tensor, "_tensor"),
    (types.FunctionType, "_function"),
    (types.MethodType, "_method"),
    (functools.partial, "_partial"),
    (functools._lru_cache_wrapper, "_cached"),
    (contextvars.ContextVar, "_context"),
    (type, "_class"),
    (types.ModuleType, "_module"),
    ((list, tuple, set, frozenset, dict, collections.deque), "_container"),
    ((bytearray, memoryview), "_bytes"),
)


@functools.lru_cache(4096)
def _describer(kind: type) -> str:
    """The method of `Environment` for objects of that type."""
    for bases, method in _DESCRIBERS:
        if issubclass(kind, bases):
            return method
    return "_array" if kind.__module__ in ("numpy", "array") and hasattr(kind, "tobytes") else "_instance"


def _plain(member: Any) -> Any:
    """The function behind a static method, a class method or a property."""
    if isinstance(member, property):
        return member.fget
    return getattr(member, "__func__", member)


def _set_cell(cell: types.CellType, contents: Any) -> None:
    cell.cell_contents = contents
