"""Numbers worked out by hand, on nets of one layer or two, where a fault once went unseen."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lrpfunc as lrp
from tests.oracles import finite_difference_error


def column(*numbers: float) -> Tensor:
    return torch.tensor([[number] for number in numbers], dtype=torch.float64)


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


@pytest.mark.parametrize("cube", [lambda x: x**3, lambda x: x.pow(3.0), lambda x: torch.float_power(x, 3)])
def test_odd_powers_may_be_negative(cube: Callable[[Tensor], Tensor]) -> None:
    """`z = (-1)(-1) + (8)(1) = 9`, and both contributions are positive."""
    rules = [(lrp.Activation, lrp.Pass()), (lrp.Dense, lrp.ZPlus(0.0))]
    relevance = lrp.attribute(lambda w, x: cube(x) @ w, rules)(column(-1, 1), row(-1, 2), target=0)
    assert relevance.tolist() == [pytest.approx([1, 8])]


@pytest.mark.parametrize("power", [2, 4])
def test_even_powers_leave_out_the_negative_branch(power: int) -> None:
    seen: list[bool] = []

    def dense(layer: lrp.Layer) -> bool:
        seen.extend([layer.nonnegative] if lrp.Dense(layer) else [])
        return lrp.Dense(layer)

    rules = [(lrp.Activation, lrp.Pass()), (dense, lrp.ZPlus(0.0))]
    lrp.attribute(lambda w, x: x**power @ w, rules)(column(-1, 1), row(-1, 2), target=0)
    assert seen
    assert all(seen)


@pytest.mark.parametrize("rule", [lrp.Epsilon(0.0), lrp.Gamma(0.0, 0.0)])
@pytest.mark.parametrize("of_relu", [lrp.ReLUDeconvNet(), lrp.ReLUBetaSmooth(0.0)])
def test_what_passes_a_relu_that_is_off_arrives(rule: lrp.Rule, of_relu: lrp.Rule) -> None:
    """`y = 1 - 2 = -1`, and the ReLU's rule gives it a multiplier of 1, or of sigmoid(0), all the same."""
    relevance_fn = lrp.attribute(lambda w, x: (x @ w).relu(), [(lrp.ReLU, of_relu), (lrp.Dense, rule)])
    passed = 1.0 if isinstance(of_relu, lrp.ReLUDeconvNet) else 0.5
    assert relevance_fn(column(1, -1), row(1, 2), target=0).tolist() == [pytest.approx([passed, -2 * passed])]


@pytest.mark.parametrize(("f", "passed"), [(torch.sigmoid, 0.5), (torch.exp, 1.0), (torch.tanh, 0.0)])
def test_pass_keeps_the_relevance_of_an_input_of_zero(f: Callable[[Tensor], Tensor], passed: float) -> None:
    """What is 0 at 0 has none there; all other functions have their value, which goes on to the zero."""
    relevance_fn = lrp.attribute(lambda _, x: f(x), [(lrp.Activation, lrp.Pass())])
    assert relevance_fn(None, row(0, 1), target=0).tolist() == [[passed, 0]]


def test_gamma_books_the_relevance_of_an_output_of_zero() -> None:
    """`y = 1 - 1 = 0` is neither positive nor negative, so that its relevance of 2 goes to nobody."""
    rules = [(lrp.Dense, lrp.Gamma(0.5, 0.1))]
    table = lrp.explain(lambda w, x: x @ w, rules)(column(1, -1), row(1, 1), target=row(2))
    assert table.relevance.tolist() == [[0, 0]]
    assert table.absorbed["rule"] == 2
    assert table.residual == 0


def test_a_derivative_that_is_lost_is_seen() -> None:
    """Where neither changes, nothing was compared."""
    x = torch.ones(2, dtype=torch.float64)
    assert finite_difference_error(lambda x: x.square().sum(), x) < 1e-9
    assert finite_difference_error(lambda x: x.detach().square().sum() + 0 * x.sum(), x) == 1
    assert finite_difference_error(lambda x: (0 * x).sum(), x) == math.inf


def test_every_raises_says_what() -> None:
    silent = []
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("pytest.raises", "pytest.warns"):
                continue
            if "match" not in [keyword.arg for keyword in node.keywords]:
                silent.append(f"{path.name}:{node.lineno}")
    assert silent == []
