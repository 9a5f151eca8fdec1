"""The library and an LRP written apart from it say the same: value, relevance, the balance, a derivative."""

from __future__ import annotations

import ast
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

import lrpfunc as lrp
from lrpfunc.testing import (
    Branch,
    Conv,
    Gated,
    InPlace,
    Linear,
    Loop,
    Net,
    Normalize,
    Pointwise,
    Pool,
    Rearrange,
    Residual,
    SelfAttention,
)
from tests.cases import COMPOSITES
from tests.oracle import composites
from tests.oracle.compare import ATTENTION, COTANGENT, ENTRIES, RECIPES, Compared, Model, Target, outcomes
from tests.oracle.tape import record


def agree(models: range, each: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for number in models:
        for outcome in outcomes(number, each):
            counts[outcome.says] += 1
            assert outcome.says in ("agree", "agree, at a kink", "refused"), outcome.detail
    return counts


NETS = [
    Net((Linear(3), Normalize("softmax"), Linear(2)), (2, 3)),
    Net((Conv(2, 3, padding=1), Normalize("batch_norm"), Pointwise(), Pool(), Linear(2)), (2, 2, 4, 3)),
    Net((SelfAttention(2, 2, causal=True), Normalize(), Gated("swiglu"), Linear(2)), (2, 3, 4)),
    Net((SelfAttention(1, 2, spelling="fused"), Linear(2), Normalize("batch_norm"), Pool("sum"), Linear(2)), (2, 3, 2)),
    Net((Loop("lstm", 2), Normalize("rms_norm"), Linear(2), Normalize("l2"), Linear(2)), (2, 3, 2)),
    Net((Linear(3, False, "matmul"), InPlace("add_"), Pointwise("gelu_written"), Branch((Linear(2),), (), "mul"))),
    Net((Linear(3), Normalize("batch_norm"), Residual((Pointwise("tanh"),)), Pointwise("sigmoid"), Linear(2))),
    Net((Conv(2, 2, stride=2, groups=2, transposed=True), Pool("max"), InPlace("rows"), Linear(2)), (1, 2, 3)),
    Net((Linear(4), Pointwise("exp"), Rearrange("masked"), Gated("highway"), Branch((Linear(4),), (), "max"))),
    Net((Gated("squeeze"), Normalize("group_norm"), Pointwise("shift"), Rearrange("stack"), Linear(2)), (1, 2, 3, 3)),
]
COMPOSED = [
    "attn_lrp() + epsilon_plus(0.1, stabilizer=0.1)",
    "epsilon_gamma_box(-4.0, 4.0, 0.1, stabilizer=0.1) + cp_lrp()",
    "[(Activation, Gradient()), (Dense, AlphaBeta(1.5, 0.5, 0.1))] + attn_lrp() + epsilon(0.1, stabilizer=0.1)",
    "guided_backprop()",
]


@pytest.mark.parametrize("net", NETS, ids=lambda net: "-".join(type(block).__name__ for block in net.blocks))
def test_every_kind_of_block(net: Net) -> None:
    compared = Compared(Model(*net.case(), repr(net)), random.Random(1))
    smooth = [
        compared.check(text, Target(kind, 0, 1), lowered=False)
        for text, kind in zip(COMPOSED, ("index", "numbers", "contrast", "everything"), strict=True)
    ]
    assert any(smooth)


def test_drawn_cases() -> None:
    counts = agree(range(6), 3)
    assert counts["agree"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("first", range(400, 525, 25))
def test_a_thousand_drawn_cases(first: int) -> None:
    counts = agree(range(first, first + 25), 8)
    assert sum(counts.values()) == 200
    assert counts["agree"] >= 100
    assert counts["refused"] <= 40


def test_every_rule_and_composite_is_drawn() -> None:
    drawn = " ".join((*ENTRIES, *RECIPES, *ATTENTION, *COTANGENT))
    public = [
        name for name in lrp.__all__ if isinstance(thing := getattr(lrp, name), type) and issubclass(thing, lrp.Rule)
    ]
    assert {"Epsilon", "TaylorSoftmax"} <= {*public}
    assert [name for name in public if name != "Rule" and f"{name}(" not in drawn] == []
    assert [name for name in COMPOSITES if f"{name}(" not in drawn] == []
    assert {name for name in public if name != "Rule"} == {*composites.RULES}


def test_the_oracle_imports_nothing_of_the_library() -> None:
    """But the drawing of models, and in `compare` the public names that are compared with."""
    for path in (Path(__file__).parent / "oracle").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            library = {name for name in names if name.startswith("lrpfunc")}
            assert library <= ({"lrpfunc", "lrpfunc.testing"} if path.name == "compare.py" else set()), path


def test_two_views_of_one_memory_read_the_same_numbers() -> None:
    def model(params: None, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        row = y[0]
        y.t()[1].mul_(2.0)
        row[0] = row[1]
        return y

    tape, ids, output, _ = record(model, None, torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    assert [entry.name for entry in tape.entries] == ["clone", "mul", "write"]
    assert tape.values[output].tolist() == [[4.0, 4.0], [3.0, 8.0]]
    clone, double, write = tape.entries
    assert clone.moved is not None
    assert clone.moved.tolist() == ids.tolist()
    assert write.moved is not None
    assert write.moved.tolist() == [double.output[0].item()]
