"""What is drawn prints as code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import lrpfunc as lrp
from lrpfunc._api.target import Contrast, OneHot
from lrpfunc._torch import printoptions
from lrpfunc.composites import Composite, Entry, as_composite


def among(names: Iterable[str], allowed: Collection[str], what: str) -> tuple[str, ...]:
    """Names out of those that are allowed, checked; `what` they are given as."""
    if isinstance(names, str):
        raise TypeError(f"{what} is a list of names, not the string {names!r}: write {what}=[{names!r}]")
    names = tuple(names)
    if unknown := [name for name in names if name not in allowed]:
        raise ValueError(f"{what} has no {unknown[0]!r}: there are {', '.join(map(repr, allowed))}")
    return names


class Pasteable:
    """A frozen dataclass that prints as the call that makes it: fields that have their default are left out.

    What is annotated as a `Literal` is one of those names, and a tuple is a tuple.
    """

    def __post_init__(self) -> None:
        for name, allowed in _literals(type(self)).items():
            among([getattr(self, name)], allowed, f"{type(self).__name__}({name}=)")
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.type.startswith("tuple[") and not isinstance(value, tuple):
                made = repr(tuple(value)) if isinstance(value, list) else f"({value!r},)"
                raise TypeError(f"{type(self).__name__}({field.name}=) is a tuple, not {value!r}: write {made}")

    def __repr__(self) -> str:
        given = [f"{field.name}={getattr(self, field.name)!r}" for field in self._changed()]
        return f"{type(self).__name__}({', '.join(given)})"

    def _changed(self) -> list[dataclasses.Field[Any]]:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return [field for field in fields if getattr(self, field.name) != field.default]


@cache
def _literals(cls: type) -> dict[str, tuple[str, ...]]:
    """The fields that are one of some names, and those names."""
    hints = get_type_hints(cls)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def pasted(body: str) -> str:
    """Code below the imports that it needs."""
    header = ["from lrpfunc import *", "from lrpfunc.testing import *"]
    if re.search(r"\btorch\.", body):
        header.append("import torch")
    if re.search(r"\btensor\(", body):
        header.append("from torch import tensor")
    return "\n".join(header) + f"\n\n{body}"


def assigned(name: str, value: object) -> str:
    """A line that makes a value; a comment, if it does not print as code."""
    with printoptions(precision=17):
        text = repr(value)
    return f"{name} = {text}" if prints_as_code(value) else f"# {name} is the one that was passed, {text}"


def argument(value: object) -> str:
    """A target or another argument as code."""
    with printoptions(precision=17):
        match value:
            case OneHot():
                return f"one_hot({value.index!r}, {value.value!r})"
            case Contrast():
                return f"contrast({value.plus!r}, {value.minus!r})"
            case _:
                return repr(value)


def prints_as_code(value: object) -> bool:
    return "<" not in repr(value)


KNOWN: dict[str, Composite] = {
    "attn_lrp()": lrp.attn_lrp(),
    "cp_lrp()": lrp.cp_lrp(),
    "epsilon(0.1, stabilizer=0.1)": lrp.epsilon(0.1, stabilizer=0.1),
}
"""Composites that print as the call that makes them, wherever they are part of another one."""


def code(rules: lrp.Composite | list[Entry] | None) -> str:
    """A composite as code that makes it, with known recipes by their names."""
    with printoptions(precision=17):
        return _code(rules)


def _code(rules: lrp.Composite | list[Entry] | None) -> str:
    if rules is None:
        return "None"
    composite = as_composite(rules)
    whole = next((name for name, known in KNOWN.items() if known == composite), None)
    if whole is not None:
        return whole
    if composite.cotangent:
        return repr(composite)
    parts = [part if isinstance(part, str) else repr(part) for part in _parts(list(composite.entries))]
    return " + ".join(parts) or "[]"


def _parts(entries: list[Entry]) -> list[str | list[Entry]]:
    parts: list[str | list[Entry]] = []
    while entries:
        found = next((item for item in KNOWN.items() if _starts(entries, item[1])), None)
        if found is not None:
            parts.append(found[0])
            entries = entries[len(found[1].entries) :]
        elif parts and isinstance(parts[-1], list):
            parts[-1].append(entries.pop(0))
        else:
            parts.append([entries.pop(0)])
    return parts


def _starts(entries: list[Entry], known: Composite) -> bool:
    count = len(known.entries)
    return count > 0 and tuple(entries[:count]) == tuple(known.entries)
