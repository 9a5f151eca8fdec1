"""What Dynamo does not follow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, around which torch.compile breaks its graph."""

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_dynamo_compiling():
            from lrpfunc._api.dynamo import call_outside  # imports torch._dynamo

            return call_outside(function, args, kwargs)
        return function(*args, **kwargs)

    return outside
