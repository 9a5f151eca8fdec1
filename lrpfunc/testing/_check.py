"""A rule is right when its properties hold on models nobody thought of."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import HealthCheck, Verbosity, given, seed, settings
from hypothesis import strategies as st

import lrpfunc as lrp
from lrpfunc.composites import as_composite
from lrpfunc.testing._assertions import (
    assert_compiles,
    assert_conservation,
    assert_gradient_equivalence,
    assert_linear_in_relevance,
    assert_lowered_equals_walk,
    assert_pure,
    assert_vmap_equals_loop,
)
from lrpfunc.testing._code import HEADER, code
from lrpfunc.testing._derivatives import assert_exact_derivatives
from lrpfunc.testing._hyperparameters import with_tensors
from lrpfunc.testing._net import Net
from lrpfunc.testing._strategies import FAMILIES, PROBES, SMALLEST, models, targets

Selector = Callable[[lrp.Layer], bool]

_REST = lrp.attn_lrp() + lrp.epsilon(0.1, stabilizer=0.1)


PROPERTIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "exact_derivatives": (assert_exact_derivatives, {}),
    "conservation": (assert_conservation, {}),
    "vmap_equals_loop": (assert_vmap_equals_loop, {}),
    "pure": (assert_pure, {}),
    "linear_in_relevance": (assert_linear_in_relevance, {}),
    "gradient_equivalence": (assert_gradient_equivalence, {}),
    "lowered_equals_walk": (assert_lowered_equals_walk, {}),
    "compiles": (assert_compiles, {}),
}
"""What is asserted of every rule, and how."""


@dataclass(frozen=True)
class Case:
    """A model, rules and a target, for which properties hold or do not.

    Args:
        net: The model.
        rules: As for `lrpfunc.attribute`.
        target: Likewise.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import Case, Linear, Net
        >>> case = Case(Net((Linear(),)), lrp.attn_lrp())
        >>> case.check("conservation")
        >>> print(case.code("conservation"))
        from lrpfunc import *
        from lrpfunc.testing import *
        <BLANKLINE>
        rules = attn_lrp()
        net = Net(blocks=(Linear(),))
        assert_conservation(*net.case(), rules, target=0)
    """

    net: Net
    rules: Any
    target: Any = 0

    def check(self, name: str, **options: Any) -> None:
        """Asserts one of `PROPERTIES`, with options of its assertion."""
        assertion, usual = PROPERTIES[name]
        options = usual | options
        rules = with_tensors(as_composite(self.rules)) if name == "exact_derivatives" else self.rules
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about the speed of `vmap`
            assertion(*self.net.case(), rules, **self._target(name), **options)

    def failures(self, names: Collection[str], **options: Any) -> dict[str, Exception]:
        """Those of some properties that do not hold, and what they raise."""
        failed: dict[str, Exception] = {}
        for name in names:
            try:
                self.check(name, **options)
            except Exception as error:  # whatever a rule raises is a failure of the rule
                failed[name] = error
        return failed

    def code(self, name: str, rules: str | None = None) -> str:
        """What to paste to see a property fail; `rules`, how the rules are made."""
        assertion, options = PROPERTIES[name]
        given = "with_tensors(rules)" if name == "exact_derivatives" else "rules"
        arguments = [f"{key}={value!r}" for key, value in {**self._target(name), **options}.items()]
        call = f"{assertion.__name__}({', '.join(['*net.case()', given, *arguments])})"
        made = f"rules = {code(self.rules)}" if rules is None else rules
        return f"{HEADER}\n\n{made}\nnet = {self.net!r}\n{call}"

    def _target(self, name: str) -> dict[str, Any]:
        return {} if name in ("linear_in_relevance", "gradient_equivalence") else {"target": self.target}


_SETTINGS = settings(
    database=None,
    deadline=None,
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    verbosity=Verbosity.quiet,
)


def check_rule(
    rule: lrp.Rule,
    selector: Selector | None = None,
    *,
    families: Sequence[str] = FAMILIES,
    examples: int = 60,
    skip: Collection[str] = (),
) -> None:
    """Proves a rule: all properties that relevance must have, on models drawn at random.

    The properties are those of `PROPERTIES`, each named for its assertion: `exact_derivatives` (of the numbers in the
    rule too, where they may be tensors), `conservation`, `vmap_equals_loop`, `pure`, `linear_in_relevance`,
    `gradient_equivalence`, `lowered_equals_walk` and, for one model, `compiles`. Each one that fails is searched again,
    for the smallest model that shows it. What is drawn is always the same.

    Args:
        rule: The rule.
        selector: The layers it serves. `None`: dense layers and convolutions; if it objects to dense layers, all
            layers it does not object to.
        families: What models are made of, of `FAMILIES`.
        examples: How many models are drawn.
        skip: Properties that the rule is not meant to have.

    Raises:
        AssertionError: If a property fails. The message has every one that does, each with what went wrong and with
            code to paste for the smallest model found.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import check_rule
        >>> check_rule(lrp.Epsilon(0.1), examples=5)
    """
    if unknown := [name for name in skip if name not in PROPERTIES]:
        raise ValueError(f"skip names no property {unknown[0]!r}: the properties are {', '.join(PROPERTIES)}")
    made, composite = _serving(rule, selector)
    names = [name for name in PROPERTIES if name not in skip]
    drawn = _cases(composite, families, _exercising(composite, rule, families))
    failed = _failing(drawn, names, examples)
    reports = [_report(name, _smallest(drawn, name, examples, failed[name]), made) for name in failed]
    if reports:
        raise AssertionError(
            f"{rule!r} fails {len(reports)} of {len(names)} properties: {', '.join(failed)}\n\n" + "\n\n".join(reports)
        )


def _serving(rule: lrp.Rule, selector: Selector | None) -> tuple[str, lrp.Composite]:
    """The composite that gives the rule its layers, and the code that makes it."""
    where = repr(selector)
    if selector is None and _serves_dense(rule):
        where, selector = "Dense | Convolution", lrp.Dense | lrp.Convolution
    elif selector is None:
        where = "lambda layer: len(layer.outputs) == 1 and rule.objection(layer) is None"
        selector = lambda layer: len(layer.outputs) == 1 and rule.objection(layer) is None  # noqa: E731
    return f"rule = {rule!r}\nrules = [({where}, rule)] + {code(_REST)}", lrp.Composite([(selector, rule)]) + _REST


def _serves_dense(rule: lrp.Rule) -> bool:
    model_fn, params, x = PROBES["dense"].case()
    rows = lrp.explain(model_fn)(params, x).rows
    return all(rule.objection(row.layer) is None for row in rows if lrp.Dense(row.layer))


def _exercising(composite: lrp.Composite, rule: lrp.Rule, families: Sequence[str]) -> list[str]:
    """The families in which the rule has something to do."""
    found = []
    for name in (name for name in families if name in PROBES):
        model_fn, params, x = PROBES[name].case()
        try:
            rows = lrp.explain(model_fn, composite)(params, x).rows
        except Exception:  # which the properties will show
            return []
        if any(row.rule is rule for row in rows):
            found.append(name)
    return found


def _cases(composite: lrp.Composite, families: Sequence[str], including: Sequence[str]) -> st.SearchStrategy[Case]:
    drawn = models(families, including=including)
    return drawn.flatmap(lambda net: st.builds(Case, st.just(net), st.just(composite), targets(net.outputs())))


Failure = tuple[Case, Exception]


def _failing(drawn: st.SearchStrategy[Case], names: Sequence[str], examples: int) -> dict[str, Failure]:
    """The properties that fail, each with the first case. One model is compiled, which takes long."""
    failed: dict[str, Failure] = {}
    first: list[Case] = []

    @seed(0)
    @settings(_SETTINGS, max_examples=examples)
    @given(drawn)
    def search(case: Case) -> None:
        left = [name for name in names if name not in failed and name != "compiles"]
        failed.update({name: (case, error) for name, error in case.failures(left).items()})
        first.append(case)

    search()
    for case in first[:1] if "compiles" in names else []:
        failed.update({name: (case, error) for name, error in case.failures(["compiles"]).items()})
    return {name: failed[name] for name in names if name in failed}


_SHRINKS = 40
"""How many models are tried to make a failing one smaller."""


def _smallest(drawn: st.SearchStrategy[Case], name: str, examples: int, first: Failure) -> Failure:
    """The smallest case found for which a property fails."""
    for net in SMALLEST:  # they serve all rules, so that each is recorded once
        case = replace(first[0], net=net, target=0)
        if failures := case.failures([name]):
            return case, failures[name]
    return _shrunk(drawn, name, examples, first)


def _shrunk(drawn: st.SearchStrategy[Case], name: str, examples: int, first: Failure) -> Failure:
    failed: dict[str, Failure] = {_key(first[0]): first}
    tried: set[str] = set()

    @seed(0)
    @settings(_SETTINGS, max_examples=examples)
    @given(drawn)
    def search(case: Case) -> None:
        if len(tried) > _SHRINKS:
            raise _EnoughError
        if (key := _key(case)) not in failed:
            tried.add(key)
            for error in case.failures([name]).values():
                failed[key] = (case, error)
        if key in failed:
            raise _FoundError

    with contextlib.suppress(_FoundError, _EnoughError):
        search()
    return failed[min(failed, key=lambda key: (len(key), key))]


def _key(case: Case) -> str:
    return repr((case.net, case.target))


class _FoundError(Exception):
    """A property fails."""


class _EnoughError(BaseException):
    """Ends a search, which an `Exception` would not."""


def _report(name: str, failure: Failure, made: str) -> str:
    case, error = failure
    message = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    body = "\n".join(f"    {line}" for line in case.code(name, made).splitlines())
    return f"{name}: {message}\n\n{body}"
