"""Rules against arithmetic written by hand, and the identities between them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import lrpfunc as lrp
from tests.cases import ATTENTION_RULES, ELEMENTWISE_RULES, LINEAR_RULES, SUM_RULES, normal
from tests.oracles import finite_difference_error, largest_difference


def dense(params: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:
    return F.linear(x, *params)


def relevance(rule: lrp.Rule, weight: Tensor, bias: Tensor | None, x: Tensor, start: Tensor) -> Tensor:
    return lrp.attribute(dense, [(lrp.Dense, rule)])((weight, bias), x, target=start)


def stab(z: float, epsilon: float = 1e-6) -> float:
    return z + epsilon if z >= 0 else z - epsilon


def by_hand(name: str, w: list[list[float]], b: list[float], x: list[float], r: list[float]) -> list[float]:
    """Section 1 of the reference, one number at a time."""
    outputs, inputs = range(len(w)), range(len(x))

    def up(v: float) -> float:
        return max(v, 0.0)

    def down(v: float) -> float:
        return min(v, 0.0)

    result = [0.0 for _ in inputs]
    for j in outputs:
        z = sum(w[j][i] * x[i] for i in inputs) + b[j]
        gamma = 0.25
        if name == "epsilon":
            shares = [x[i] * w[j][i] * r[j] / stab(z) for i in inputs]
        elif name in ("zplus", "alpha_beta"):
            za = sum(up(w[j][i] * x[i]) for i in inputs) + up(b[j])
            shares = [up(w[j][i] * x[i]) * r[j] / stab(za) for i in inputs]
            if name == "alpha_beta":
                zb = sum(down(w[j][i] * x[i]) for i in inputs) + down(b[j])
                shares = [2 * s - down(w[j][i] * x[i]) * r[j] / stab(zb) for i, s in zip(inputs, shares, strict=True)]
        elif name == "gamma":
            part = up if z > 0 else down
            c = [x[i] * w[j][i] + gamma * part(w[j][i] * x[i]) for i in inputs]
            shares = [c[i] * r[j] / stab(sum(c) + b[j] + gamma * part(b[j])) for i in inputs]
        elif name == "zbox":
            c = [w[j][i] * x[i] - up(w[j][i]) * -2.0 - down(w[j][i]) * 2.0 for i in inputs]
            shares = [c[i] * r[j] / stab(sum(c)) for i in inputs]
        elif name == "wsquare":
            shares = [w[j][i] ** 2 * r[j] / stab(sum(v**2 for v in w[j]) + b[j] ** 2) for i in inputs]
        else:
            shares = [r[j] / stab(len(x)) for _ in inputs]
        result = [total + share for total, share in zip(result, shares, strict=True)]
    return result


BY_HAND = {
    "epsilon": lrp.Epsilon(),
    "zplus": lrp.ZPlus(),
    "alpha_beta": lrp.AlphaBeta(),
    "gamma": lrp.Gamma(0.25),
    "zbox": lrp.ZBox(-2.0, 2.0),
    "wsquare": lrp.WSquare(),
    "flat": lrp.Flat(),
}


@pytest.mark.parametrize("name", BY_HAND)
@given(seed=st.integers(0, 2**31), inputs=st.integers(1, 4), outputs=st.integers(1, 3))
def test_rules_by_hand(name: str, seed: int, inputs: int, outputs: int) -> None:
    w, b, x, r = (
        normal(*s, seed=seed + i) for i, s in enumerate([(outputs, inputs), (outputs,), (inputs,), (outputs,)])
    )
    expected = by_hand(name, w.tolist(), b.tolist(), x.tolist(), r.tolist())
    got = relevance(BY_HAND[name], w, b, x[None], r[None])[0]
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 2**31), bias=st.booleans())
def test_identities(seed: int, bias: bool) -> None:
    w, x, r = normal(3, 4, seed=seed), normal(2, 4, seed=seed + 1), normal(2, 3, seed=seed + 2)
    b = normal(3, seed=seed + 3) if bias else None

    def of(rule: lrp.Rule) -> Tensor:
        return relevance(rule, w, b, x, r)

    epsilon, zplus = lrp.Epsilon(0.1), lrp.ZPlus(0.1)
    assert torch.allclose(of(lrp.Gamma(0.0, 0.1)), of(epsilon))
    assert torch.allclose(of(2 * epsilon - epsilon), of(epsilon))
    assert torch.allclose(of(epsilon - epsilon), torch.zeros_like(x), atol=1e-12)
    assert torch.allclose(of(epsilon / 2 + zplus * 0.5), 0.5 * of(epsilon) + 0.5 * of(zplus))
    assert torch.allclose(of(-(epsilon + zplus) * 3), -3 * of(epsilon) - 3 * of(zplus))
    assert torch.equal(of(lrp.AlphaBeta(1.0, 0.0, 0.1)), of(zplus))
    assert torch.equal(of(lrp.Epsilon(lrp.Stabilizer(0.1))), of(epsilon))
    assert torch.allclose(of(lrp.Epsilon(0.0)), of(lrp.Gradient()), atol=1e-9)
    if not bias:
        assert torch.allclose(of(lrp.Epsilon(0.0)).sum(), r.sum())


def test_flat_and_wsquare_look_at_real_pixels_only() -> None:
    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        return F.conv1d(x, w, padding=1)

    x, start = normal(1, 1, 5), torch.ones(1, 1, 5).double()
    got = lrp.attribute(model_fn, [(lrp.Convolution, lrp.Flat(0.0))])(normal(1, 1, 3), x, target=start)
    expected = torch.tensor([5 / 6, 7 / 6, 1, 7 / 6, 5 / 6]).double()
    assert torch.allclose(got[0, 0], expected, atol=1e-7)
    ones = torch.ones(1, 1, 3).double()
    squares = lrp.attribute(model_fn, [(lrp.Convolution, lrp.WSquare(0.0))])(ones, x, target=start)
    assert torch.allclose(squares, got)


def test_one_branch_where_the_input_is_known_to_be_non_negative() -> None:
    """The saved branch changes nothing."""

    def known(w: Tensor, x: Tensor) -> Tensor:
        return F.linear(torch.relu(x), w)

    def unknown(w: Tensor, x: Tensor) -> Tensor:
        return F.linear(torch.relu(x) - 0.0, w)

    for rule in (lrp.ZPlus(), lrp.AlphaBeta(), lrp.Gamma(), lrp.AlphaBeta(1.0, 0.0)):
        results = []
        for model_fn, nonnegative in ((known, True), (unknown, False)):
            rules = [(lrp.Dense, rule), (lrp.Activation, lrp.Pass())]
            (layer,) = (
                row.layer for row in lrp.explain(model_fn, rules)(normal(3, 4), normal(2, 4), target=1).rows
                if row.layer.kind is lrp.Kind.DENSE
            )  # fmt: skip
            assert layer.nonnegative is nonnegative
            results.append(lrp.attribute(model_fn, rules)(normal(3, 4), normal(2, 4), target=1))
        assert largest_difference(*results) < 1e-13


ACTIVATIONS: dict[str, Any] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(min=0.1),
    "maximum": lambda x: torch.maximum(x, torch.tensor(0.2).double()),
    "softsign_like": lambda x: F.softshrink(x, 0.1),
    "logsigmoid": F.logsigmoid,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3]).double()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_pass_hands_relevance_on_in_both_forms(name: str) -> None:
    f, x = ACTIVATIONS[name], torch.cat([normal(2, 4), torch.zeros(2, 1).double()], 1)
    rules = [(lrp.Activation, lrp.Pass())]
    start = normal(2, 5, seed=1)
    assert torch.equal(lrp.attribute(f, rules, argnums=0)(x, target=start), start)
    as_multiplier = lrp.attribute(f, rules, argnums=0)(x)  # starts as a multiplier of ones
    expected = (
        f(x) if name in ("sigmoid", "softplus", "hardsigmoid", "clamp", "maximum", "logsigmoid") else f(x) * (x != 0)
    )
    assert torch.allclose(as_multiplier, expected)
    gradient = torch.func.jacrev(lambda x: lrp.attribute(f, rules, argnums=0)(x))(x)
    assert gradient.isfinite().all()


def test_multiplier_of_pass_at_zero_is_the_slope() -> None:
    """A multiplier at zero matters once something upstream multiplies it by more than the activation."""
    fn = lrp.attribute(lambda w, x: F.gelu(x @ w), [(lrp.Activation, lrp.Pass()), (lrp.Dense, lrp.Gradient())])
    w, x = torch.tensor([[1.0], [-1.0]]).double(), torch.ones(1, 2).double()
    assert torch.allclose(fn(w, x), torch.tensor([[0.5, -0.5]]).double())


def test_relevance_may_start_where_a_layer_is_zero() -> None:
    """Zero activations hold relevance in one form and none in the other."""
    fn = lrp.attribute(lambda w, x: torch.relu(x) @ w, [(lrp.Dense, lrp.Flat(0.0)), (lrp.Activation, lrp.Pass())])
    x = torch.tensor([[-1.0, 1.0]]).double()
    assert torch.allclose(fn(torch.ones(2, 1).double(), x), torch.tensor([[0.5, 0.5]]).double())


def test_stop_and_uniform() -> None:
    a, b = normal(2, 3), normal(2, 3, seed=1)
    product = [(lrp.operation("mul"), lrp.Uniform())]
    x, y = lrp.attribute(lambda _, x, y: x * y, product, argnums=(1, 2))(None, a, b)
    assert torch.allclose(x, a * b / 2)
    assert torch.allclose(y, a * b / 2)
    x, y = lrp.attribute(lambda _, x, y: x + y, [(lrp.Sum, lrp.Uniform())], argnums=(1, 2))(None, a, b[:1])
    assert torch.allclose(x, (a + b[:1]) / 2)
    assert torch.allclose(y, ((a + b[:1]) / 2).sum(0, keepdim=True))
    gate = [(lrp.operation("sigmoid"), lrp.Stop()), (lrp.operation("mul"), lrp.Gradient())]
    x, y = lrp.attribute(lambda _, x, y: x * torch.sigmoid(y), gate, argnums=(1, 2))(None, a, b)
    assert torch.allclose(x, a * torch.sigmoid(b))
    assert y.abs().max() == 0


def test_every_rule_is_in_the_lists() -> None:
    listed = {
        type(rule) for rules in (LINEAR_RULES, ELEMENTWISE_RULES, SUM_RULES, ATTENTION_RULES) for rule in rules.values()
    }
    public = {v for v in vars(lrp).values() if isinstance(v, type) and issubclass(v, lrp.Rule) and v is not lrp.Rule}
    assert public <= listed


def test_algebra_takes_numbers_only() -> None:
    for factor in ("2", None, lrp.Epsilon()):
        with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
            lrp.Epsilon() * factor  # type: ignore[operator]
    assert sum([lrp.Epsilon(), lrp.ZPlus()]) == lrp.Epsilon() + lrp.ZPlus()
    assert lrp.Epsilon(zero_params=iter(["bias"])) == lrp.Epsilon(zero_params="bias")
    assert lrp.Epsilon(zero_params={"weight", "bias"}) == lrp.Epsilon(zero_params=["bias", "weight"])


def test_pass_is_differentiable_where_a_smooth_activation_is_zero() -> None:
    rules = [(lrp.Activation, lrp.Pass()), (lrp.Dense, lrp.Gradient())]
    w = torch.tensor([[1.0], [-1.0]]).double()
    for f in (F.gelu, F.silu, F.mish):
        fn = lrp.attribute(lambda u, f=f: f(u @ w), rules, argnums=0)
        assert finite_difference_error(lambda u, fn=fn: fn(u)[0, 0], torch.ones(1, 2).double()) < 1e-6


def test_norm_scale_has_a_derivative_at_zero() -> None:
    gradient = torch.func.grad(lambda z: lrp.Stabilizer(0.1, norm_scale=True)(z).sum())(torch.zeros(2, 3))
    assert gradient.isfinite().all()


def test_cotangent_composites_answer_with_cotangents() -> None:
    w, x = normal(3, 4), normal(2, 4)
    for rule in (lrp.Epsilon(0.0), lrp.Epsilon(0.0) + 0 * lrp.ZPlus()):
        rules = lrp.Composite([(lrp.Dense, rule)]) + lrp.gradient()
        cotangent = lrp.attribute(dense, rules)((w, None), x, target=1)
        assert torch.allclose(cotangent, w[1].expand(2, 4))


def test_gamma_is_one_number() -> None:
    with pytest.raises(lrp.RuleError, match=r"gamma has shape \(2,\)"):
        relevance(lrp.Gamma(torch.ones(2)), normal(3, 4), None, normal(2, 4), normal(2, 3))


def test_bounds_of_an_unbatched_image() -> None:
    f = lambda w, x: F.conv2d(x, w)  # noqa: E731
    rules = [(lrp.Convolution, lrp.ZBox(-torch.ones(3), 1.0))]
    with pytest.raises(lrp.RuleError, match=r"give it shape \(3, 1, 1\)"):
        lrp.attribute(f, rules)(normal(2, 3, 2, 2), normal(3, 3, 3))


@dataclass(frozen=True, eq=False)
class Returns(lrp.Rule):
    """Whatever it is told to return, made of the right answer."""

    make: Callable[[Tensor], Any]

    def propagate(self, layer: lrp.BoundLayer, message: Any) -> Any:
        return self.make(message.value.sum(-1, keepdim=True).expand(layer.input.shape))


@pytest.mark.parametrize(
    ("make", "came"),
    [
        (lambda r: lrp.Relevance(r), "returned Relevance of shape (2, 4)"),
        (lambda r: (r,), "returned (a tensor of shape (2, 4), which does not say what it holds)"),
        (lambda r: r, "returned a tensor of shape (2, 4), which does not say what it holds"),
        (lambda r: (), "returned ()"),
        (lambda r: (lrp.Relevance(r), None), "returned (Relevance of shape (2, 4), None)"),
        (lambda r: (lrp.Relevance(r[0]),), "returned (Relevance of shape (4,))"),
        (lambda r: (lrp.Multiplier(r[:, :1]),), "returned (Multiplier of shape (2, 1))"),
        (lambda r: (lrp.Relevance(1.0),), "returned (a Relevance)"),  # pyright: ignore[reportArgumentType]
        (lambda r: None, "returned None"),
    ],
)
def test_what_a_rule_must_return(make: Callable[[Tensor], Any], came: str) -> None:
    W, x = torch.ones(4, 3).double(), torch.ones(2, 4).double()
    wrong = re.escape(came)
    for rule in (Returns(make), 0.5 * Returns(make) + 0.5 * lrp.Epsilon()):
        for transform in (lrp.attribute, partial(lrp.attribute, lowered=False), lrp.explain):
            with pytest.raises(lrp.RuleError, match=wrong) as raised:
                transform(lambda w, x: x @ w, [(lrp.Dense, rule)])(W, x, target=0)
            assert "matmul   (2, 4) -> (2, 3)" in str(raised.value)
            assert "(a message of shape (2, 4))" in str(raised.value)
            assert "return (lrp.Relevance(r),)" in str(raised.value)
