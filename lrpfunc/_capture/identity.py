"""What tells objects apart, and installed code from the user's own."""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import itertools
import os
import site
import sys
import sysconfig
import types
import weakref
from collections.abc import Hashable
from typing import Any, final

import torch
from torch import Tensor

from lrpfunc._capture.refused import check_tensor

# --------------------------------------------------------------------------------------------------------------
# The same object


@final
class Held:
    """Stands for an object without weak references, and keeps it alive, so that no other gets its `id`."""

    __slots__ = ("_obj",)

    def __init__(self, obj: Any):
        self._obj = obj

    def __eq__(self, other: object) -> bool:
        return type(other) is Held and other._obj is self._obj

    def __hash__(self) -> int:
        return id(self._obj)


_serials: dict[int, tuple[weakref.ref[Any], int]] = {}
_counter = itertools.count()


def identity(obj: Any) -> Hashable:
    """What no other object ever has, unlike `id`, which is used again: a serial number, or the object, held."""
    place = id(obj)
    known = _serials.get(place)
    if known is not None and known[0]() is obj:
        return known[1]
    try:
        reference = weakref.ref(obj, lambda dead: _serials.pop(place, None) if _is_of(dead, place) else None)
    except TypeError:
        return Held(obj)
    number = next(_counter)
    _serials[place] = (reference, number)
    return number


def _is_of(dead: weakref.ref[Any], place: int) -> bool:
    known = _serials.get(place)
    return known is not None and known[0] is dead


def describe_tensor(tensor: Tensor) -> tuple[Hashable, ...]:
    """What of a tensor a trace can depend on: everything but its numbers."""
    check_tensor(tensor)
    return (tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())), tensor.dtype, tensor.device)


# --------------------------------------------------------------------------------------------------------------
# Classes


@functools.lru_cache(4096)
def slots(cls: type) -> tuple[Any, ...]:
    """The descriptors of `__slots__`, whatever names they go by: `__x` is `_Class__x` outside of its class."""
    members = [member for base in cls.__mro__ for member in vars(base).values()]
    return tuple(member for member in members if type(member) is types.MemberDescriptorType)


def attributes(obj: Any) -> list[tuple[str, Any]]:
    """The attributes of an object itself, by name."""
    own = getattr(obj, "__dict__", None)
    found = list(own.items()) if isinstance(own, dict) else []
    for slot in slots(type(obj)):
        try:
            found.append((slot.__name__, slot.__get__(obj)))
        except AttributeError:  # not set
            continue
    return found


def reduction(obj: Any) -> tuple[Any, ...] | str | None:
    """What pickle would keep of an object, or nothing where it refuses."""
    try:
        reduce = copyreg.dispatch_table.get(type(obj))
        return obj.__reduce_ex__(4) if reduce is None else reduce(obj)  # pyright: ignore[reportReturnType]
    except Exception:  # whatever the author of a class thought fit
        return None


@functools.lru_cache(4096)
def is_frozen(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # pyright: ignore


@functools.lru_cache(4096)
def has_hidden_state(cls: type) -> bool:
    """Whether objects of the class are larger than their attributes: what else is in them, only C code knows."""
    own = cls.__basicsize__ - object.__basicsize__ - 8 * len(slots(cls))
    return own > 8 * ((cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0)) or cls.__itemsize__ > 0


_IMMUTABLE_TYPE = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE


def is_fixed(cls: type) -> bool:
    """Whether nobody can give the class another attribute or method, as it is with those that are written in C."""
    return bool(cls.__flags__ & _IMMUTABLE_TYPE)


def is_custom_function(cls: type) -> bool:
    """Whether it is a `torch.autograd.Function` that is not torch's own."""
    return issubclass(cls, torch.autograd.Function) and not cls.__module__.startswith("torch.")


# --------------------------------------------------------------------------------------------------------------
# Installed code, which is taken to be constant: only the globals of the user's own code are followed


def _installed_folders() -> tuple[str, ...]:
    folders = {os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(torch.__file__)}
    folders |= {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    folders |= {site.getusersitepackages(), *site.getsitepackages()}
    folders |= {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")}
    # With the separator, so that `lrpfunc_study.py` is not taken for a part of lrpfunc.
    return tuple(os.path.join(path, "") for folder in folders for path in {folder, os.path.realpath(folder)})


_INSTALLED = _installed_folders()


@functools.lru_cache(4096)
def is_installed(filename: str) -> bool:
    """Whether the file is Python's own, or in a folder that packages are installed into."""
    return filename.startswith("<frozen") or os.path.normpath(filename).startswith(_INSTALLED)


@functools.lru_cache(4096)
def _is_own(name: str, file: str | None) -> bool:
    if name == "__main__":
        return True
    if file is not None and os.path.isabs(file):
        return not is_installed(file)
    # Such as torch.ops, whose file is none, or a part of an extension module; or a module that was made by hand.
    top = name.partition(".")[0]
    package = sys.modules.get(top)
    if package is not None and top != name:
        return is_own_module(package)
    return top not in sys.stdlib_module_names


def is_own_module(module: types.ModuleType) -> bool:
    """Whether a module is the user's own."""
    space = vars(module)  # a module may have a `__getattr__` that answers anything
    folders = list(space.get("__path__") or [None])
    return _is_own(module.__name__, space.get("__file__") or folders[0])


def is_own_class(cls: type) -> bool:
    """Whether a class was defined in the user's own code."""
    if is_fixed(cls):
        return False
    if cls.__module__ == "builtins":  # made by `exec` without a `__name__`; those that are built in are fixed
        return True
    module = sys.modules.get(cls.__module__)
    return _is_own(cls.__module__, None) if module is None else is_own_module(module)
