"""A rule is right when its properties hold on models nobody thought of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from hypothesis import strategies as st

import lrpfunc as lrp
from lrpfunc.testing._case import PROPERTIES, Case, described
from lrpfunc.testing._code import among, assigned, code, prints_as_code
from lrpfunc.testing._fixed import FIXED, PROBES
from lrpfunc.testing._numbers import PropertyError
from lrpfunc.testing._search import Failure, Search, smallest
from lrpfunc.testing._strategies import FAMILIES, models, targets

Selector = Callable[[lrp.Layer], bool]

_REST = lrp.attn_lrp() + lrp.epsilon(0.1, stabilizer=0.1)


def check_rule(
    rule: lrp.Rule,
    selector: Selector | None = None,
    *,
    families: Sequence[str] = FAMILIES,
    examples: int = 60,
    skip: Collection[str] = (),
    lowered: bool = True,
) -> None:
    """Proves a rule: all properties that relevance must have, on models drawn at random.

    The properties are those of `PROPERTIES`, each named for its assertion: `exact_derivatives` (of the numbers in the
    rule too, where they may be tensors), `conservation`, `vmap_equals_loop`, `samples_apart`, `pure`,
    `linear_in_relevance`, `gradient_equivalence`, `lowered_equals_walk` and, for one model, `compiles`. Those that cost
    little are checked first on nets that have one feature each, such as a stride or a layer that is used twice. Each
    one that fails is searched again, for the smallest model that shows it. What is drawn is always the same.

    It takes about a minute; while you work on a rule, `examples=15` tells most of it. It cannot see whether a rule is
    the one of its paper: one that distributes all relevance consistently, but otherwise than it should (with `z + eps`
    whatever the sign of `z`, say), has every property. Compare it with numbers worked out by hand on one layer.

    Args:
        rule: The rule.
        selector: The layers it serves. `None`: dense layers and convolutions; if it objects to dense layers, all
            layers it does not object to.
        families: What models are made of, of `FAMILIES`.
        examples: How many models are drawn.
        skip: Properties that the rule is not meant to have.
        lowered: As for `lrpfunc.attribute`: `False` for a rule that works operation by operation only.

    Raises:
        AssertionError: If a property fails, or in no model there was anything to compare. The message has every one
            that does, each with what went wrong and with code to paste for the smallest model found.
        ValueError: If nothing would be proven: the rule serves no layer of any model, or all properties are skipped.
        TypeError: If it is given something else than a rule, or a string instead of a list.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import check_rule
        >>> check_rule(lrp.Epsilon(0.1), examples=5)
    """
    _require(rule, selector, examples)
    skipped = {*among(skip, PROPERTIES, "skip"), *([] if lowered else ["lowered_equals_walk"])}
    names = [name for name in PROPERTIES if name not in skipped]
    if not names:
        raise ValueError("all properties are skipped, and nothing would be proven: skip fewer of them")
    families = among(families, FAMILIES, "families")
    made, composite = _serving(rule, selector)
    fixed = [Case(net, composite, lowered=lowered) for name in families for net in FIXED.get(name, ())]
    drawn = _cases(composite, families, _exercising(composite, rule, families), lowered)
    search = Search(rule, names)
    search.run(fixed, drawn, examples)
    if not search.served:
        raise ValueError(
            f"{rule!r} has served no layer of the {len(fixed) + examples} models tried, so that nothing is proven. "
            "Either the selector matches none of their layers, or `families` has none that it could serve, or the rule "
            "objects to all. Say which layers it is for, for example\n\n    check_rule(rule, lrpfunc.Activation)"
        )
    if failed := search.failed:
        reports = [
            _report(same, smallest(same[0], fixed, drawn, examples, failed[same[0]]), made) for same in _alike(failed)
        ]
        raise AssertionError(
            f"{rule!r} fails {len(failed)} of {len(names)} properties: {', '.join(failed)}\n\n" + "\n\n".join(reports)
        )


def _require(rule: Any, selector: Any, examples: int) -> None:
    if isinstance(rule, type) and issubclass(rule, lrp.Rule):
        raise TypeError(f"check_rule was given the class {rule.__name__}: make a rule, check_rule({rule.__name__}())")
    if isinstance(rule, lrp.Composite):
        raise TypeError(
            "check_rule proves one rule, and was given a composite: give its rules one by one, for example\n\n"
            "    for selector, rule in composite:\n        check_rule(rule, selector)"
        )
    if not isinstance(rule, lrp.Rule):
        raise TypeError(f"check_rule proves a rule, for example lrpfunc.Epsilon(0.1), and was given {rule!r}")
    if selector is not None and not callable(selector):
        raise TypeError(f"selector={selector!r} is no function of layers: give one, for example lrpfunc.Dense")
    if examples < 1:
        raise ValueError(f"examples={examples} draws no models: give 1 or more")


def _serving(rule: lrp.Rule, selector: Selector | None) -> tuple[str, lrp.Composite]:
    """The composite that gives the rule its layers, and the code that makes it."""
    lines = [assigned("rule", rule)]
    if selector is None and _serves_dense(rule):
        where, selector = "Dense | Convolution", lrp.Dense | lrp.Convolution
    elif selector is None:
        where = "lambda layer: len(layer.outputs) == 1 and rule.objection(layer) is None"
        selector = lambda layer: len(layer.outputs) == 1 and rule.objection(layer) is None  # noqa: E731
    elif prints_as_code(selector):
        where = repr(selector)
    else:
        where = "selector"
        lines.append(assigned(where, selector))
    lines.append(f"rules = [({where}, rule)] + {code(_REST)}")
    return "\n".join(lines), lrp.Composite([(selector, rule)]) + _REST


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


def _cases(
    composite: lrp.Composite, families: Sequence[str], including: Sequence[str], lowered: bool
) -> st.SearchStrategy[Case]:
    def of(net: Any) -> st.SearchStrategy[Case]:
        return st.builds(Case, st.just(net), st.just(composite), targets(net.outputs()), st.just(lowered))

    return models(families, including=including).flatmap(of)


def _alike(failed: dict[str, Failure]) -> list[list[str]]:
    """The properties that fail, those together for which the rule raises the same."""
    groups: dict[str, list[str]] = {}
    for name, (_, error) in failed.items():
        groups.setdefault(name if isinstance(error, PropertyError) else described(error), []).append(name)
    return list(groups.values())


def _report(names: Sequence[str], failure: Failure, made: str) -> str:
    case, error = failure
    name, *others = names
    same = f"\n\n    The same for {', '.join(others)}." if others else ""
    body = "\n".join(f"    {line}" for line in case.code(name, made).splitlines())
    return f"{name}: {described(error)}{same}\n\n{body}"
