"""Rules at operations of several outputs: one message for each, in one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.func import grad

import lrpfunc as lrp
from lrpfunc.rules._message import Multiplier, Relevance, in_form
from tests.cases import normal
from tests.oracles import largest_difference

X = normal(2, 3, 4)


def spectrum(_: None, x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x @ x.mT)
    return torch.cat([values[:, -1:], vectors[:, 0] ** 2, values[:, :1] * vectors[:, 2]], -1)


def served(rule: lrp.Rule) -> lrp.Composite:
    return lrp.Composite([(lrp.operation("linalg_eigh"), rule)]) + lrp.attn_lrp()


def explained(rule: lrp.Rule, target: Any = lambda out: out) -> lrp.Explanation:
    explanation = lrp.explain(spectrum, served(rule))(None, X, target=target)
    assert all(abs(row.residual) <= 1e-9 * max(row.absolute, 1e-30) for row in explanation.rows)
    assert abs(explanation.residual) < 1e-9
    return explanation


RULES = {
    "gradient": lrp.Gradient(),
    "gradient of relevance": lrp.Gradient("relevance"),
    "stop": lrp.Stop(),
    "combination": 0.5 * lrp.Gradient() + torch.tensor(0.25).double() * lrp.Gradient("relevance") - lrp.Stop(),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("target", [0, 4, None])
def test_the_balance_closes(name: str, target: int | None) -> None:
    explanation = explained(RULES[name], target)
    for lowered in (True, False):
        relevance = lrp.attribute(spectrum, served(RULES[name]), lowered=lowered)(None, X, target=target)
        assert largest_difference(relevance, explanation.relevance) < 1e-12


def test_a_combination_is_the_sum_of_its_parts() -> None:
    parts = [explained(rule).relevance for rule in (lrp.Gradient(), lrp.Gradient("relevance"))]
    assert (
        largest_difference(explained(2 * lrp.Gradient() - lrp.Gradient("relevance")).relevance, 2 * parts[0] - parts[1])
        < 1e-12
    )


def test_stopping_is_booked() -> None:
    explanation = explained(lrp.Stop())
    assert explanation.relevance_in == 0
    assert explanation.absorbed["rule"] == pytest.approx(explanation.start, abs=1e-9)


def test_relevance_itself_goes_through_the_gradient() -> None:
    """Not multiplied by the activations: the cotangent of the eigenvalues is their relevance."""
    f = lambda _, x: tuple(torch.linalg.eigh(x))  # noqa: E731
    x = X @ X.mT
    start = (normal(2, 3, seed=1), normal(2, 3, 3, seed=2))
    _, pullback = lrp.vjp(f, [(lrp.operation("linalg_eigh"), lrp.Gradient("relevance"))], None, x)
    through = grad(lambda x: sum((s * y).sum() for s, y in zip(start, f(None, x), strict=True)))(x)
    assert largest_difference(pullback(start), through) < 1e-12


def test_a_rule_of_one_output_is_refused_in_words() -> None:
    for rule in (lrp.Pass(), 0.5 * lrp.Gradient() + lrp.Pass(), lrp.Epsilon()):
        with pytest.raises(
            lrp.RuleError, match=r"relevance comes to 2 outputs .*lrpfunc.Gradient\(\).*several_outputs = True"
        ):
            lrp.attribute(spectrum, served(rule))(None, X)


@dataclass(frozen=True, eq=False)
class Halving(lrp.Rule):
    """`Gradient`, written by a user for several outputs."""

    form: ClassVar[Any] = "multiplier"
    several_outputs: ClassVar[bool] = True

    def propagate(self, layer: lrp.BoundLayer, *messages: Any) -> tuple[Any, ...]:
        assert len(messages) == len(layer.outputs)
        return tuple(lrp.Multiplier(m / 2) for m in layer.vjp(*(message.value for message in messages)))


def test_a_rule_of_ones_own() -> None:
    for target in (0, None):  # of the eigenvalues alone, and of both
        halved, whole = (
            lrp.attribute(spectrum, served(r))(None, X, target=target) for r in (Halving(), lrp.Gradient())
        )
        assert largest_difference(2 * halved, whole) < 1e-12


@dataclass(frozen=True, eq=False)
class Written(lrp.Rule):
    """`Gradient`, by the function itself."""

    form: ClassVar[Any] = "multiplier"

    def propagate(self, layer: lrp.BoundLayer, message: Any) -> tuple[Any, ...]:
        _, pullback, *_ = torch.func.vjp(layer.function(layer.layer.inputs), *layer.inputs)
        return tuple(map(lrp.Multiplier, pullback(message.value)))


def test_one_of_several_outputs_is_served_like_the_only_one() -> None:
    """What relevance does not come to is no output of the layer."""
    f = lambda _, x: torch.linalg.eigh(x)[0]  # noqa: E731
    x = X @ X.mT
    for own, built_in in ((Written(), lrp.Gradient()), (2 * Written(), 2 * lrp.Gradient())):
        one, other = (lrp.explain(f, [(lrp.operation("linalg_eigh"), rule)])(None, x) for rule in (own, built_in))
        assert largest_difference(one.relevance, other.relevance) < 1e-12
    # The eigenvalues are homogeneous of degree 1: nothing is absorbed.
    assert one.relevance_in == pytest.approx(2 * one.start)


def test_the_form_of_messages() -> None:
    a, m, r = torch.tensor([2.0, 0.0]), Multiplier(torch.tensor([3.0, 1.0])), Relevance(torch.tensor([4.0, 5.0]))
    assert [type(x) for x in in_form([m, None], [a, a], "either")] == [Multiplier, Multiplier]
    assert [type(x) for x in in_form([m, r], [a, a], "either")] == [Relevance, Relevance]
    assert [x.value.tolist() for x in in_form([m, r, None], [a, a, a], "either")] == [[6, 0], [4, 5], [0, 0]]
    assert [x.value.tolist() for x in in_form([m, r, None], [a, a, a], "multiplier")] == [[3, 1], [2, 0], [0, 0]]


def test_what_conversion_loses_is_booked_for_all_outputs() -> None:
    """Relevance of an activation of zero, which a multiplier cannot hold, at the second of two outputs."""
    f = lambda _, x: tuple(torch.linalg.eigh(x))  # noqa: E731
    x = torch.diag(torch.tensor([1.0, 2.0])).double()  # whose vectors are 0 off the diagonal
    start = (torch.zeros(2).double(), torch.ones(2, 2).double())
    explanation = lrp.explain(f, [(lrp.operation("linalg_eigh"), lrp.Gradient())])(None, x, target=lambda _: start)
    assert explanation.absorbed["conversion"] == pytest.approx(2)
    assert abs(explanation.residual) < 1e-12


def test_statistics_beside_what_they_normalize() -> None:
    """They are explained as if they had been written beside it."""

    def native(_: None, x: Tensor) -> Tensor:
        y, mean, scale = torch.native_group_norm(x.reshape(2, 4, 1), None, None, 2, 4, 1, 2, 1e-5)
        return y.square().sum((1, 2)) + 3 * mean.sum(-1) + scale.sum(-1)

    def written(_: None, x: Tensor) -> Tensor:
        y = torch.nn.functional.group_norm(x.reshape(2, 4, 1), 2)
        scale = (x.reshape(2, 2, 2).var(-1, unbiased=False) + 1e-5).rsqrt()
        return y.square().sum((1, 2)) + 3 * x.reshape(2, 2, 2).mean(-1).sum(-1) + scale.sum(-1)

    def fused(_: None, x: Tensor) -> Tensor:
        y, scale = torch.ops.aten._fused_rms_norm(x, (4,), None, 1e-5)
        return y.square().sum(-1) + scale.sum(-1)

    def rms(_: None, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1) + 1e-5).rsqrt()
        return torch.nn.functional.rms_norm(x, (4,), eps=1e-5).square().sum(-1) + scale

    x = normal(2, 4)
    for one, other in ((native, written), (fused, rms)):
        assert largest_difference(one(None, x), other(None, x)) < 1e-12
        relevance = [lrp.attribute(f, lrp.attn_lrp())(None, x) for f in (one, other)]
        assert largest_difference(*relevance) < 1e-12
        assert abs(lrp.explain(one, lrp.attn_lrp())(None, x).residual) < 1e-12
