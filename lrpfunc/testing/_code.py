"""What is drawn prints as code."""

from __future__ import annotations

import dataclasses
from typing import Any

import lrpfunc as lrp
from lrpfunc.composites import Composite, Entry, as_composite


class Pasteable:
    """A frozen dataclass that prints as the call that makes it: fields that have their default are left out."""

    def __repr__(self) -> str:
        given = [f"{field.name}={getattr(self, field.name)!r}" for field in self._changed()]
        return f"{type(self).__name__}({', '.join(given)})"

    def _changed(self) -> list[dataclasses.Field[Any]]:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return [field for field in fields if getattr(self, field.name) != field.default]


HEADER = "from lrpfunc import *\nfrom lrpfunc.testing import *"
"""With these imports everything that is drawn can be pasted."""

KNOWN: dict[str, Composite] = {
    "attn_lrp()": lrp.attn_lrp(),
    "cp_lrp()": lrp.cp_lrp(),
    "epsilon(0.1, stabilizer=0.1)": lrp.epsilon(0.1, stabilizer=0.1),
}
"""Composites that print as the call that makes them, wherever they are part of another one."""


def code(rules: lrp.Composite | list[Entry] | None) -> str:
    """A composite as code that makes it, with known recipes by their names."""
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
