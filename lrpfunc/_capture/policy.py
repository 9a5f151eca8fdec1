"""What stands for an object in the key of an `Environment`: a policy for each type.

A policy is the name of a method of `Environment`. The first line whose types an object is an instance of counts. What
no line names goes by how it is made, below the table; nothing is told apart by its `id`.
"""

from __future__ import annotations

import collections
import contextvars
import datetime
import decimal
import enum
import fractions
import functools
import io
import logging
import operator
import pathlib
import re
import threading
import types
import uuid
import weakref

import torch
from torch import Tensor

from lrpfunc._capture.identity import has_hidden_state
from lrpfunc._torch import is_operator

# By value, as they are: they hash, and equal ones are the same to any code.
PLAIN = frozenset(
    {int, str, bytes, bool, type(None), type(...), torch.dtype, torch.device, torch.memory_format, types.CodeType}
)

# Of exactly these types, what pickle would write is the whole of a value.
VALUES = frozenset(
    {
        *(slice, range, decimal.Decimal, fractions.Fraction, uuid.UUID, re.Pattern),
        *(datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone),
        *(operator.itemgetter, operator.attrgetter, operator.methodcaller),
        *(pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.PosixPath, pathlib.WindowsPath),
    }
)

_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_VIEWS = (types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()))
_DESCRIPTORS = (
    *(types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType),
)
_RUNNING = (
    *(types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType),
    *(types.FrameType, types.TracebackType),
)

_TABLE: tuple[tuple[tuple[type, ...], str], ...] = (
    # Its numbers are an input of the program; the rest of it is described.
    ((Tensor,), "_tensor"),
    # Numbers that no trace sees when they are read.
    ((torch.UntypedStorage, torch.TypedStorage), "_never"),
    # Its code, and what that can read.
    ((types.FunctionType,), "_function"),
    ((types.MethodType,), "_method"),
    # It is made anew each time it is looked up, so that its name and what it is bound to say more than it does itself.
    ((types.BuiltinFunctionType, types.MethodWrapperType), "_builtin"),
    ((functools.partial,), "_partial"),
    # What is in the cache follows from the function.
    ((functools._lru_cache_wrapper,), "_cached"),
    ((staticmethod, classmethod, property), "_wrapper"),
    # What it is in this thread.
    ((contextvars.ContextVar,), "_context"),
    # Itself, and all that instances inherit from it.
    ((type,), "_class"),
    # Itself; what code reads of it is looked up by name when all the code is known.
    ((types.ModuleType,), "_module"),
    # A variable that several functions may share.
    ((types.CellType,), "_cell"),
    # What is in it, in order.
    ((dict,), "_mapping"),
    ((list, tuple, set, frozenset, collections.deque), "_sequence"),
    (_VIEWS, "_view"),
    ((bytearray, memoryview), "_bytes"),
    # What it refers to, for as long as that lives.
    ((weakref.ref,), "_reference"),
    # A class has one object for each.
    ((enum.Enum,), "_instance"),
    # The same object: nothing that can change in it is for a model function to compute with.
    ((logging.Logger, io.IOBase, *_LOCKS, *_DESCRIPTORS), "_same"),
    # Where it stands in its code is not known, and it moves on when it is asked.
    (_RUNNING, "_never"),
)


def _is_from(kind: type, package: str) -> bool:
    return any(base.__module__.partition(".")[0] == package for base in kind.__mro__)


@functools.lru_cache(4096)
def policy(kind: type) -> str:
    """The method of `Environment` for objects of that type."""
    if kind in VALUES:
        return "_value"
    for types_, method in _TABLE:
        if issubclass(kind, types_):
            return method
    if is_operator(kind):  # operators, which keep notes of how they were called
        return "_same"
    if not has_hidden_state(kind):
        return "_instance"  # all that is in it stands in its attributes
    if hasattr(kind, "__next__"):
        return "_never"  # an iterator
    if _is_from(kind, "torch"):
        return "_same"  # handles, such as a generator of random numbers, a stream or a scripted module
    if any(base.__module__ == "numpy" and base.__name__ == "ndarray" for base in kind.__mro__):
        return "_array"
    return "_reduced"  # by what pickle would keep of it, or never
