"""Derivatives of relevance are exact: they agree with finite differences for every rule and composite."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev

import lrpfunc as lrp
from tests.cases import (
    ATTENTION_CASES,
    ATTENTION_COMPOSITES,
    ATTENTION_MODELS,
    COMPOSITES,
    ELEMENTWISE_RULES,
    LINEAR_RULES,
    MODELS,
    SUM_RULES,
    Case,
    normal,
    smooth,
    with_rule,
)
from tests.oracles import finite_difference_error, largest_difference


def scalar(case: Case, rules: lrp.Composite | None, params: Any, x: Tensor, target: Any = 1) -> Tensor:
    relevance = lrp.attribute(case.model_fn, rules)(params, x, target=target)
    return (relevance * normal(*relevance.shape, seed=7)).sum() + relevance.square().sum()


ALL = {
    **COMPOSITES,
    **{f"dense_{name}": with_rule(rule) for name, rule in LINEAR_RULES.items()},
    **{
        f"activation_{name}": lrp.Composite([(lrp.Activation, rule)]) + lrp.epsilon(0.1, stabilizer=0.1)
        for name, rule in ELEMENTWISE_RULES.items()
    },
    **{
        f"sum_{name}": lrp.Composite([(lrp.Sum, rule)]) + lrp.epsilon(0.1, stabilizer=0.1)
        for name, rule in SUM_RULES.items()
    },
}


CONSTANT = {
    **{("residual", name): ("input",) for name in ("gradient", "deconvnet", "guided_backprop")},
    **{(model, "dense_stop"): ("input", "parameters") for model in MODELS},
    ("residual", "sum_stop"): ("input", "parameters"),
}
"""Gradients of a net of ReLUs do not change with its input, and where all paths are stopped there is no relevance."""


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_equal_finite_differences(model: str, name: str) -> None:
    check_gradients(MODELS[model](), ALL[name], constant=CONSTANT.get((model, name), ()))


@pytest.mark.parametrize(("model", "name"), ATTENTION_CASES)
def test_gradients_equal_finite_differences_through_attention(model: str, name: str) -> None:
    check_gradients(ATTENTION_MODELS[model](), ATTENTION_COMPOSITES[name][0])


def check_gradients(case: Case, rules: lrp.Composite | None, constant: Collection[str] = ()) -> None:
    """With respect to the input; and to every parameter, running statistics included.

    What it does not depend on is `constant`: there both are zero, for which `finite_difference_error` is infinite.
    """
    errors = {
        "input": finite_difference_error(lambda x: scalar(case, rules, case.params, x), case.x),
        "parameters": finite_difference_error(lambda p: scalar(case, rules, p, case.x), case.params),
    }
    assert {name for name, error in errors.items() if error == math.inf} == {*constant}
    assert all(error < 1e-6 for name, error in errors.items() if name not in constant)


HYPERPARAMETERS = {
    "epsilon": lambda t: with_rule(lrp.Epsilon(t)),
    "epsilon_clip": lambda t: with_rule(lrp.Epsilon(lrp.Stabilizer(t, clip=True))),
    "epsilon_norm_scale": lambda t: with_rule(lrp.Epsilon(lrp.Stabilizer(t, norm_scale=True))),
    "gamma": lambda t: with_rule(lrp.Gamma(t, 0.1)),
    "alpha_beta": lambda t: with_rule(lrp.AlphaBeta(1 + t, t, 0.1)),
    "low": lambda t: with_rule(lrp.ZBox(-3 - t, 3.0, 0.1)),
    "high": lambda t: with_rule(lrp.ZBox(-3.0, 3 + t, 0.1)),
    "stabilizer": lambda t: lrp.epsilon_plus_flat(t, stabilizer=t),
    "norm": lambda t: lrp.Composite([(lrp.AvgPool | lrp.Sum, lrp.Norm(t))]) + lrp.epsilon(0.1),
    "beta_smooth": lambda t: lrp.Composite([(lrp.Activation, lrp.ReLUBetaSmooth(t))], cotangent=True),
    "stabilizer_of_zplus": lambda t: with_rule(lrp.ZPlus(t)),
    "stabilizer_of_gamma": lambda t: with_rule(lrp.Gamma(0.25, t)),
    "stabilizer_of_alpha_beta": lambda t: with_rule(lrp.AlphaBeta(2.0, 1.0, t)),
    "stabilizer_of_zbox": lambda t: with_rule(lrp.ZBox(-3.0, 3.0, t)),
    "stabilizer_of_wsquare": lambda t: with_rule(lrp.WSquare(t)),
    "stabilizer_of_flat": lambda t: with_rule(lrp.Flat(t)),
    "weight_of_rule": lambda t: with_rule(t * lrp.Epsilon(0.1) + lrp.ZPlus(0.1)),
}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize("model", ["residual", "smooth"])
def test_hyperparameters_are_differentiable(model: str, name: str) -> None:
    case = MODELS[model]()
    at = torch.tensor(0.3, dtype=torch.float64)
    make = HYPERPARAMETERS[name]
    error = finite_difference_error(lambda t: scalar(case, make(t), case.params, case.x), at)
    if (model, name) == ("smooth", "norm"):  # that model has neither sums nor average pooling
        assert error == math.inf
    else:
        assert error < 1e-6


@pytest.mark.parametrize("name", ["epsilon", "epsilon_plus", "gradient"])
def test_second_derivatives(name: str) -> None:
    case, rules = smooth(), COMPOSITES[name]

    def gradient_norm(x: Tensor) -> Tensor:
        return grad(lambda x: scalar(case, rules, case.params, x))(x).square().sum()

    assert finite_difference_error(gradient_norm, case.x) < 1e-6


@pytest.mark.parametrize("model", ["transformer", "fused", "recurrent"])
def test_second_derivatives_through_attention(model: str) -> None:
    case, rules = ATTENTION_MODELS[model](), lrp.attn_lrp()

    def gradient_norm(params: Any, x: Tensor) -> Tensor:
        return grad(lambda x: scalar(case, rules, params, x))(x).square().sum()

    assert finite_difference_error(lambda x: gradient_norm(case.params, x), case.x) < 1e-6
    assert finite_difference_error(lambda p: gradient_norm(p, case.x), case.params) < 1e-6


@pytest.mark.parametrize("name", ["epsilon_plus_flat", "epsilon_gamma_box", "guided_backprop"])
def test_forward_and_reverse_jacobians_agree(name: str) -> None:
    case, rules = smooth(), COMPOSITES[name]

    def relevance(x: Tensor) -> Tensor:
        return lrp.attribute(case.model_fn, rules)(case.params, x, target=2)

    assert largest_difference(jacfwd(relevance)(case.x), jacrev(relevance)(case.x)) < 1e-12


# What torch says of plain `jacrev` of its fused attention, which runs in the forward pass.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("rules", ["attn_lrp", "cp_lrp", "mixture+attn_lrp"])
@pytest.mark.parametrize("model", ATTENTION_MODELS)
def test_forward_and_reverse_jacobians_agree_through_attention(model: str, rules: str) -> None:
    """Fused attention has no forward derivative: there it is written out."""
    case = ATTENTION_MODELS[model]()
    fn = lrp.attribute(case.model_fn, ATTENTION_COMPOSITES[rules][0])

    def relevance(x: Tensor) -> Tensor:
        return fn(case.params, x, target=2)

    assert largest_difference(jacfwd(relevance)(case.x), jacrev(relevance)(case.x)) < 1e-12


@pytest.mark.parametrize(
    ("model", "name"), [("residual", "epsilon_plus"), *((m, "attn_lrp") for m in ATTENTION_MODELS)]
)
def test_backward_equals_grad(model: str, name: str) -> None:
    case, rules = {**MODELS, **ATTENTION_MODELS}[model](), COMPOSITES[name]
    params = {name: p.detach().clone().requires_grad_() for name, p in case.params.items()}
    scalar(case, rules, params, case.x).backward()
    expected = grad(lambda p: scalar(case, rules, p, case.x))({n: p.detach() for n, p in params.items()})
    # Relevance of LRP-0 does not depend on the last bias: torch.func has zeros for it, autograd nothing.
    ours = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in params.items()}
    assert largest_difference(ours, expected) < 1e-12


def test_starting_relevance_is_differentiable() -> None:
    case = smooth()
    start = normal(2, 3)
    assert finite_difference_error(lambda r: scalar(case, lrp.epsilon(0.1), case.params, case.x, r), start) < 1e-6
    through_output = lambda out: out.softmax(-1) * out  # noqa: E731
    assert (
        finite_difference_error(lambda x: scalar(case, lrp.epsilon(0.1), case.params, x, through_output), case.x) < 1e-6
    )


def test_the_value_of_one_hot_is_differentiable() -> None:
    case, at = smooth(), torch.tensor(0.7, dtype=torch.float64)
    rules = lrp.epsilon_plus(0.1)
    assert finite_difference_error(lambda v: scalar(case, rules, case.params, case.x, lrp.one_hot(1, v)), at) < 1e-6


def test_every_parameter_by_itself() -> None:
    """A small wrong gradient could hide among large ones."""
    case, rules = MODELS["residual"](), COMPOSITES["epsilon_gamma_box"]
    for name, parameter in case.params.items():
        error = finite_difference_error(lambda p, n=name: scalar(case, rules, {**case.params, n: p}, case.x), parameter)
        assert error < 1e-6, name


def test_value_and_relevance_train_together() -> None:
    """The loss on the value has the plain model's gradients, and the sum of losses the sum of the gradients."""
    case = MODELS["residual"]()
    fn = lrp.attribute_and_value(case.model_fn, lrp.epsilon_plus(0.1, stabilizer=0.1))

    def task(p: Any) -> Tensor:
        return fn(p, case.x, target=1)[1].square().sum()

    def both(p: Any) -> Tensor:
        relevance, value = fn(p, case.x, target=1)
        return relevance.square().sum() + value.square().sum()

    trained = {n: p for n, p in case.params.items() if "running" not in n}
    rest = {n: p for n, p in case.params.items() if "running" in n}
    expected = grad(lambda p: case.model_fn({**p, **rest}, case.x).square().sum())(trained)
    assert largest_difference(grad(lambda p: task({**p, **rest}))(trained), expected) < 1e-14
    assert finite_difference_error(both, case.params) < 1e-6
