"""Relevance that explodes or is lost is said once, with the layer and the rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfunc as lrp

X = torch.ones(2, 4).double()


def heard(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    ours = [w for w in caught if w.category is lrp.RelevanceWarning]  # torch may warn of something when it compiles
    assert all(w.filename == __file__ for w in ours)
    return [str(w.message) for w in ours]


class Net(nn.Module):
    """Its second layer cancels nearly all of what it adds; with a bias, that outweighs the rest."""

    def __init__(self, weight: float = -0.9999, bias: float = 0.0):
        super().__init__()
        self.first, self.second = nn.Linear(4, 2, bias=False), nn.Linear(2, 1)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))
            self.second.weight.copy_(torch.tensor([[1.0, weight]]))
            self.second.bias.fill_(bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def made(**given: float) -> tuple[Any, Any]:
    return lrp.from_module(Net(**given))


@pytest.mark.parametrize("lowered", [True, False])
def test_relevance_that_explodes(lowered: bool) -> None:
    model_fn, params = made()
    relevance_fn = lrp.attribute(model_fn, [(lrp.Dense, lrp.Epsilon(0.0))], lowered=lowered)
    (text,) = heard(lambda: relevance_fn(params, X, target=0))
    assert text.startswith("relevance explodes: magnitudes that sum to ")
    assert "\n\n    second   linear   (2, 2) -> (2, 1)\n        Epsilon(epsilon=0.0, zero_params=None)\n\n" in text
    assert text.endswith("print(lrpfunc.explain(model_fn, rules)(params, x, target=target))")
    again = lrp.attribute(model_fn, [(lrp.Dense, lrp.Epsilon(0.0))], lowered=lowered)
    assert heard(lambda: (again(params, X, target=0), again(params, X[:1], target=0))) == []


def test_relevance_that_is_lost() -> None:
    model_fn, params = made(weight=1.0, bias=1e5)
    (text,) = heard(lambda: lrp.attribute(model_fn, lrp.epsilon())(params, X, target=0))
    assert text.startswith("relevance is nearly all lost: of magnitudes that sum to 2e+05 at the output, ")
    assert "    second   linear" in text
    assert "Epsilon(epsilon=1e-06" in text


def test_an_overflow_is_said_too() -> None:
    """An activation that overflows, of which the output shows nothing."""
    model_fn = lambda w, x: ((x @ w) * 1e200 * 1e200).tanh()  # noqa: E731
    (text,) = heard(lambda: lrp.attribute(model_fn, lrp.attn_lrp())(torch.ones(4, 2).double(), X, target=0))
    assert "lost" in text
    assert "    tanh   tanh   (2, 2) -> (2, 2)\n        Pass()" in text


@dataclass(frozen=True, eq=False)
class Overflowing(lrp.Rule):
    """Gives more than a number can hold."""

    def propagate(self, layer: lrp.BoundLayer, message: Any) -> tuple[Any, ...]:
        return (lrp.Relevance(torch.inf * layer.input),)


def test_what_is_no_number_is_said_where_it_begins() -> None:
    model_fn, params = made(weight=1.0)
    rules = [(lrp.name("second"), Overflowing()), (lrp.Dense, lrp.Epsilon(0.1))]
    (text,) = heard(lambda: lrp.attribute(model_fn, rules)(params, X, target=0))
    assert "explodes" in text
    assert "    second   linear   (2, 2) -> (2, 1)\n        Overflowing()" in text


def test_nothing_is_said_where_all_is_well() -> None:
    model_fn, params = made(weight=1.0)
    assert heard(lambda: lrp.attribute(model_fn, lrp.epsilon())(params, X, target=0)) == []
    assert heard(lambda: lrp.vjp(model_fn, lrp.epsilon(), params, X)[1](torch.ones(2, 1).double())) == []
    # Cotangents are no relevance: nothing is conserved.
    assert heard(lambda: lrp.attribute(lambda w, x: 1e5 * (x @ w), lrp.gradient())(torch.eye(4).double(), X)) == []
    # No start, no loss.
    assert heard(lambda: lrp.attribute(model_fn, lrp.epsilon())(params, X, target=torch.zeros(2, 1).double())) == []


def test_a_pullback_says_so_too() -> None:
    model_fn, params = made()
    _, pullback = lrp.vjp(model_fn, [(lrp.Dense, lrp.Epsilon(0.0))], params, X)
    assert len(heard(lambda: pullback(torch.ones(2, 1).double()))) == 1
    assert heard(lambda: pullback(torch.ones(2, 1).double())) == []


def test_transforms_and_traces_see_nothing_of_it() -> None:
    """Where there are no numbers it waits for the first call that has them."""
    model_fn, params = made()
    relevance_fn = lrp.attribute(model_fn, [(lrp.Dense, lrp.Epsilon(0.0))])
    assert heard(lambda: torch.vmap(lambda t: relevance_fn(params, X, target=t))(torch.tensor([0, 0]))) == []
    assert heard(lambda: torch.func.grad(lambda x: relevance_fn(params, x, target=0).sum())(X)) == []
    assert heard(lambda: torch.compile(relevance_fn, backend="aot_eager")(params, X, target=0)) == []
    assert len(heard(lambda: relevance_fn(params, X, target=0))) == 1
