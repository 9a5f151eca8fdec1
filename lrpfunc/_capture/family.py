"""The programs of one function for arguments that differ in their sizes alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lrpfunc._capture.numbers import all_hold
from lrpfunc._capture.program import Program
from lrpfunc._capture.shapes import Dim
from lrpfunc._torch import hint

_MANY = 8


class Family:
    """The programs of one function for arguments that differ in their sizes alone.

    The first has the sizes of its recording. Once another size comes, it is left open in the next,

        (2, 9, 8)    recorded for (2, 9, 8)
        (2, 5, 8)    recorded for (2, s0, 8)
        (2, 7, 8)    served by the second
        (4, 7, 8)    recorded for (s0, s1, 8)
    """

    def __init__(self) -> None:
        self._programs: tuple[Program, ...] = ()
        self._first: list[Sequence[int]] = []
        self._open: set[Dim] = set()
        self._closed: set[Dim] = set()

    def found(self, given: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> Program | None:
        """The program that is right for these sizes, and for the numbers that were read."""
        fitting = (program for program in self._programs if program.fits(given))
        return next((program for program in fitting if all_hold(program.numbers, tensors)), None)

    def opened(self, given: Sequence[Tensor], among: Collection[int], always: bool) -> dict[int, list[int]]:
        """Which sizes of which tensors the next recording should leave open.

        Args:
            given: The tensors.
            among: The places of those that may have open sizes.
            always: Whether all are to be open, and not only those that have differed.
        """
        first = self._first = self._first or [tuple(map(hint, tensor.shape)) for tensor in given]
        for place in among:
            for d, (now, before) in enumerate(zip(given[place].shape, first[place], strict=True)):
                if always or isinstance(now, torch.SymInt) or now != before:
                    self._open.add((place, d))
        for program in self._programs:
            self._closed |= set(program.shapes.closed() if program.shapes else ())
        opened: dict[int, list[int]] = {}
        for place, d in sorted(self._open - self._closed):
            if hint(given[place].shape[d]) > 1:
                opened.setdefault(place, []).append(d)
        return opened

    def add(self, program: Program) -> None:
        """Keeps a program for later."""
        self._programs = (program, *self._programs)[:_MANY]

    def close(self, opened: dict[int, list[int]]) -> None:
        """Leaves sizes open no longer: the function cannot be recorded so."""
        self._closed |= {(place, d) for place, dims in opened.items() for d in dims}
