"""From a model function to a program, which is used again until something that it read changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lrpfunc import _tree as tree
from lrpfunc._capture.cache import Cache
from lrpfunc._capture.environment import Environment
from lrpfunc._capture.functional import functional
from lrpfunc._capture.identity import describe_tensor
from lrpfunc._capture.isolation import capture_lock, isolated, refuse_nested, surroundings
from lrpfunc._capture.program import Program
from lrpfunc._capture.trace import trace

_programs: Cache[Program] = Cache(128)


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
    reads = Environment(model_fn)
    statics = Environment(*(leaf for leaf in leaves if not isinstance(leaf, Tensor)))
    described = tuple(describe_tensor(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves)
    key = (reads.key, statics.key, described, spec, has_aux, inline, *surroundings())
    program = _programs.get(key)
    if program is None:
        refuse_nested()
        with capture_lock:
            program = _programs.get(key)  # another thread may have been first
            if program is None:
                traced = trace(model_fn, leaves, spec, has_aux, inline, reads.tensors)
                program = isolated(lambda: functional(traced))
                _name_inputs(program, args)
                if traced.stable:
                    _programs.put(key, program)
    return program, [*(leaf for leaf in leaves if isinstance(leaf, Tensor)), *program.enclosed(reads.tensors)]


def _name_inputs(program: Program, args: tuple[Any, ...]) -> None:
    """Writes the path of each parameter on its placeholder, for layers that have no module."""
    if args:
        paths = tree.flatten_with_path(args[0])[0]
        tensors = [(tree.path_name(path), leaf) for path, leaf in paths if isinstance(leaf, Tensor)]
        for node, (path, _) in zip(program.inputs, tensors, strict=False):
            node.meta["path"] = path or None
