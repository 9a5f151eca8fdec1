"""The programs of one function for arguments that differ in their sizes alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from lrpfunc._capture.numbers import all_hold
from lrpfunc._capture.program import Program
from lrpfunc._capture.shapes import Dim
from lrpfunc._capture.trace import Trace
from lrpfunc._ops.symbols import hint

_MANY = 8

logger = logging.getLogger("lrpfunc")

Opened = dict[int, list[int]]
"""The dimensions that are left open, by the places of the tensors."""


class Family:
    """The programs of one function for arguments that differ in their sizes alone.

    The first has the sizes of its recording. Once another size comes, it is left open in the next,

        (2, 9, 8)    recorded for (2, 9, 8)
        (2, 5, 8)    recorded for (2, s0, 8)
        (2, 7, 8)    served by the second
        (4, 7, 8)    recorded for (s0, s1, 8)

    Args:
        loose: The places of the tensors that may have open sizes.
        always: Whether all of these are open at once, and not only those that have differed.
    """

    def __init__(self, loose: Collection[int], always: bool) -> None:
        self._loose, self._always = loose, always
        self._programs: tuple[Program, ...] = ()
        self._first: list[Sequence[int]] = []
        self._open: set[Dim] = set()
        self._closed: set[Dim] = set()
        self._doubtful: set[Dim] = set()

    def found(self, given: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> Program | None:
        """The program that is right for these sizes, and for the numbers that were read."""
        fitting = (program for program in self._programs if program.fits(given))
        return next((program for program in fitting if all_hold(program.numbers, tensors)), None)

    def recorded(
        self, record: Callable[[Opened], tuple[Program, Trace]], given: Sequence[Tensor]
    ) -> tuple[Program, Trace] | None:
        """A program that leaves sizes open, or `None` if that makes none that would serve others.

        Args:
            record: Records the function with those sizes open.
            given: The tensors.
        """
        opened = self.opened(given)
        self._doubtful = {(place, d) for place, dims in opened.items() for d in dims}
        if not opened:
            return None
        try:
            program, traced = record(opened)
        except Exception as error:  # of whatever kind: it comes again without, if it is about something else
            logger.info("the function cannot be recorded with open sizes: %s: %s", type(error).__name__, error)
        else:
            closed = program.shapes.closed() if program.shapes else []
            if closed:
                logger.info("a recording closes sizes that differ, as a loop in Python does: %s", _shown(closed))
            if len(closed) < len(self._doubtful):
                return program, traced
        return None

    def close(self) -> None:
        """Says that the function can be recorded if no size is open: then it was about those that were."""
        self._closed |= self._doubtful

    def add(self, program: Program) -> None:
        """Keeps a program for later."""
        self._programs = (program, *self._programs)[:_MANY]

    def opened(self, given: Sequence[Tensor]) -> Opened:
        """Which sizes the next recording should leave open."""
        first = self._first = self._first or [tuple(map(hint, tensor.shape)) for tensor in given]
        for place in self._loose:
            for d, (now, before) in enumerate(zip(given[place].shape, first[place], strict=True)):
                if self._always or isinstance(now, torch.SymInt) or now != before:
                    self._open.add((place, d))
        for program in self._programs:
            self._closed |= set(program.shapes.closed() if program.shapes else ())
        opened: Opened = {}
        for place, d in sorted(self._open - self._closed):
            if hint(given[place].shape[d]) > 1:
                opened.setdefault(place, []).append(d)
        return opened


def _shown(dims: Collection[Dim]) -> str:
    return ", ".join(f"dimension {d} of tensor {place}" for place, d in dims)
