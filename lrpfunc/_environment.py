"""What a function reads besides its arguments: closures, globals, defaults, attributes.

A captured program may be used again only while all of that is unchanged, and the tensors among it must be read anew at
each call. `Environment` walks it and gives a hashable key of the values and the tensors in a stable order.
"""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import dis
import enum
import functools
import gc
import hashlib
import itertools
import operator
import os
import site
import sys
import sysconfig
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lrpfunc._errors import CaptureError, InputError
from lrpfunc._torch import is_wrapped

_ATOMS = (
    int,
    float,
    complex,
    str,
    bytes,
    bool,
    type(None),
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.memory_format,
    range,
)
_LONG = 10_000  # containers longer than this are compared by identity and length
_serials: Any = WeakIdKeyDictionary()
_counter = itertools.count()
# Installed code is taken to be constant; only the globals of the user's own code are followed.
_INSTALLED = tuple(
    {
        os.path.dirname(os.path.abspath(__file__)),
        os.path.dirname(torch.__file__),
        site.getusersitepackages(),
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
        *site.getsitepackages(),
    }
)


def _serial(obj: Any) -> Hashable:
    """A number no other object ever gets, unlike `id`, which is reused."""
    try:
        if obj not in _serials:
            _serials[obj] = next(_counter)
        return _serials[obj]
    except TypeError:  # not weakly referenceable
        return (id(obj), type(obj).__qualname__)


def _installed(filename: str) -> bool:
    return filename.startswith((*_INSTALLED, "<frozen")) or "site-packages" in filename or "dist-packages" in filename


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """The globals that code reads, in order, and the names of all attributes it reads."""
    names: dict[str, None] = {}
    attributes = set(code.co_names)
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names[instruction.argval] = None
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            inner, inner_attributes = _names(const)
            names |= dict.fromkeys(inner)
            attributes |= inner_attributes
    return tuple(names), frozenset(attributes)


class Environment:
    """The values and tensors that `roots` can read.

    Args:
        roots: What to walk.
        transformed: Whether there may be tensors that a transform has wrapped.

    Attributes:
        key: Equal for two walks if and only if nothing but the numbers inside tensors changed between them.
        tensors: The tensors met, each once, in an order that is the same for equal keys.
    """

    def __init__(self, *roots: Any, transformed: bool = False):
        self._transformed = transformed
        self.tensors: list[Tensor] = []
        self._seen: dict[int, int] = {}
        self._keep: list[Any] = []  # what must outlive the walk, so that no id is reused during it
        self._memories: list[tuple[Callable[[], Any], Callable[[], None]]] = []
        self.key: Hashable = tuple(self._visit(root, "model_fn") for root in roots)

    def forget(self, is_foreign: Callable[[Any], bool]) -> None:
        """Undoes what a trace left in memory: containers, variables and caches that hold its own tensors.

        A function may remember what it computed, for example a grid or the activations a hook collects. What it
        computed while it was traced is of no use outside the trace.
        """
        for read, restore in self._memories:
            if _holds(read(), is_foreign):
                restore()

    def _visit(self, obj: Any, name: str) -> Hashable:
        if isinstance(obj, _ATOMS):
            return (type(obj), repr(obj) if isinstance(obj, (float, complex)) else obj)
        if id(obj) in self._seen:
            return ("seen", self._seen[id(obj)])
        self._seen[id(obj)] = len(self._seen)
        self._keep.append(obj)
        return self._describe(obj, name)

    def _describe(self, obj: Any, name: str) -> Hashable:
        match obj:
            case Tensor():
                return self._tensor(obj, name)
            case types.FunctionType():
                return self._function(obj)
            case types.MethodType():
                return ("method", self._visit(obj.__func__, name), self._visit(obj.__self__, f"{name}.__self__"))
            case functools.partial():
                return ("partial", *(self._visit(part, name) for part in (obj.func, obj.args, obj.keywords)))
            case functools._lru_cache_wrapper():
                self._memories.append((lambda: [_CACHED] if obj.cache_info().currsize else [], obj.cache_clear))
                return ("cached", self._visit(obj.__wrapped__, name))
            case contextvars.ContextVar():
                return ("context", _serial(obj), self._visit(obj.get(None), name))
            case type():
                return ("class", _serial(obj), *self._members(obj))
            case types.ModuleType():
                return ("module", obj.__name__)
            case list() | tuple() | set() | frozenset() | dict() | collections.deque():
                return self._container(obj, name)
            case bytearray() | memoryview():
                return (type(obj), bytes(obj))
        if type(obj).__module__ in ("numpy", "array") and hasattr(obj, "tobytes"):
            digest = hashlib.blake2b(obj.tobytes()).digest()
            return ("array", getattr(obj, "shape", len(obj)), str(getattr(obj, "dtype", "")), digest)
        return self._instance(obj, name)

    def _container(self, obj: Any, name: str) -> Hashable:
        if isinstance(obj, dict):
            before = dict(obj)
            self._memories.append((lambda: obj, lambda: (obj.clear(), obj.update(before))[0]))
            items = list(obj.items())
            return (type(obj), *((self._visit(k, name), self._visit(v, f"{name}.{k}")) for k, v in items))
        if isinstance(obj, (set, frozenset)):
            return (type(obj), frozenset(self._visit(item, name) for item in obj))
        if isinstance(obj, (list, collections.deque)):
            contents = list(obj)
            self._memories.append((lambda: obj, lambda: (obj.clear(), obj.extend(contents))[0]))
        if len(obj) > _LONG and all(type(item) in (int, float) for item in obj):
            return (type(obj), hashlib.blake2b(repr(obj).encode()).digest())
        return (type(obj), *(self._visit(item, f"{name}[{i}]") for i, item in enumerate(list(obj))))

    def _tensor(self, tensor: Tensor, name: str) -> Hashable:
        if is_wrapped(tensor) and not self._transformed:
            raise CaptureError(
                f"the model function closes over `{name}`, a tensor of shape {tuple(tensor.shape)} that an outer "
                "vmap, grad or jvp transforms. A closure cannot be traced apart from that transform. Pass the tensor "
                "as an argument instead, for example\n\n    relevance_fn({**params, "
                f"{name.rpartition('.')[2]!r}: {name.rpartition('.')[2]}}}, x)"
            )
        if tensor.layout is not torch.strided:  # a trace keeps it as it is
            return ("sparse", _serial(tensor))
        self.tensors.append(tensor)
        return ("tensor", *describe_tensor(tensor))

    def _function(self, fn: types.FunctionType) -> Hashable:
        cells = []
        for variable, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            try:
                contents = cell.cell_contents
            except ValueError:  # not assigned yet
                cells.append(None)
                continue
            self._memories.append((lambda c=cell: [c.cell_contents], functools.partial(_set_cell, cell, contents)))
            cells.append(self._visit(contents, variable))
        read = () if _installed(fn.__code__.co_filename) else self._globals(fn)
        defaults = self._visit(fn.__defaults__, fn.__name__), self._visit(fn.__kwdefaults__, fn.__name__)
        return ("function", fn.__code__, *cells, *read, *defaults, self._visit(vars(fn), fn.__name__))

    def _globals(self, fn: types.FunctionType) -> Iterator[Hashable]:
        names, attributes = _names(fn.__code__)
        for name in names:
            if name not in fn.__globals__:
                continue
            space, value = fn.__globals__, fn.__globals__[name]
            restore = functools.partial(space.__setitem__, name, value)
            self._memories.append((lambda s=space, n=name: [s.get(n)], restore))
            yield name, self._visit(value, name)
            if isinstance(value, types.ModuleType):
                yield from self._module(value, attributes, name)
        if attributes & {"environ", "getenv"}:
            yield tuple(sorted(os.environ.items()))

    def _module(self, module: types.ModuleType, attributes: frozenset[str], name: str) -> Iterator[Hashable]:
        """What code reads of a module of the user's own, and of the modules inside it."""
        if _installed(getattr(module, "__file__", None) or "<frozen"):
            return
        for attribute in sorted(attributes & vars(module).keys()):
            value = vars(module)[attribute]
            yield attribute, self._visit(value, f"{name}.{attribute}")
            if isinstance(value, types.ModuleType):
                yield from self._module(value, attributes, f"{name}.{attribute}")

    def _members(self, cls: type) -> Iterator[Hashable]:
        """What instances inherit: everything of the user's classes, and what the user put into installed ones."""
        for base in cls.__mro__:
            home = getattr(sys.modules.get(base.__module__), "__file__", None)
            own = base.__module__ == "__main__" or (home is not None and not _installed(home))
            for name, member in list(vars(base).items()):
                if own and not (name.startswith(("__", "_abc_")) and not callable(member)):
                    yield name, self._visit(_plain(member), f"{base.__name__}.{name}")
                elif type(member) is types.FunctionType and not _installed(member.__code__.co_filename):
                    yield name, self._visit(member, name)

    def _instance(self, obj: Any, name: str) -> Hashable:
        attributes = dict(getattr(obj, "__dict__", {}))
        own = getattr(obj, "__dict__", None)
        if isinstance(own, dict):
            self._memories.append((lambda: own, lambda: (own.clear(), own.update(attributes))[0]))
        for slot in (s for base in type(obj).__mro__ for s in vars(base).get("__slots__", ())):
            if isinstance(slot, str) and hasattr(obj, slot):
                attributes[slot] = getattr(obj, slot)
        parts = [self._visit(type(obj), name)]
        # A module's own dictionaries of children and parameters are not part of the path its tensors are named by.
        hidden = ("_parameters", "_buffers", "_modules")
        for key, value in list(attributes.items()):
            parts.append((key, self._visit(value, name if key in hidden else f"{name}.{key}")))
        # All that a frozen dataclass is stands in its fields; of another object there may be more to know.
        frozen = dataclasses.is_dataclass(obj) and type(obj).__dataclass_params__.frozen  # pyright: ignore
        return ("instance", None if frozen else _serial(obj), *parts)


def forget_cached(is_foreign: Callable[[Any], bool]) -> None:
    """Empties each `functools.lru_cache` of the process, installed code's too, that holds a trace's own tensors."""
    objects = gc.get_objects()
    # Without a loop in Python: there are millions of objects in a process that has compiled something.
    cached = map(operator.is_, map(type, objects), itertools.repeat(functools._lru_cache_wrapper))
    for obj in itertools.compress(objects, cached):
        if _holds(gc.get_referents(obj), is_foreign):
            obj.cache_clear()


def is_cached(tensor: Tensor) -> bool:
    """Whether the tensor is a result that a `functools.lru_cache` keeps, which is the same at the next call."""
    return any(type(obj) is functools._lru_cache_wrapper for obj in gc.get_referrers(tensor))


_CACHED = object()


def _plain(member: Any) -> Any:
    """The function behind a static method, a class method or a property."""
    if isinstance(member, property):
        return member.fget
    return getattr(member, "__func__", member)


def _set_cell(cell: types.CellType, contents: Any) -> None:
    cell.cell_contents = contents


def _holds(value: Any, is_foreign: Callable[[Any], bool], depth: int = 3) -> bool:
    if value is _CACHED or is_foreign(value):
        return True
    if depth and isinstance(value, (list, tuple, set, collections.deque)) and len(value) <= _LONG:
        return any(_holds(item, is_foreign, depth - 1) for item in list(value))
    if depth and isinstance(value, dict) and len(value) <= _LONG:
        return any(_holds(item, is_foreign, depth - 1) for item in list(value.values()))
    return False


def describe_tensor(tensor: Tensor) -> tuple[Hashable, ...]:
    """What of a tensor a trace can depend on: everything but its numbers."""
    if tensor.layout is not torch.strided:
        raise InputError(
            f"an argument has a tensor of layout {tensor.layout}, which cannot be traced: pass tensor.to_dense()"
        )
    return (tuple(int(n) for n in tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
