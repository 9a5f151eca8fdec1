"""The default composite serves architectures that people use: the rows of `benchmarks/zoo.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor, nn

import lrpfunc as lrp
from benchmarks.entry import Entry, entry, normal, randomized
from benchmarks.zoo import ZOO, Result, measure, summary

FAST = (
    *("squeezenet1_1", "vit_b_16", "llama-sdpa", "gpt2-eager", "mamba-eager"),
    *("bert_ids-sdpa", "clip-sdpa", "wav2vec2-eager"),
)


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ZOO])
def test_row(name: str):
    """Relevance is accounted for, and its derivative equals finite differences."""
    assert measure(name, ZOO[name], timed=False).errors == []


def test_fast_rows_exist():
    assert set(FAST) <= set(ZOO)


# --------------------------------------------------------------------------------------------------------------
# The rows would notice


@dataclass(frozen=True, eq=False)
class Share(lrp.Rule):
    """A share of what `Epsilon` gives, without an account of the rest, and perhaps without derivatives."""

    share: float = 1.0
    detach: bool = False

    def propagate(self, layer: lrp.BoundLayer, message: Any) -> tuple[Any, ...]:
        (given,) = lrp.Epsilon().propagate(layer, message)
        relevance = self.share * given.relevance(layer.input)
        return (lrp.Relevance(relevance.detach() if self.detach else relevance),)

    def absorbed(self, layer: lrp.BoundLayer, message: Any) -> dict[str, Tensor]:
        return lrp.Epsilon().absorbed(layer, message)


def two_layers() -> Entry:
    return entry(randomized(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))), normal(1, 6))


def measured(last: lrp.Rule) -> Result:
    rules = lrp.Composite([(lrp.last(lrp.Dense), last), (lrp.Dense, lrp.Epsilon())])
    return measure("two layers", two_layers, rules)


def test_a_correct_row_passes():
    result = measured(Share())
    assert result.errors == []
    assert summary([result]) == "1 of 1 rows pass."


@pytest.mark.parametrize(
    ("rule", "error"),
    [(Share(share=0.9), "residual .* > 1e-06"), (Share(detach=True), "derivative .* > 1e-04")],
    ids=["lost relevance", "lost derivative"],
)
def test_a_wrong_row_fails(rule: lrp.Rule, error: str):
    (found,) = measured(rule).errors
    assert re.match(error, found)


def test_an_error_is_part_of_the_row():
    def fails() -> Entry:
        raise ValueError("no such model\n\n    try another")

    result = measure("none", fails)
    assert summary([result]) == ("0 of 1 rows pass.\n  none: model: ValueError: no such model | try another")
