"""What a function reads besides tensor arguments: closures, globals, defaults, attributes.

A captured program may be used again only while all of that is unchanged, and the tensors among it must be read anew at
each call. `Environment` walks it and gives a hashable key of the values and the tensors in a stable order.
"""

from __future__ import annotations

import bisect
import collections
import contextvars
import functools
import hashlib
import os
import types
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from lrpfunc._capture.code import imported, mentions
from lrpfunc._capture.identity import (
    attributes,
    describe_tensor,
    identity,
    is_custom_function,
    is_fixed,
    is_frozen,
    is_installed,
    is_own_class,
    is_own_module,
    reduction,
)
from lrpfunc._capture.memory import IsForeign, Memory, contents, is_assigned
from lrpfunc._capture.policy import PLAIN, policy
from lrpfunc._errors import CaptureError
from lrpfunc._torch import is_wrapped

_CONTAINERS = frozenset({dict, list, tuple, set, frozenset})
_LONG = 10_000  # of longer lists of numbers the key has a digest


class _Root(str):
    """The name of a variable, where the path to an object starts anew."""


class Environment:
    """The values and tensors that `roots` can read. The policy for each type of object stands in `policy.py`.

    Args:
        roots: What to walk.
        transformed: Whether there may be tensors that a transform has wrapped.
        remember: Whether `forget` or `difference` will be called.

    Attributes:
        key: Equal for two walks if and only if nothing but the numbers inside tensors changed between them.
        tensors: The tensors met, each once, in an order that is the same for equal keys.
        custom: The custom subclasses of `torch.autograd.Function` met.
        unknown: The names of what is never equal to anything, because what is in it cannot be seen.
    """

    # NOTE: [one flat key] This walk is part of every call, and costs mostly the containers that it makes and that the
    # garbage collector looks through. So the key is one tuple, which reads back without ambiguity: what stands for an
    # object starts with its type or a tag, and then has a fixed length, a number of items, or `...` at its end.

    def __init__(self, *roots: Any, transformed: bool = False, remember: bool = False):
        self._transformed = transformed
        self.tensors: list[Tensor] = []
        self.custom: list[type] = []
        self.unknown: list[str] = []
        self._parts: list[Hashable] = []
        self._path: list[Any] = []
        self._seen: dict[int, int] = {}
        self._keep: list[Any] = []  # what must outlive the walk, so that no id is reused during it
        self._memory = Memory() if remember else None
        self._places: list[tuple[int, tuple[Any, ...]]] = []  # where in the key an object begins, and its path
        self._modules: list[tuple[str, types.ModuleType]] = []
        self._mentioned: set[str] = {"__getattr__"}
        self._computes = False
        for root in roots:
            self._visit(root, _Root("model_fn" if root is roots[0] else "argument"))
        self._read_modules()
        self.key: Hashable = tuple(self._parts)

    def forget(self, is_foreign: IsForeign) -> None:
        """Undoes what a trace left in memory: containers, variables and caches that hold its own tensors."""
        if self._memory is not None:
            self._memory.forget(is_foreign)

    def difference(self, other: Environment) -> str:
        """The name of the first thing that two walks of the same roots disagree on."""
        pairs = zip(self._parts, other._parts, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._parts), len(other._parts)))
        place = bisect.bisect_right(self._places, first, key=lambda place: place[0])
        return _name(self._places[max(0, place - 1)][1])

    def met(self) -> list[Any]:
        """All objects met, but for plain values."""
        return self._keep

    def has(self, obj: Any) -> bool:
        """Whether this very object was met, and is known by its identity."""
        return id(obj) in self._seen and policy(type(obj)) in _BY_IDENTITY and not is_frozen(type(obj))

    def _visit(self, obj: Any, step: Any) -> None:
        """Adds what stands for `obj`; `step` is the attribute, key or index it was reached by, or nothing to tell."""
        kind = type(obj)
        if self._memory is not None:
            self._places.append((len(self._parts), (*self._path, step)))
        if kind in PLAIN:
            self._parts += (kind, obj)
        elif kind is float or kind is complex:
            self._parts += (kind, repr(obj))  # 0.0 is not -0.0, and nan is nan
        elif (kind in _CONTAINERS and not obj) or (kind is OrderedDict and not obj and not vars(obj)):
            self._parts += (kind, 0)
            self._remember(obj)
        elif kind is tuple and all(type(item) is int for item in obj):
            self._parts += (tuple, obj)
        elif (place := self._seen.setdefault(id(obj), len(self._seen))) < len(self._keep):
            self._parts += ("seen", place)
        else:
            self._keep.append(obj)
            self._path.append(step)
            getattr(self, policy(kind))(obj)
            self._path.pop()

    # ---------------------------------------------------------------------------------------------------------
    # By value

    def _value(self, obj: Any) -> None:
        kept = reduction(obj) or ()
        self._parts += (type(obj), len(kept))
        for part in kept[1:]:  # the first is implied by the type
            self._visit(part, None)

    def _mapping(self, obj: dict[Any, Any]) -> None:
        self._remember(obj)
        ordered = isinstance(obj, OrderedDict)  # which has an order of its own
        items = list(OrderedDict.items(obj) if ordered else dict.items(obj))
        self._parts += (type(obj), len(items))
        for key, value in items:
            self._visit(key, None)
            self._visit(value, key)
        self._rest_of_container(obj)

    def _sequence(self, obj: Any) -> None:
        # A set stands in its order, too: the tensors in it must be met in the same order each time.
        self._remember(obj)
        items = list(iter(obj))  # whose length may be an error
        self._parts += (type(obj), len(items))
        if len(items) > _LONG and all(type(item) in (int, float) for item in items):
            self._parts.append(hashlib.blake2b(repr(items).encode()).digest())
        else:
            for index, item in enumerate(items):
                self._visit(item, index)
        self._rest_of_container(obj)

    def _remember(self, obj: Any) -> None:
        if self._memory is None:
            return
        if isinstance(obj, dict):
            self._memory.mapping(obj)
        elif isinstance(obj, (list, collections.deque)):
            self._memory.sequence(obj)
        elif isinstance(obj, set):
            self._memory.collection(obj)

    def _rest_of_container(self, obj: Any) -> None:
        """What an object of a subclass has beside the items."""
        if type(obj) not in _CONTAINERS:
            self._parts.append(getattr(obj, "maxlen", None))  # of a deque
            self._attributes(obj)
            self._visit_class(type(obj))

    def _view(self, view: Any) -> None:
        mapping = view if isinstance(view, types.MappingProxyType) else view.mapping
        pairs = list(mapping.items())
        self._parts += (type(view), len(pairs))
        for key, value in pairs:
            self._visit(key, None)
            self._visit(value, key)

    def _bytes(self, obj: Any) -> None:
        layout = (obj.format, obj.shape, obj.strides) if isinstance(obj, memoryview) else ()
        self._parts += (type(obj), layout, bytes(obj))

    def _array(self, obj: Any) -> None:
        """An array of NumPy's."""
        self._parts += ("array", obj.shape, obj.strides)
        self._visit(obj.dtype, None)
        if obj.dtype.hasobject:
            self._visit(obj.tolist(), None)
        else:
            self._parts.append(hashlib.blake2b(obj.tobytes()).digest())
        self._attributes(obj)
        self._visit_class(type(obj))

    def _reduced(self, obj: Any) -> None:
        """What C code hides, by what pickle would keep of it, and what else there is."""
        kept = reduction(obj)
        if isinstance(kept, str):  # the name of something global
            self._same(obj)
        elif kept is None:
            self._never(obj)
        else:
            self._parts += ("reduced", len(kept))
            for part in kept:
                self._visit(list(part) if hasattr(type(part), "__next__") else part, None)
            self._attributes(obj)
            self._visit_class(type(obj))

    def _partial(self, partial: functools.partial[Any]) -> None:
        self._parts.append("partial")
        for part in (partial.func, partial.args, partial.keywords):
            self._visit(part, None)
        self._attributes(partial)
        self._visit_class(type(partial))

    def _reference(self, reference: Any) -> None:
        self._parts.append("reference")
        self._visit(reference(), None)

    def _context(self, variable: contextvars.ContextVar[Any]) -> None:
        self._parts += ("context", identity(variable))
        self._visit(variable.get(None), None)

    def _tensor(self, tensor: Tensor) -> None:
        if is_wrapped(tensor) and not self._transformed:
            name = _name(tuple(self._path))
            raise CaptureError(
                f"the model function closes over `{name}`, a tensor of shape {tuple(tensor.shape)} that an outer "
                "vmap, grad or jvp transforms. A closure cannot be traced apart from that transform. Pass the tensor "
                "as an argument instead, for example\n\n    relevance_fn({**params, "
                f"{name.rpartition('.')[2]!r}: {name.rpartition('.')[2]}}}, x)"
            )
        kind = type(tensor)
        if tensor.layout is not torch.strided:  # a trace keeps it as it is
            self._parts += ("sparse", identity(tensor))
        else:
            self.tensors.append(tensor)
            self._parts += (kind, *describe_tensor(tensor))
        if kind.__module__.startswith("torch._"):
            return  # made by a trace of torch's, whose notes are its attributes
        if kind is not Tensor and kind is not nn.Parameter:
            self._visit_class(kind)
        if own := tensor.__dict__:
            self._visit(own, None)

    # ---------------------------------------------------------------------------------------------------------
    # By identity, with what can be read of it

    def _same(self, obj: Any) -> None:
        self._parts += ("same", identity(obj))

    def _instance(self, obj: Any) -> None:
        # All that a frozen dataclass is stands in its fields; of another object there may be more to know.
        self._parts += ("instance", None if is_frozen(type(obj)) else identity(obj))
        self._visit_class(type(obj))
        self._attributes(obj)

    def _attributes(self, obj: Any) -> None:
        found = attributes(obj)
        if self._memory is not None:
            own = getattr(obj, "__dict__", None)
            if isinstance(own, dict):
                self._memory.mapping(own)
            self._memory.slots(obj)
        self._parts.append(len(found))
        for key, value in found:
            self._parts.append(key)
            # A module's own dictionaries of children and parameters are not part of the path its tensors are named by.
            self._visit(value, None if key in _UNNAMED else key)

    def _visit_class(self, cls: type) -> None:
        if is_fixed(cls):
            self._parts.append(cls)
        else:
            self._visit(cls, None)

    def _class(self, cls: type) -> None:
        """What instances inherit: everything of the user's classes, and what the user put into installed ones."""
        if is_custom_function(cls):
            self.custom.append(cls)
        self._parts += ("class", identity(cls))
        own = is_own_class(cls)
        if own and self._memory is not None:
            self._memory.members(cls)
        for name, member in list(vars(cls).items()):
            if own and not (name.startswith(("__", "_abc_")) and not callable(member)):
                self._parts.append(name)
                self._visit(member, _Root(f"{cls.__name__}.{name}"))
            elif type(member) is types.FunctionType and not is_installed(member.__code__.co_filename):
                self._parts.append(name)
                self._visit(member, _Root(name))
        for base in cls.__mro__[1:]:
            self._visit_class(base)
        if own and type(cls) is not type:
            self._visit_class(type(cls))
        self._parts.append(...)

    # ---------------------------------------------------------------------------------------------------------
    # By code and what it reads

    def _function(self, fn: types.FunctionType) -> None:
        self._parts += ("function", fn.__code__)
        for variable, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            self._cell(cell, variable)
        if not is_installed(fn.__code__.co_filename):
            self._globals(fn)
        for part in (fn.__defaults__, fn.__kwdefaults__, vars(fn)):
            self._visit(part, _Root(fn.__name__))

    def _cell(self, cell: types.CellType, name: str = "cell") -> None:
        if self._memory is not None:
            self._memory.cell(cell)
        value = contents(cell)
        if is_assigned(value):
            self._visit(value, _Root(name))
        else:
            self._parts.append("unassigned")

    def _globals(self, fn: types.FunctionType) -> None:
        found, space = mentions(fn.__code__), fn.__globals__
        self._mentioned |= found.names
        self._computes |= found.computes
        if self._memory is not None:
            self._memory.mapping(space, {*found.read, *found.written})
        for name in _public(space) if found.computes_globals else found.read:
            if name in space:
                self._parts.append(name)
                self._visit(space[name], _Root(name))
        self._parts.append(...)
        for name, level in found.imports:
            for module in imported(name, level, space.get("__package__")):
                self._visit(module, _Root(module.__name__))
        self._parts.append(...)

    def _method(self, method: types.MethodType) -> None:
        self._parts.append("method")
        self._visit(method.__func__, None)
        self._visit(method.__self__, "__self__")

    def _builtin(self, function: Any) -> None:
        owner = function.__self__
        if (
            owner is None
            or isinstance(owner, types.ModuleType)
            or (isinstance(owner, type) and not is_own_class(owner))
        ):
            self._same(function)
        else:
            self._parts += ("builtin", function.__qualname__)
            self._visit(owner, "__self__")

    def _cached(self, function: Any) -> None:
        if self._memory is not None:
            self._memory.cached(function)
        self._parts.append("cached")
        self._visit(function.__wrapped__, None)

    def _wrapper(self, member: Any) -> None:
        """A static method, a class method or a property."""
        parts = (member.fget, member.fset, member.fdel) if isinstance(member, property) else (member.__func__,)
        self._parts += (type(member), len(parts))
        for part in parts:
            self._visit(part, None)

    def _module(self, module: types.ModuleType) -> None:
        self._parts += ("module", identity(module))
        if is_own_module(module):
            self._modules.append((self._path[-1] or module.__name__, module))
            if self._memory is not None:
                self._memory.mapping(vars(module))

    def _read_modules(self) -> None:
        """What code can read of the user's modules: whatever in them has a name that any of the code met mentions.

        A module may be handed from one function to another, so that this is not asked of each function alone. What is
        read may be code that mentions more, or another module.
        """
        read: set[tuple[int, str]] = set()
        known = None
        while known != (known := (len(self._modules), len(self._mentioned), self._computes)):
            for path, module in list(self._modules):
                space = vars(module)
                for name in _public(space) if self._computes else sorted(self._mentioned & space.keys()):
                    if (id(module), name) not in read:
                        read.add((id(module), name))
                        self._parts.append(name)
                        self._visit(space[name], _Root(f"{path}.{name}"))
        if self._mentioned & {"environ", "getenv"}:
            self._parts.append(tuple(sorted(os.environ.items())))

    # ---------------------------------------------------------------------------------------------------------
    # Never the same

    def _never(self, obj: Any) -> None:
        self._parts += ("never", object())
        self.unknown.append(f"{_name(tuple(self._path))} ({type(obj).__name__})")


_BY_IDENTITY = frozenset({"_same", "_instance", "_class", "_module", "_context"})
_UNNAMED = frozenset({"_parameters", "_buffers", "_modules"})


def _public(space: dict[str, Any]) -> list[str]:
    """The names in a module, but for what the import system notes there."""
    return sorted(name for name in space if name == "__getattr__" or not name.startswith("__"))


def _name(path: tuple[Any, ...]) -> str:
    name = ""
    for step in path:
        if isinstance(step, _Root):
            name = step
        elif step is not None:
            name += f"[{step}]" if isinstance(step, int) else f".{step}"
    return name
