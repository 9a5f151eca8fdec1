"""From a model function to a program, which is used again until something that it read changes."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lrpfunc import _tree as tree
from lrpfunc._capture.cache import Cache
from lrpfunc._capture.environment import Environment
from lrpfunc._capture.functional import functional
from lrpfunc._capture.identity import describe_tensor, identity
from lrpfunc._capture.isolation import alone, isolated, surroundings
from lrpfunc._capture.module import ModelFunction
from lrpfunc._capture.program import Program
from lrpfunc._capture.trace import trace
from lrpfunc._errors import CaptureWarning, warn

_SIZE = 128
_programs: Cache[Program] = Cache(_SIZE)
_noticed: Cache[int] = Cache(1024)


def capture(
    model_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, has_aux: bool, inline: bool
) -> tuple[Program, list[Tensor]]:
    """What the model function does with such arguments, as a program, and the tensors to run it on.

    Args:
        model_fn: The function.
        args: Its arguments.
        kwargs: Its keyword arguments.
        has_aux: Whether it returns `(output, aux)`.
        inline: Whether a custom `autograd.Function` is taken for the operations of its forward.
    """
    leaves, spec = tree.flatten((args, kwargs))
    roots = [model_fn, *(leaf for leaf in leaves if not isinstance(leaf, Tensor)), *tree.foreign(spec)]
    reads = Environment(*roots)
    described = tuple(describe_tensor(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves)
    key = (reads.key, described, spec, has_aux, inline, *surroundings())
    programs = _programs  # what `clear_cache` begins anew gets no program that was recorded before
    program = programs.get(key)
    if program is None:
        changed = None
        with alone():
            program = programs.get(key)  # another thread may have been first
            if program is None:
                traced = trace(model_fn, leaves, spec, has_aux, inline, reads, roots)
                program = isolated(lambda: functional(traced))
                _name_inputs(program, args)
                if traced.stable:
                    programs.put(key, program)
                changed = traced.changed
        _warn(model_fn, reads.unknown, changed)
    return program, [*(leaf for leaf in leaves if isinstance(leaf, Tensor)), *program.enclosed(reads.tensors)]


def clear_cache() -> None:
    """Forgets every recorded program, so that the next call of each relevance function records its model anew.

    Calls do that by themselves whenever something changed that they look up; what they look up, and what not, is
    listed in the documentation. This is for the rest: after editing an installed package in a running session, or
    after a change of a file that a model function reads. Programs that are running in other threads are not disturbed,
    and none that was recorded before the call is used after it.

    Example:
        >>> import pathlib, tempfile, torch, lrpfunc as lrp
        >>> file = pathlib.Path(tempfile.mkdtemp(), "scale.txt")
        >>> _ = file.write_text("2.0")
        >>> relevance_fn = lrp.attribute(lambda x: x * float(file.read_text()), lrp.gradient(), argnums=0)
        >>> relevance_fn(torch.ones(1, 1))
        tensor([[2.]])
        >>> _ = file.write_text("3.0")  # a file is read only while the model function is recorded
        >>> lrp.clear_cache()
        >>> relevance_fn(torch.ones(1, 1))
        tensor([[3.]])
    """
    global _programs
    _programs = Cache(_SIZE)


def _warn(model_fn: Callable[..., Any], unknown: Sequence[str], changed: str | None) -> None:
    """Says once of a function that it is recorded anew at every call, and why."""
    if not unknown and changed is None:
        return
    name = unknown[0] if unknown else changed
    subject = _subject(model_fn)
    key = (identity(subject), name)
    times = (_noticed.get(key) or 0) + 1
    _noticed.put(key, times)
    # What changes once, such as a flag that is set at the first call, does no harm.
    if times != (1 if unknown else 2):
        return
    what = getattr(subject, "co_qualname", type(subject).__name__)
    text = f"the model function ({what}) is recorded anew at every call, which takes far longer than the call itself: "
    if unknown:
        text += (
            f"it can read `{name}`, and what is in such an object cannot be seen, so that it may be another at each "
            "call. Read it outside of the model function, and pass what comes out of it as an argument, for example"
            "\n\n    relevance_fn(params, x, scale=next(scales))"
        )
    else:
        text += (
            f"it changes `{name}`, which is part of what it reads, each time it runs. Change that outside of the model "
            "function, or return the new value beside the output, for example\n\n"
            "    return output, calls + 1  # lrpfunc.attribute(model_fn, rules, has_aux=True)"
        )
    warn(text, CaptureWarning)


def _subject(model_fn: Any) -> Any:
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


def _name_inputs(program: Program, args: tuple[Any, ...]) -> None:
    """Writes the path of each parameter on its placeholder, for layers that have no module."""
    if args:
        paths = tree.flatten_with_path(args[0])[0]
        tensors = [(tree.path_name(path), leaf) for path, leaf in paths if isinstance(leaf, Tensor)]
        for node, (path, _) in zip(program.inputs, tensors, strict=False):
            node.meta["path"] = path or None
