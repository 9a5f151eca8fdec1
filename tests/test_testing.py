"""`lrpfunc.testing` finds what is broken, and says so readably."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

import lrpfunc as lrp
from lrpfunc import testing
from lrpfunc.testing import (
    Case,
    InPlace,
    Linear,
    Loop,
    Net,
    Normalize,
    Pointwise,
    Residual,
    Start,
    assert_exact_derivatives,
    assert_linear_in_relevance,
    assert_pure,
    assert_samples_apart,
    assert_vmap_equals_loop,
    check_rule,
    composites,
    inputs,
    models,
    rules,
    targets,
    with_tensors,
)
from lrpfunc.testing._code import code
from tests import mutants


@pytest.mark.parametrize("fault", mutants.RULES)
def test_check_rule_finds_a_broken_rule(fault: str) -> None:
    rule, expected = mutants.RULES[fault]
    with pytest.raises(AssertionError, match=r"fails 1 of 1 properties") as caught:
        check_rule(rule, examples=8, skip={*testing.PROPERTIES} - {expected})
    message = str(caught.value)
    assert f"\n{expected}: " in message
    _, _, report = message.partition(f"\n{expected}: ")
    assert "net = Net(" in report
    net, *_ = re.findall(r"net = Net\(.*", report)
    assert net.count("Linear(") + net.count("Conv(") <= 3, report  # what it found is small
    assert ("strided" in fault) == ("stride=2" in net), report


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

SAYS = {
    "conservation": "the balance does not close",
    "gradient_equivalence": "differ by",
    "exact_derivatives": "by finite differences",
}
"""How each property says that it does not hold."""


@pytest.mark.parametrize("fault", mutants.LIBRARY)
def test_the_assertions_find_a_broken_library(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, expected = mutants.LIBRARY[fault]
    rule, blocks = VICTIMS[fault]
    case = Case(Net(blocks, (2, 4), seed=7), lrp.Composite([(DENSE, rule)]) + lrp.attn_lrp(), Start())
    case.check(expected)
    break_it(monkeypatch)
    # A net of its own, so that neither case uses what was recorded for the other.
    broken = replace(case, net=replace(case.net, blocks=(*blocks, Pointwise("scale"))))
    with pytest.raises(AssertionError, match=SAYS[expected]):
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
    with pytest.raises(AssertionError, match="fails 2 of 7 properties: conservation, linear_in_relevance") as caught:
        check_rule(WrongTwice(), families=["dense"], skip=["compiles", "exact_derivatives"], examples=5)
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
        fewer = snippet.replace("examples=15", "examples=2, families=['dense']")  # which takes long
        exec(compile(fewer, "CONTRIBUTING.md", "exec"), namespace)
    for name, failing in {
        "Detached": "exact_derivatives",
        "Forgetful": "conservation",
        "Signless": "conservation",
        "Handwritten": "exact_derivatives",
    }.items():
        with pytest.raises(AssertionError, match=f"(?s)^{name}.*fails.*\n{failing}: ") as caught:
            check_rule(namespace[name](), examples=8, skip={*testing.PROPERTIES} - {failing})
        shown = section.partition(f"class {name}(")[2].partition(f"\n{failing}: ")[2].partition("```")[0]
        assert shown
        assert without_numbers(shown) in without_numbers(str(caught.value))


def without_numbers(text: str) -> str:
    """Its words in one line; the numbers depend on the processor."""
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", " ".join(text.split()))


def test_every_invariant_names_tests_that_exist() -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    table = text.partition("## The invariants")[2]
    sources = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    named = set(re.findall(r"\b(test_\w+)(?!\.py)\b(?!\.py)", table))
    assert len(named) > 15
    assert [name for name in named if f"def {name}(" not in sources] == []


def test_what_proves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="has served no layer of the"):
        check_rule(WrongTwice(), lambda layer: False, examples=2, skip=EXPENSIVE)
    with pytest.raises(ValueError, match="has served no layer of the"):
        check_rule(WrongTwice(), families=["rearrangement"], examples=1, skip=EXPENSIVE)
    with pytest.raises(ValueError, match="has served no layer of the"):
        check_rule(Objecting(), examples=2, skip=EXPENSIVE)
    with pytest.raises(ValueError, match="all properties are skipped"):
        check_rule(WrongTwice(), skip=[*testing.PROPERTIES])
    with pytest.raises(AssertionError, match="exact_derivatives: there was nothing to compare with in any model"):
        check_rule(Noisy(), families=["dense"], examples=1, skip={*testing.PROPERTIES} - {"exact_derivatives"})


EXPENSIVE = ["exact_derivatives", "compiles", "vmap_equals_loop", "lowered_equals_walk"]


class Objecting(WrongTwice):
    def objection(self, layer: lrp.Layer) -> str | None:
        return "it serves nothing"


class Noisy(lrp.Rule):
    """`Epsilon` and noise, so that finite differences never settle."""

    def propagate(self, layer: lrp.BoundLayer, message: Any) -> tuple[Any, ...]:
        (right,) = lrp.Epsilon(0.1).propagate(layer, message)
        return (lrp.Multiplier(right.value + 1e-2 * (1e12 * layer.output.sum()).sin()),)


NET = Net((Linear(2),), (2, 3))


@pytest.mark.parametrize(
    "rule",
    [lrp.Epsilon(), lrp.Epsilon(lrp.Stabilizer(0.1, norm_scale=True)), lrp.Gamma(), lrp.AlphaBeta(), lrp.Flat()],
    ids=repr,
)
def test_samples_are_apart(rule: lrp.Rule) -> None:
    for target in (0, None, torch.tensor([0, 1]), torch.randn(2, 2, dtype=torch.float64), Start(), lrp.contrast(0, 1)):
        assert assert_samples_apart(*NET.case(), [(lrp.Dense, rule)], target=target)


def test_what_is_compiled_has_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, torch.Tensor]] = []
    record = lambda model_fn, params, x, rules: compiled.append(params)  # noqa: E731
    monkeypatch.setitem(testing.PROPERTIES, "compiles", (record, {}))
    check_rule(lrp.Epsilon(0.1), examples=1, skip={*testing.PROPERTIES} - {"compiles"})
    assert sorted(weight.ndim for weight in compiled[0].values()) == [1, 1, 2, 3]


def test_samples_that_the_model_mixes_are_not_compared() -> None:
    _, params, x = NET.case()
    for model_fn in (lambda p, x: x @ x.T, lambda p, x: x - x.mean(0), lambda p, x: x.reshape(3, 2)):
        assert not assert_samples_apart(model_fn, params, x, lrp.epsilon(0.1))
    assert not assert_samples_apart(*Net((Linear(2),), (1, 3)).case(), lrp.epsilon(0.1))


def test_other_dtypes_are_refused() -> None:
    model_fn, params, x = NET.case()
    for assertion in (assert_exact_derivatives, assert_samples_apart):
        with pytest.raises(ValueError, match=r"\['x'\] is torch.float32"):
            assertion(model_fn, params, x.float(), lrp.epsilon(0.1), target=0)


def test_parameters_need_not_be_tensors() -> None:
    x = NET.input()
    for params in (None, 3):
        assert_pure(lambda p, x: x.relu(), params, x, lrp.epsilon(0.1), target=0)
        assert_vmap_equals_loop(lambda p, x: x.relu(), params, x, lrp.epsilon(0.1), target=0)


def test_nan_is_the_same_as_nan() -> None:
    model_fn, params, x = NET.case()
    x[0, 0] = torch.nan
    assert_pure(model_fn, params, x, lrp.epsilon(0.1), target=0)
    with pytest.raises(AssertionError, match="relevance of a sum and the sum of relevances are NaN"):
        assert_linear_in_relevance(model_fn, params, x, lrp.epsilon(0.1))


def test_only_what_changes_is_replaced_in_a_rule() -> None:
    rule = Listing()
    assert with_tensors(rule) is rule
    changed = with_tensors(Listing(epsilon=0.5))
    assert isinstance(changed.epsilon, torch.Tensor)
    assert isinstance(changed.weights, list)
    check_rule(Listing(epsilon=0.5), examples=2, skip={*testing.PROPERTIES} - {"exact_derivatives"})


@dataclass(frozen=True, eq=False)
class Listing(lrp.Rule):
    epsilon: float | torch.Tensor = 0.0
    weights: list[float] = field(default_factory=lambda: [1.0, 2.0])
    twice: float = field(init=False, default=0.0)

    def propagate(self, layer: lrp.BoundLayer, message: Any) -> tuple[Any, ...]:
        assert isinstance(self.weights, list)
        return lrp.Epsilon(self.epsilon).propagate(layer, message)


def test_what_a_rule_raises_is_shown_once() -> None:
    with pytest.raises(AssertionError, match="fails 3 of 3 properties") as caught:
        check_rule(Asserting(), examples=2, skip=[*EXPENSIVE, "gradient_equivalence", "pure"])
    report = str(caught.value)
    assert "conservation: AssertionError: no images\n    in Asserting.propagate, test_testing.py:" in report
    assert 'assert layer.input.ndim == 2, "no images"' in report
    assert "The same for samples_apart, linear_in_relevance." in report
    assert report.count("net = Net(") == 1


class Asserting(lrp.Rule):
    def propagate(self, layer: lrp.BoundLayer, message: Any) -> tuple[Any, ...]:
        assert layer.input.ndim == 2, "no images"
        return lrp.Epsilon(0.1).propagate(layer, message)

    def absorbed(self, layer: lrp.BoundLayer, message: Any) -> dict[str, torch.Tensor]:
        return lrp.Epsilon(0.1).absorbed(layer, message)


def test_a_rule_that_works_op_by_op_only() -> None:
    """`lowered=False` is passed on, and what is shown says so."""
    skip = {*testing.PROPERTIES} - {"vmap_equals_loop", "samples_apart", "pure"}
    check_rule(mutants.Unless(lowering), families=["dense"], examples=2, lowered=False, skip=skip)
    with pytest.raises(AssertionError, match="lowered=False") as caught:
        check_rule(mutants.Noting(), examples=2, lowered=False, skip={*testing.PROPERTIES} - {"pure"})
    assert "assert_pure(*net.case(), rules, target=0, lowered=False)" in str(caught.value)


def lowering(layer: lrp.BoundLayer, message: Any) -> bool:
    if isinstance(message.value, FunctionalTensor | FakeTensor):
        raise TypeError("no programs of this")
    return False


def test_the_code_of_a_case_runs() -> None:
    """Targets and rules that are tensors included."""
    epsilon = torch.tensor(0.123456789, dtype=torch.float64)
    rest = lrp.attn_lrp() + lrp.epsilon(0.1, stabilizer=0.1)

    @settings(max_examples=8, phases=[Phase.generate])
    @given(models().flatmap(lambda net: st.tuples(st.just(net), targets(net.outputs()))))
    def check(drawn: tuple[Net, Any]) -> None:
        case = Case(drawn[0], lrp.Composite([(lrp.Dense, lrp.Epsilon(epsilon))]) + rest, drawn[1])
        names: dict[str, Any] = {}
        exec(case.code("conservation"), names)
        assert names["net"] == case.net
        assert names["rules"].entries[0][1].epsilon == epsilon

    check()
    with pytest.raises(AssertionError, match="WrongTwice") as caught:
        check_rule(WrongTwice(), lambda layer: lrp.Dense(layer), examples=1, skip=[*EXPENSIVE, "conservation"])
    code = str(caught.value).partition("\n\n    from")[2]
    assert "# selector is the one that was passed, <function" in code
    with pytest.raises(AssertionError, match="relevance of a sum"):
        exec("from" + code.replace("\n    ", "\n"), {"selector": lrp.Dense, "WrongTwice": WrongTwice})


E: Any = lrp.Epsilon(0.1)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a class": (lambda: check_rule(lrp.Epsilon), "make a rule, check_rule\\(Epsilon\\(\\)\\)"),  # type: ignore[arg-type]
    "no rule": (lambda: check_rule(None), "was given None"),  # type: ignore[arg-type]
    "a composite": (lambda: check_rule(lrp.epsilon(0.1)), "for selector, rule in composite"),  # type: ignore[arg-type]
    "no selector": (lambda: check_rule(E, "Dense"), "selector='Dense'"),  # type: ignore[arg-type]
    "skip, a string": (lambda: check_rule(E, skip="pure"), "write skip=\\['pure'\\]"),
    "skip, unknown": (lambda: check_rule(E, skip=["speed"]), "skip has no 'speed': there are 'exact_derivatives'"),
    "families, a string": (lambda: check_rule(E, families="dense"), "write families=\\['dense'\\]"),
    "families, unknown": (
        lambda: check_rule(E, families=["dense", "convoluton"]),
        "no 'convoluton': there are 'dense'",
    ),
    "families, none": (lambda: check_rule(E, families=[]), "families=\\[\\] has no plain one"),
    "families, nested": (lambda: models(["residual"]), "families=\\['residual'\\] has no plain one"),
    "no examples": (lambda: check_rule(E, examples=0), "examples=0 draws no models"),
    "models, unknown": (lambda: models(["nonsense"]), "families has no 'nonsense'"),
    "dimensions, unknown": (lambda: models(dimensions=(4,)), "dimensions=\\(4,\\) should be"),
    "dimensions, a number": (lambda: models(dimensions=2), "dimensions=2 should be a list"),  # type: ignore[arg-type]
    "including": (lambda: models(including=["residual"]), "including has no 'residual': there are 'dense'"),
    "no blocks": (lambda: models(max_blocks=0), "max_blocks=0"),
    "values": (lambda: models(values="none"), "values has no 'none': there are 'normal'"),  # type: ignore[arg-type]
    "rules, unknown": (lambda: rules(["nonsense"]), "families has no 'nonsense': there are 'linear'"),
    "rules, a string": (lambda: rules("linear"), "write families=\\['linear'\\]"),
    "rules, none": (lambda: rules([]), "families=\\[\\] leaves no rules"),
    "no outputs": (lambda: targets(0), "targets\\(0\\)"),
    "no shape": (lambda: inputs(()), "no batch"),
    "a shape that is a number": (lambda: inputs(3), "write \\(3,\\)"),  # type: ignore[arg-type]
    "a name": (lambda: Normalize("bogus"), "Normalize\\(name=\\) has no 'bogus': there are 'layer_norm'"),
    "an activation": (lambda: Pointwise("bogus"), "there are 'relu'"),
    "a literal": (lambda: InPlace("bogus"), "InPlace\\(name=\\) has no 'bogus': there are 'relu_'"),  # type: ignore[arg-type]
    "a cell": (lambda: Loop("bogus"), "Loop\\(cell=\\) has no 'bogus'"),  # type: ignore[arg-type]
    "a spelling": (lambda: Linear(spelling="bogus"), "Linear\\(spelling=\\)"),  # type: ignore[arg-type]
    "a list of blocks": (lambda: Net([Linear()]), "write \\(Linear\\(\\),\\)"),  # type: ignore[arg-type]
    "a block": (lambda: Net(Linear()), "write \\(Linear\\(\\),\\)"),  # type: ignore[arg-type]
    "a property": (lambda: Case(NET, [(lrp.Dense, E)]).check("speed"), "PROPERTIES has no 'speed'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_what_is_drawn_of_little() -> None:
    once = settings(database=None, max_examples=5)
    assert find(models(max_blocks=1, including=["dense"]), lambda net: True, settings=once).blocks
    assert find(models(values="zero"), lambda net: True, settings=once).values == "zero"


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
