"""The suite notices a library that is broken in one place."""

from __future__ import annotations

import ast

import pytest

from tests.breakages import draw, preload, survivors


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
def test_a_dozen_random_breakages_are_noticed(part: int) -> None:
    preload()
    survived = survivors(draw(12, seed=0)[part::2], print)
    assert [str(breakage) for breakage in survived if breakage.known is None] == []


def test_breakages_are_drawn_by_their_seed_and_are_python() -> None:
    drawn = draw(40, seed=3)
    assert list(map(str, drawn)) == list(map(str, draw(40, seed=3)))
    assert list(map(str, drawn)) != list(map(str, draw(40, seed=4)))
    assert {breakage.path.split("/")[1] for breakage in drawn} == {"_walk", "rules", "_layers"}
    for breakage in drawn:
        ast.parse(breakage.source)
