"""What a function reads besides its arguments: closures, globals, defaults, attributes.

A captured program may be used again only while all of that is unchanged, and the tensors among it must be read anew at
each call. `Environment` walks it and gives a hashable key of the values and the tensors in a stable order.
"""

from __future__ import annotations

import enum
import functools
import inspect
import itertools
import os
import site
import sysconfig
import types
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lrpfunc._errors import CaptureError
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


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _names(const)


class Environment:
    """The values and tensors that `roots` can read.

    Attributes:
        key: Equal for two walks if and only if nothing but the numbers inside tensors changed between them.
        tensors: The tensors met, each once, in an order that is the same for equal keys.
    """

    def __init__(self, *roots: Any):
        self.tensors: list[Tensor] = []
        self._seen: dict[int, int] = {}
        self._keep: list[Any] = []  # what must outlive the walk, so that no id is reused during it
        self.key: Hashable = tuple(self._visit(root, "model_fn") for root in roots)

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
            case list() | tuple() | set() | frozenset() if len(obj) > _LONG:
                return (type(obj), _serial(obj), len(obj))
            case list() | tuple():
                return (type(obj), *(self._visit(item, f"{name}[{i}]") for i, item in enumerate(obj)))
            case set() | frozenset():
                return (type(obj), frozenset(self._visit(item, name) for item in obj))
            case dict():
                items = obj.items() if len(obj) <= _LONG else ()
                return (type(obj), len(obj), *((self._visit(k, name), self._visit(v, f"{name}.{k}")) for k, v in items))
            case _ if type(obj).__module__ == "numpy" and hasattr(obj, "tobytes"):
                return ("array", obj.shape, str(obj.dtype), obj.tobytes())
            case type():
                return ("class", _serial(obj), *self._methods(obj))
            case types.ModuleType():
                return ("module", obj.__name__)
        return self._instance(obj, name)

    def _tensor(self, tensor: Tensor, name: str) -> Hashable:
        if is_wrapped(tensor):
            raise CaptureError(
                f"the model function closes over `{name}`, a tensor of shape {tuple(tensor.shape)} that an outer "
                "vmap, grad or jvp transforms. A closure cannot be traced apart from that transform. Pass the tensor "
                "as an argument instead, for example\n\n    relevance_fn({**params, "
                f"{name.rpartition('.')[2]!r}: {name.rpartition('.')[2]}}}, x)"
            )
        self.tensors.append(tensor)
        return ("tensor", *describe_tensor(tensor))

    def _function(self, fn: types.FunctionType) -> Hashable:
        cells = []
        for variable, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            try:
                cells.append(self._visit(cell.cell_contents, variable))
            except ValueError:  # not assigned yet
                cells.append(None)
        read = () if _installed(fn.__code__.co_filename) else self._globals(fn)
        defaults = self._visit(fn.__defaults__, fn.__name__), self._visit(fn.__kwdefaults__, fn.__name__)
        return ("function", fn.__code__, *cells, *read, *defaults, self._visit(vars(fn), fn.__name__))

    def _globals(self, fn: types.FunctionType) -> Iterator[Hashable]:
        names = dict.fromkeys(_names(fn.__code__))
        for name in names:
            if name not in fn.__globals__:
                continue
            value = fn.__globals__[name]
            yield name, self._visit(value, name)
            if isinstance(value, types.ModuleType) and not _installed(getattr(value, "__file__", None) or "<frozen"):
                yield from ((n, self._visit(vars(value)[n], f"{name}.{n}")) for n in names if n in vars(value))

    def _methods(self, cls: type) -> Iterator[Hashable]:
        for base in cls.__mro__:
            for name, member in vars(base).items():
                function = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)) or member)
                if isinstance(function, types.FunctionType) and not _installed(function.__code__.co_filename):
                    yield name, self._visit(function, name)

    def _instance(self, obj: Any, name: str) -> Hashable:
        attributes = dict(getattr(obj, "__dict__", {}))
        for slot in (s for base in type(obj).__mro__ for s in vars(base).get("__slots__", ())):
            if isinstance(slot, str) and hasattr(obj, slot):
                attributes[slot] = getattr(obj, slot)
        parts = [self._visit(type(obj), name)]
        # A module's own dictionaries of children and parameters are not part of the path its tensors are named by.
        hidden = ("_parameters", "_buffers", "_modules")
        for key, value in attributes.items():
            parts.append((key, self._visit(value, name if key in hidden else f"{name}.{key}")))
        return ("instance", _serial(obj), *parts)


def describe_tensor(tensor: Tensor) -> tuple[Hashable, ...]:
    """What of a tensor a trace can depend on: everything but its numbers."""
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return (tuple(int(n) for n in tensor.shape), strides, tensor.dtype, tensor.device, tensor.layout)
