"""`lrpfunc.testing` finds what is broken, and says so readably."""

from __future__ import annotations

import pytest

import lrpfunc as lrp
from lrpfunc.testing import Branch, Case, Linear, Net, Normalize, Pointwise, Residual, check_rule
from tests import mutants


@pytest.mark.parametrize("fault", mutants.RULES)
def test_check_rule_finds_a_broken_rule(fault: str) -> None:
    rule, expected = mutants.RULES[fault]
    with pytest.raises(AssertionError, match=r"fails \d of 7 properties") as caught:
        check_rule(rule, examples=15)
    message = str(caught.value)
    assert f"\n{expected}: " in message
    _, _, report = message.partition(f"\n{expected}: ")
    assert "net = Net(" in report
    assert report.count("Linear(") + report.count("Conv(") <= 3, report  # what it found is small


@pytest.mark.parametrize("fault", mutants.LIBRARY)
def test_the_assertions_find_a_broken_library(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, expected = mutants.LIBRARY[fault]
    drawn = Net(BROKEN[fault], (2, 4), seed=7)
    case = Case(drawn, [(lrp.Dense, lrp.ZPlus(0.1))] + lrp.attn_lrp())
    case.check(expected)
    monkeypatch.setattr(lrp._run, "_cache", type(lrp._run._cache)(8))
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        case.check(expected)


BROKEN = {
    "a batch norm is folded across a branch": (Linear(3), Branch((Normalize("batch_norm"),), (Pointwise(),))),
    "every input is taken to be non-negative": (Linear(3), Pointwise("tanh"), Linear(2)),
    "one of two messages is lost": (Linear(3), Residual((Pointwise("tanh"),))),
    "a conversion is detached": (Linear(3), Normalize("softmax"), Pointwise("exp"), Linear(2)),
}
