"""`lrpfunc.testing` finds what is broken, and says so readably."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import lrpfunc as lrp
from lrpfunc import testing
from lrpfunc.testing import (
    Case,
    Linear,
    Net,
    Normalize,
    Pointwise,
    Residual,
    Start,
    assert_exact_derivatives,
    check_rule,
    composites,
    models,
    rules,
)
from lrpfunc.testing._code import code
from tests import mutants


@pytest.mark.parametrize("fault", mutants.RULES)
def test_check_rule_finds_a_broken_rule(fault: str) -> None:
    rule, expected = mutants.RULES[fault]
    slow = [] if expected == "exact_derivatives" else ["exact_derivatives"]  # to shrink
    with pytest.raises(AssertionError, match=r"fails \d of \d properties") as caught:
        check_rule(rule, examples=8, skip=slow)
    message = str(caught.value)
    assert f"\n{expected}: " in message
    _, _, report = message.partition(f"\n{expected}: ")
    assert "net = Net(" in report
    net, *_ = re.findall(r"net = Net\(.*", report)
    assert net.count("Linear(") + net.count("Conv(") <= 3, report  # what it found is small


DENSE = lrp.Dense | lrp.Convolution
VICTIMS: dict[str, tuple[lrp.Rule, tuple[Any, ...]]] = {
    "a batch norm is folded across a branch": (
        lrp.Epsilon(0.1),
        (Linear(3), Residual((Normalize("batch_norm"),))),
    ),
    "every input is taken to be non-negative": (lrp.ZPlus(0.1), (Linear(3), Pointwise("tanh"), Linear(2))),
    "one of two messages is lost": (lrp.Epsilon(0.1), (Linear(3), Residual((Pointwise("tanh"),)))),
    "a conversion is detached": (lrp.Flat(0.1), (Linear(3), Normalize("softmax"), Linear(2))),
}
"""A rule and a net by which each fault shows."""


@pytest.mark.parametrize("fault", mutants.LIBRARY)
def test_the_assertions_find_a_broken_library(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, expected = mutants.LIBRARY[fault]
    rule, blocks = VICTIMS[fault]
    case = Case(Net(blocks, (2, 4), seed=7), lrp.Composite([(DENSE, rule)]) + lrp.attn_lrp(), Start())
    case.check(expected)
    break_it(monkeypatch)
    # A net of its own, so that neither case uses what was recorded for the other.
    broken = replace(case, net=replace(case.net, blocks=(*blocks, Pointwise("scale"))))
    with pytest.raises(AssertionError):
        broken.check(expected)


def test_what_is_drawn_prints_as_code() -> None:
    """Whatever it is, evaluating what it prints gives it again."""

    @settings(max_examples=60)
    @given(drawn=models(), rule=rules(), composite=composites())
    def check(drawn: Net, rule: lrp.Rule, composite: lrp.Composite) -> None:
        names = {**vars(lrp), **vars(testing)}
        assert eval(repr(drawn), names) == drawn
        assert eval(repr(rule), names) == rule
        assert eval(code(composite), names | {"composites": None}) == composite

    check()


def test_a_model_is_the_same_as_a_module() -> None:
    net = Net((Linear(2), Normalize("batch_norm_module"), Pointwise("gelu")), (2, 3))
    model_fn, params = lrp.from_module(net.module())
    assert torch.equal(model_fn(params, net.input()), net(net.params(), net.input()))


def test_every_failure_is_reported() -> None:
    with pytest.raises(AssertionError, match="fails 2 of 6 properties: conservation, linear_in_relevance") as caught:
        check_rule(WrongTwice(), skip=["compiles", "exact_derivatives"], examples=5)
    assert str(caught.value).count("net = Net(") == 2


@dataclass(frozen=True, eq=False)
class WrongTwice(lrp.Rule):
    """Drops negative relevance, and does not say so."""

    def propagate(self, layer: lrp.BoundLayer, message: Any) -> tuple[Any, ...]:
        return lrp.Epsilon(0.1).propagate(layer, lrp.Relevance(message.value.relu()))


def test_the_walk_through_in_contributing() -> None:
    """Its snippets run, the rule passes, and each way to break it is found as it says."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    section = text.partition("## Write a rule of your own")[2].partition("## The invariants")[0]
    namespace: dict[str, Any] = {"__name__": __name__}
    for snippet in re.findall(r"```python\n(.*?)```", section, re.S):
        exec(compile(snippet, "CONTRIBUTING.md", "exec"), namespace)
    expected = {"Detached": "exact_derivatives", "Forgetful": "conservation", "Signless": "conservation"}
    for name, failing in {**expected, "Handwritten": "exact_derivatives"}.items():
        with pytest.raises(AssertionError, match=f"(?s)^{name}.*fails.*\n{failing}: "):
            check_rule(namespace[name](), examples=8, skip={*testing.PROPERTIES} - {failing})


def test_every_invariant_names_tests_that_exist() -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    table = text.partition("## The invariants")[2]
    sources = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    named = set(re.findall(r"\b(test_\w+)(?!\.py)\b(?!\.py)", table))
    assert len(named) > 15
    assert [name for name in named if f"def {name}(" not in sources] == []


def test_skip_names_properties() -> None:
    with pytest.raises(ValueError, match="skip names no property 'speed'"):
        check_rule(lrp.Epsilon(), skip=["speed"])


def test_a_kink_is_no_failure() -> None:
    """At the kink of a ReLU there is no derivative to compare with."""
    model_fn, params, x = Net((Pointwise(),), (1, 1), values="zero").case()
    assert not assert_exact_derivatives(model_fn, params, x, [(lrp.Activation, lrp.Pass())], target=0)


@pytest.mark.parametrize("rule", [lrp.Epsilon(), lrp.ZPlus(), lrp.Gamma(), lrp.AlphaBeta()], ids=repr)
def test_a_feature_narrower_than_the_steps_is_no_failure(rule: lrp.Rule) -> None:
    """Around zero, relevance bends within the stabilizer, 1e-6 by default."""
    net = Net((Linear(2, bias=False), Linear(2)), (1, 2, 2), values="zero")
    assert_exact_derivatives(*net.case(), [(lrp.Dense, rule)], target=0)
    check_rule(rule, examples=2, skip={*testing.PROPERTIES} - {"exact_derivatives"})


def test_hypothesis_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lrpfunc.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'lrpfunc[testing]'")):
        importlib.import_module("lrpfunc.testing")


def test_the_core_does_not_import_it() -> None:
    program = "import sys, lrpfunc; assert not {'hypothesis', 'lrpfunc.testing'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
