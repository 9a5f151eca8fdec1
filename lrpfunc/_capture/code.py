"""What code mentions: the globals and attributes it names, and the modules it imports."""

from __future__ import annotations

import dis
import functools
import importlib.util
import sys
import types
from dataclasses import dataclass

# What reads of a module, or of a function's own globals, names that do not stand in the code.
_COMPUTED_GLOBALS = frozenset({"globals", "eval", "exec"})
_COMPUTED = frozenset({"getattr", "vars", "dir", "attrgetter", "__dict__", "__getattribute__", "getmembers"})


@dataclass(frozen=True)
class Mentions:
    """What a piece of code, and the code inside it, names.

    Attributes:
        read: The globals that it reads, in order.
        written: The globals that it sets.
        names: All attributes and globals.
        imports: The modules that it imports when it runs, and how many packages up each is looked for.
        computes: Whether it may read a module by a name that is computed.
        computes_globals: Whether it may read its own globals so.
    """

    read: tuple[str, ...]
    written: tuple[str, ...]
    names: frozenset[str]
    imports: tuple[tuple[str, int], ...]
    computes: bool
    computes_globals: bool


@functools.lru_cache(4096)
def mentions(code: types.CodeType) -> Mentions:
    read: dict[str, None] = {}
    written: dict[str, None] = {}
    imports: dict[tuple[str, int], None] = {}
    names = set(code.co_names)
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for place, step in enumerate(steps):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read[step.argval] = None
        elif step.opname in ("STORE_GLOBAL", "STORE_NAME"):
            written[step.argval] = None
        elif step.opname == "IMPORT_NAME":
            imports[step.argval, steps[place - 2].argval] = None  # the level, then what is imported from it
    for inner in (mentions(const) for const in code.co_consts if isinstance(const, types.CodeType)):
        read |= dict.fromkeys(inner.read)
        written |= dict.fromkeys(inner.written)
        imports |= dict.fromkeys(inner.imports)
        names |= inner.names
    computes_globals = not _COMPUTED_GLOBALS.isdisjoint(read)
    computes = computes_globals or not _COMPUTED.isdisjoint(names)
    return Mentions(tuple(read), tuple(written), frozenset(names), tuple(imports), computes, computes_globals)


def imported(name: str, level: int, package: str | None) -> list[types.ModuleType]:
    """The modules that `import name` gives, if somebody has imported them: each package on the way, too."""
    if level:
        try:
            name = importlib.util.resolve_name("." * level + name, package or "")
        except ImportError:
            return []
    parts = name.split(".")
    found = (sys.modules.get(".".join(parts[: end + 1])) for end in range(len(parts)))
    return [module for module in found if isinstance(module, types.ModuleType)]
