"""How a model function is called, explained and run, said once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lrpfunc._errors import InputError

Argnums = int | tuple[int, ...]
Globs = str | Sequence[str] | None


@final
@dataclass(frozen=True)
class Options:
    """What `attribute` takes beside the model function and the rules; its docstring says what each means."""

    argnums: Argnums = 1
    has_aux: bool = False
    layers: Globs = None
    inline_functions: bool = False
    lowered: bool = True
    segments: int = 1

    def __post_init__(self) -> None:
        if self.segments < 1:
            raise InputError(
                f"segments={self.segments}: the forward pass is computed anew in 2 parts or more, or not at all, 1"
            )
        if self.segments > 1 and not self.lowered:
            raise InputError(
                f"segments={self.segments} divides the program that lowered=False does without. Leave out one of "
                "the two"
            )
        # As tuples they compare, hash and cannot change.
        if not isinstance(self.argnums, int):
            object.__setattr__(self, "argnums", tuple(self.argnums))
        if not isinstance(self.layers, str | None):
            object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def globs(self) -> tuple[str, ...]:
        """`layers`, always as a tuple."""
        return (self.layers,) if isinstance(self.layers, str) else tuple(self.layers or ())

    @property
    def numbers(self) -> tuple[int, ...]:
        """`argnums`, always as a tuple."""
        return (self.argnums,) if isinstance(self.argnums, int) else self.argnums
