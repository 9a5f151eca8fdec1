"""What was noticed of a model function, so that a warning about it is given once."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

from lrpfunc._capture.cache import Cache
from lrpfunc._capture.identity import identity
from lrpfunc._capture.module import ModelFunction

_noticed: Cache[int] = Cache(1024)


def times(model_fn: Callable[..., Any], what: Hashable) -> int:
    """How often that has been noticed of a model function, this time included."""
    key = (identity(subject_of(model_fn)), what)
    count = (_noticed.get(key) or 0) + 1
    _noticed.put(key, count)
    return count


def subject_of(model_fn: Any) -> Any:
    """What stays the same of a function that may be made anew for each call."""
    while isinstance(model_fn, functools.partial):
        model_fn = model_fn.func
    match model_fn:
        case ModelFunction():
            return model_fn.module
        case types.MethodType():
            return model_fn.__self__
        case types.FunctionType():
            return model_fn.__code__
    return model_fn


def name_of(model_fn: Any) -> str:
    """How a model function is called in a warning or a log: by the class of its module, or by its own name."""
    subject = subject_of(model_fn)
    return getattr(subject, "co_qualname", type(subject).__name__)
