"""What tells objects apart, and installed code from the user's own."""

from __future__ import annotations

import dataclasses
import dis
import functools
import itertools
import os
import site
import sysconfig
import types
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from lrpfunc._errors import InputError

_serials: dict[int, tuple[weakref.ref[Any], int]] = {}

_counter = itertools.count()

# Installed code is taken to be constant; only the globals of the user's own code are followed.
_INSTALLED = tuple(
    {
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        os.path.dirname(torch.__file__),
        site.getusersitepackages(),
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
        *site.getsitepackages(),
    }
)


def serial(obj: Any) -> Hashable:
    """A number no other object ever gets, unlike `id`, which is reused."""
    place = id(obj)
    known = _serials.get(place)
    if known is not None and known[0]() is obj:
        return known[1]
    try:
        reference = weakref.ref(obj, lambda dead: _serials.pop(place, None) if _is_of(dead, place) else None)
    except TypeError:  # not weakly referenceable
        return (place, type(obj).__qualname__)
    number = next(_counter)
    _serials[place] = (reference, number)
    return number


def _is_of(dead: weakref.ref[Any], place: int) -> bool:
    known = _serials.get(place)
    return known is not None and known[0] is dead


@functools.lru_cache(4096)
def is_installed(filename: str) -> bool:
    return filename.startswith((*_INSTALLED, "<frozen")) or "site-packages" in filename or "dist-packages" in filename


@functools.lru_cache(4096)
def slots(cls: type) -> tuple[str, ...]:
    slots = [slot for base in cls.__mro__ for slot in vars(base).get("__slots__", ())]
    return tuple(slot for slot in slots if isinstance(slot, str) and slot not in ("__dict__", "__weakref__"))


@functools.lru_cache(4096)
def is_frozen(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # pyright: ignore


@functools.lru_cache(4096)
def names_read(code: types.CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """The globals that code reads, in order, and the names of all attributes it reads."""
    names: dict[str, None] = {}
    attributes = set(code.co_names)
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names[instruction.argval] = None
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            inner, inner_attributes = names_read(const)
            names |= dict.fromkeys(inner)
            attributes |= inner_attributes
    return tuple(names), frozenset(attributes)


def is_custom_function(cls: type) -> bool:
    """Whether it is a `torch.autograd.Function` that is not torch's own."""
    return issubclass(cls, torch.autograd.Function) and not cls.__module__.startswith("torch.")


def describe_tensor(tensor: Tensor) -> tuple[Hashable, ...]:
    """What of a tensor a trace can depend on: everything but its numbers."""
    if tensor.layout is not torch.strided:
        raise InputError(
            f"an argument has a tensor of layout {tensor.layout}, which cannot be traced: pass tensor.to_dense()"
        )
    return (tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())), tensor.dtype, tensor.device)
