"""Where a trace may have left its own tensors."""

from __future__ import annotations

import collections
import functools
import gc
import itertools
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

LONG = 10_000  # containers longer than this are compared by identity and length


def forget_cached(is_foreign: Callable[[Any], bool]) -> None:
    """Empties each `functools.lru_cache` of the process, installed code's too, that holds a trace's own tensors."""
    objects = gc.get_objects()
    # Without a loop in Python: there are millions of objects in a process that has compiled something.
    cached = map(operator.is_, map(type, objects), itertools.repeat(functools._lru_cache_wrapper))
    for obj in itertools.compress(objects, cached):
        if holds(gc.get_referents(obj), is_foreign):
            obj.cache_clear()


def is_cached(tensor: Tensor) -> bool:
    """Whether the tensor is a result that a `functools.lru_cache` keeps, which is the same at the next call."""
    return any(type(obj) is functools._lru_cache_wrapper for obj in gc.get_referrers(tensor))


CACHED = object()


def holds(value: Any, is_foreign: Callable[[Any], bool], depth: int = 3) -> bool:
    if value is CACHED or is_foreign(value):
        return True
    if depth and isinstance(value, (list, tuple, set, collections.deque)) and len(value) <= LONG:
        return any(holds(item, is_foreign, depth - 1) for item in list(value))
    if depth and isinstance(value, dict) and len(value) <= LONG:
        return any(holds(item, is_foreign, depth - 1) for item in list(value.values()))
    return False
