"""The breakages that `python -m tests.breakages` draws."""

from __future__ import annotations

import ast

from tests.breakages import draw


def test_breakages_are_drawn_by_their_seed_and_are_python() -> None:
    drawn = draw(40, seed=3)
    assert list(map(str, drawn)) == list(map(str, draw(40, seed=3)))
    assert list(map(str, drawn)) != list(map(str, draw(40, seed=4)))
    assert {breakage.path.split("/")[1] for breakage in drawn} == {"_walk", "rules", "_layers"}
    for breakage in drawn:
        ast.parse(breakage.source)
