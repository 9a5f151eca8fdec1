"""How a model function is called, explained and run, said once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

from lrpfunc._errors import InputError

Argnums = int | tuple[int, ...]
Argnames = str | Sequence[str] | None
Globs = str | nn.Module | Sequence[str | nn.Module] | None


@final
@dataclass(frozen=True)
class Options:
    """What `attribute` takes beside the model function and the rules; its docstring says what each means."""

    argnums: Argnums = 1
    has_aux: bool = False
    layers: str | Sequence[str] | None = None
    inline_functions: bool = False
    lowered: bool = True
    segments: int = 1
    argnames: Argnames = None
    dynamic: bool | None = None

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
        if self.argnames is not None and self.argnums != 1:
            raise InputError(
                f"argnums={self.argnums} and argnames={self.argnames!r} both say what is explained; leave one out"
            )
        # As tuples they compare, hash and cannot change.
        if not isinstance(self.argnums, int):
            object.__setattr__(self, "argnums", tuple(self.argnums))
        if not isinstance(self.layers, str | None):
            object.__setattr__(self, "layers", tuple(self.layers))
        if not isinstance(self.argnames, str | None):
            object.__setattr__(self, "argnames", tuple(self.argnames))

    @property
    def globs(self) -> tuple[str, ...]:
        """`layers`, always as a tuple."""
        return (self.layers,) if isinstance(self.layers, str) else tuple(self.layers or ())

    @property
    def explained(self) -> tuple[int | str, ...]:
        """The arguments to explain, by number or name, always as a tuple."""
        explained = self.argnums if self.argnames is None else self.argnames
        return explained if isinstance(explained, tuple) else (explained,)  # type: ignore[return-value]

    @property
    def is_single(self) -> bool:
        """Whether one argument is explained, and not a tuple of them."""
        return isinstance(self.argnums if self.argnames is None else self.argnames, int | str)
