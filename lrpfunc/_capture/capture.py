"""From a model function to a program, which is used again until something that it read changes."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

from torch import Tensor

from lrpfunc import _tree as tree
from lrpfunc._capture.cache import Cache
from lrpfunc._capture.environment import Environment
from lrpfunc._capture.family import Family, Opened
from lrpfunc._capture.functional import functional
from lrpfunc._capture.identity import describe_tensor
from lrpfunc._capture.isolation import alone, isolated, surroundings
from lrpfunc._capture.numbers import all_hold
from lrpfunc._capture.program import Program
from lrpfunc._capture.refused import check_tensor, check_tensor_type
from lrpfunc._capture.shapes import layout
from lrpfunc._capture.trace import Call, Trace, trace
from lrpfunc._capture.warned import name_of, times
from lrpfunc._errors import CaptureWarning, warn
from lrpfunc._ops.symbols import has_open_sizes, hint
from lrpfunc._torch import constant

_SIZE = 128
_ALTERNATIVES = 8  # programs for one key, which differ in numbers that were read out of tensors

logger = logging.getLogger("lrpfunc")


class _Recorded:
    """The programs that were recorded: those for certain sizes, and those that leave some open."""

    def __init__(self) -> None:
        self.exact: Cache[tuple[Program, ...]] = Cache(_SIZE)
        self.families: Cache[Family] = Cache(_SIZE)


_recorded = _Recorded()


def capture(
    model_fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    has_aux: bool,
    inline: bool,
    dynamic: bool | None = False,
) -> tuple[Program, list[Tensor]]:
    """What the model function does with such arguments, as a program, and the tensors to run it on.

    Args:
        model_fn: The function.
        args: Its arguments.
        kwargs: Its keyword arguments.
        has_aux: Whether it returns `(output, aux)`.
        inline: Whether a custom `autograd.Function` is taken for the operations of its forward.
        dynamic: Whether the program may leave sizes open: `None` for those that have differed from call to call.
    """
    leaves, spec = tree.flatten((args, kwargs))
    roots = [model_fn, *(leaf for leaf in leaves if not isinstance(leaf, Tensor)), *tree.foreign(spec)]
    reads = Environment(*roots)
    call = Call(model_fn, leaves, spec, has_aux, inline, reads, roots)
    given = call.given
    for kind in {type(tensor) for tensor in (*given, *reads.tensors)}:
        check_tensor_type(kind)
    around = (reads.key, tuple(isinstance(leaf, Tensor) for leaf in leaves), spec, has_aux, inline, *surroundings())
    loose = _loose(args, len(given)) if dynamic is not False else range(0)
    recorded = _recorded  # what `clear_cache` begins anew gets no program that was recorded before
    look = _Look(recorded, around, given, [None, *reads.tensors, *given], loose, dynamic is True)
    program = look.found()
    if program is None:
        changed = None
        with alone():
            program = look.found()  # another thread may have been first
            if program is None:
                program, traced = look.recorded(functools.partial(_record, call, args))
                changed = traced.changed
        _warn(model_fn, reads.unknown, changed)
    constant(look.read[place] for number in program.numbers for place in number.places)
    return program, [*program.arranged(given), *program.enclosed(reads.tensors)]


class _Look:
    """A look for the program that serves a call.

    Args:
        cache: Where programs are kept.
        around: What they depend on beside the tensors.
        given: The tensors.
        read: What numbers may have been read from, in the order of a trace's placeholders.
        loose: The places of the tensors that may have open sizes.
        always: Whether all of these are open at once.
    """

    def __init__(
        self,
        cache: _Recorded,
        around: Hashable,
        given: Sequence[Tensor],
        read: Sequence[Tensor | None],
        loose: Collection[int],
        always: bool,
    ):
        self._cache, self._around, self._given, self.read = cache, around, given, read
        self._loose, self._always = loose, always
        open_now = {place for place in loose if _is_open(given[place])}  # while a compiler traces
        self._described = [None if i in open_now else describe_tensor(tensor) for i, tensor in enumerate(given)]
        self._exact = None if open_now else (around, tuple(self._described))

    @functools.cached_property
    def _family(self) -> Family | None:
        """The programs for arguments that differ from these in the sizes of those that are loose."""
        if not self._loose:
            return None
        described = (
            _loosely(tensor) if place in self._loose else self._described[place]
            for place, tensor in enumerate(self._given)
        )
        key = (self._around, self._always, *described)
        family = self._cache.families.get(key)
        if family is None:
            family = Family(self._loose, self._always)
            self._cache.families.put(key, family)
        return family

    def found(self) -> Program | None:
        """The program, if there is one. One for certain sizes is of no use to who wants them open."""
        if not self._always and (exact := self._found_exact()):
            return exact
        family = self._family
        program = family and family.found(self._given, self.read)
        if program is None and self._always and not (family and family.opened(self._given)):
            return self._found_exact()
        return program

    def _found_exact(self) -> Program | None:
        programs = self._exact and self._cache.exact.get(self._exact)
        return next((program for program in programs or () if all_hold(program.numbers, self.read)), None)

    def recorded(self, record: Callable[[Opened], tuple[Program, Trace]]) -> tuple[Program, Trace]:
        """A new program, which is kept if it may be."""
        family = self._family
        program, traced = (family and family.recorded(record, self._given)) or record({})
        if family and program.shapes is None:
            family.close()
        if family and program.shapes and traced.stable:
            family.add(program)
        elif traced.stable:
            key = self._exact or (self._around, tuple(map(describe_tensor, self._given)))
            self._cache.exact.put(key, (program, *(self._cache.exact.get(key) or ()))[:_ALTERNATIVES])
        return program, traced


def _is_open(tensor: Tensor) -> bool:
    check_tensor(tensor)  # of which some have no sizes
    return has_open_sizes(tensor)


def _loosely(tensor: Tensor) -> Hashable:
    """What of a tensor with open sizes a recording can depend on."""
    return tensor.ndim, tensor.dtype, tensor.device, layout(tensor)


def _loose(args: tuple[Any, ...], count: int) -> range:
    """The places of the tensors that are data: of all arguments but the parameters, if there are several."""
    parameters = sum(isinstance(leaf, Tensor) for leaf in tree.leaves(args[0])) if args else 0
    return range(parameters % count if count else 0, count)


def _record(call: Call, args: tuple[Any, ...], opened: Opened) -> tuple[Program, Trace]:
    """A program, recorded with these sizes open, and the trace that it was made of."""
    started, name = time.perf_counter(), name_of(call.model_fn)
    data = ", ".join(_shape(call.given[i], opened.get(i, ())) for i in _loose(args, len(call.given)))
    logger.info("recording %s for %s", name, data)
    traced = trace(call, opened)
    program = isolated(lambda: functional(traced))
    _name_inputs(program, args)
    if (seconds := time.perf_counter() - started) > 1:
        logger.info("recorded %s for %s in %.1f s", name, data, seconds)
    return program, traced


def _shape(tensor: Tensor, opened: Collection[int]) -> str:
    """The sizes of a tensor, with a star for each that is left open."""
    sizes = ("*" if d in opened else str(hint(size)) for d, size in enumerate(tensor.shape))
    return f"({', '.join(sizes)})"


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
    global _recorded
    before, _recorded = _recorded, _Recorded()
    before.exact.clear()  # a call that is under way may hold it
    before.families.clear()


def _warn(model_fn: Callable[..., Any], unknown: Sequence[str], changed: str | None) -> None:
    """Says once of a function that it is recorded anew at every call, and why."""
    if not unknown and changed is None:
        return
    name = unknown[0] if unknown else changed
    # What changes once, such as a flag that is set at the first call, does no harm.
    if times(model_fn, name) != (1 if unknown else 2):
        return
    text = (
        f"the model function ({name_of(model_fn)}) is recorded anew at every call, which takes far longer than the "
        "call itself: "
    )
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


def _name_inputs(program: Program, args: tuple[Any, ...]) -> None:
    """Writes the path of each parameter on its placeholder, for layers that have no module."""
    if args:
        paths = tree.flatten_with_path(args[0])[0]
        tensors = [(tree.path_name(path), leaf) for path, leaf in paths if isinstance(leaf, Tensor)]
        for node, (path, _) in zip(program.inputs, tensors, strict=False):
            node.meta["path"] = path or None
