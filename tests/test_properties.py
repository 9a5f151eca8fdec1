"""The invariants, on models drawn at random: a few hundred cases by default, two thousand with `-m slow`, and more than
ten thousand with `-m long`.

A case is a model with a composite and a target. Recording a model takes most of the time, so that each is drawn with
several composites and targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev

import lrpfunc as lrp
from lrpfunc.testing import (
    FAMILIES,
    PROPERTIES,
    Case,
    Linear,
    Loop,
    Net,
    assert_conservation,
    assert_gradient_equivalence,
    check_rule,
    composites,
    models,
    targets,
)
from tests.cases import ATTENTION_RULES, COMPOSITES, ELEMENTWISE_RULES, LINEAR_RULES, SUM_RULES, normal, randomized

SLOW_AND_LARGE: Any = list(HealthCheck)

SIGNED = (lrp.ReLUDeconvNet, lrp.ReLUGuidedBackprop)
"""Rules that look at the sign of what arrives, and are not linear in it."""


def search(
    names: Sequence[str], examples: int, composites_each: int, families: Sequence[str] = FAMILIES
) -> Callable[[], None]:
    """Checks some of `PROPERTIES` for so many models, each with so many composites and targets."""

    def cases(net: Net) -> st.SearchStrategy[list[Case]]:
        case = st.builds(Case, st.just(net), composites(), targets(net.outputs()))
        return st.lists(case, min_size=composites_each, max_size=composites_each)

    @settings(max_examples=examples, suppress_health_check=SLOW_AND_LARGE)
    @given(models(families).flatmap(cases))
    def run(drawn: list[Case]) -> None:
        for case in drawn:
            for name in names:
                check(case, name)

    return run


def check(case: Case, name: str) -> None:
    if name == "linear_in_relevance" and any(isinstance(rule, SIGNED) for _, rule in case.rules):
        return
    if name == "samples_apart" and "norm_scale=True" in repr(case.rules):  # see MIXING
        return
    for error in case.failures([name], **OP_BY_OP.get(name, {})).values():
        raise AssertionError(f"{error}\n\n{case.code(name)}") from error


OP_BY_OP = {name: {"lowered": False} for name in ("exact_derivatives", "vmap_equals_loop", "samples_apart")}
"""What is searched without lowering, which takes longer than the check; the programs are compared with the walk."""

SEARCHES: dict[str, tuple[list[str], int, int, int]] = {
    "derivatives": (["exact_derivatives"], 12, 240, 8),
    "vmap": (["vmap_equals_loop", "samples_apart"], 8, 300, 8),
    "balance": (["conservation", "linear_in_relevance", "pure"], 10, 600, 8),
    "gradients": (["gradient_equivalence"], 6, 200, 6),
    "lowered": (["lowered_equals_walk"], 6, 60, 4),
    "compile": (["compiles"], 2, 34, 3),
}
"""The properties; how many models by default, in the long profile, and how many composites each."""


@pytest.mark.parametrize("name", SEARCHES)
def test_drawn_cases(name: str) -> None:
    properties, models_by_default, _, each = SEARCHES[name]
    search(properties, models_by_default, min(each, 4))()


@pytest.mark.parametrize("part", [pytest.param(5, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("families", [FAMILIES[:7], FAMILIES], ids=["plain", "all"])
@pytest.mark.parametrize("name", SEARCHES)
def test_many_drawn_cases(name: str, families: Sequence[str], part: int) -> None:
    properties, _, many, each = SEARCHES[name]
    search(properties, -(-many // (2 * part)), each, families)()


def test_the_long_search_is_large() -> None:
    counts = {name: many * each for name, (_, _, many, each) in SEARCHES.items()}
    assert sum(counts.values()) >= 10_000
    assert counts["compile"] >= 100
    assert {p for properties, *_ in SEARCHES.values() for p in properties} == set(PROPERTIES)


@settings(max_examples=15, suppress_health_check=SLOW_AND_LARGE)
@given(models(["dense", "convolution", "rearrangement", "residual"], values=st.just("normal")))
def test_lrp_0_is_input_times_gradient(net: Net) -> None:
    """Whatever is linear, biases set to zero."""
    model_fn, params, x = net.case()
    unbiased = {name: 0 * value if value.ndim == 1 else value for name, value in params.items()}
    if not any(block.name in ("halves", "masked") for block in rearrangements(net)):
        assert_gradient_equivalence(model_fn, unbiased, x, homogeneous=True)


def rearrangements(net: Any) -> list[Any]:
    inner = [block for block in net.blocks if hasattr(block, "name")]
    return inner + [found for block in net.blocks if hasattr(block, "blocks") for found in rearrangements(block)]


RULES: dict[str, lrp.Rule] = {
    **LINEAR_RULES,
    **{f"activation_{name}": rule for name, rule in ELEMENTWISE_RULES.items()},
    **{f"sum_{name}": rule for name, rule in SUM_RULES.items()},
    **{f"attention_{name}": rule for name, rule in ATTENTION_RULES.items()},
    **{f"default_{type(rule).__name__}": rule for rule in (lrp.Epsilon(), lrp.ZPlus(), lrp.Gamma(), lrp.AlphaBeta())},
}
SINGULAR = ("epsilon_zero", "sum_uniform")
"""Rules with points where relevance jumps: `0 / 0` is read as 0, and a zero activation is left with relevance."""

MIXING = ("epsilon_norm_scale",)
"""Rules that scale by all dimensions but the first, which inside a recurrent layer or an attention module is time."""

SERVED: dict[str, lrp.Selector] = {
    "activation": lrp.Activation,
    "sum": lrp.Sum | lrp.AvgPool,
}


FIRST = {type(rule): name for name, rule in reversed(RULES.items())}.values()
"""One of each class, for the slow profile."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in FIRST else pytest.mark.long) for name in RULES]
)
def test_every_rule(name: str) -> None:
    rule = RULES[name]
    skip = ["linear_in_relevance"] if isinstance(rule, SIGNED) else []
    if name in SINGULAR:
        skip = ["exact_derivatives"]
    if name in MIXING:
        skip = ["samples_apart"]
    check_rule(rule, SERVED.get(name.partition("_")[0]), examples=8, skip=[*skip, "compiles"])


@pytest.mark.parametrize("name", COMPOSITES)
def test_every_composite(name: str) -> None:
    """On a few models, with attention behind."""
    composite = COMPOSITES[name]
    rules = composite if composite.cotangent else composite + lrp.attn_lrp()

    @settings(max_examples=3, suppress_health_check=SLOW_AND_LARGE)
    @given(models(max_blocks=2))
    def run(net: Net) -> None:
        for property in ("conservation", "linear_in_relevance", "exact_derivatives"):
            check(Case(net, rules), property)

    run()


# --------------------------------------------------------------------------------------------------------------
# What the search has found


@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_derivatives_where_an_input_is_zero(gamma: float) -> None:
    """The derivatives of the positive and of the negative part were both 0 there; so was that of their sum."""
    model_fn, params, x = Net((Linear(2),), (1, 2), values="zero").case()
    rules = [(lrp.Dense, lrp.Gamma(gamma, 0.1))]

    def relevance(x: Tensor) -> Tensor:
        return lrp.attribute(model_fn, rules)(params, x, target=0)[0]

    slopes = [
        relevance(torch.eye(2, dtype=x.dtype)[i : i + 1] * side)[i] / side for i in (0, 1) for side in (-1e-7, 1e-7)
    ]
    derivative = jacrev(relevance)(x).squeeze(1).diagonal()
    for i in (0, 1):
        low, high = sorted(slopes[2 * i : 2 * i + 2])
        assert low - 1e-5 <= derivative[i] <= high + 1e-5


def test_the_balance_of_an_operation_with_one_of_several_outputs() -> None:
    assert_conservation(*Net((Loop(all_states=True),), (1, 1)).case(), lrp.gradient())


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="it is recorded as it runs where gradients are enabled")
def test_the_value_of_fused_attention_modules() -> None:
    """Where nothing needs a gradient, the module runs a kernel that rounds differently."""
    module = randomized(nn.MultiheadAttention(4, 2, batch_first=True))
    model_fn, params = lrp.from_module(Attending(module).eval())
    params = {name: parameter.detach() for name, parameter in params.items()}
    assert_gradient_equivalence(model_fn, params, normal(2, 3, 4))


class Attending(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]
