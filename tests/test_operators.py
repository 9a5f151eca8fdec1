"""Operators that were refused, or explained with wrong numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

import lrpfunc as lrp
from tests.cases import normal

W, X = normal(4, 4), normal(2, 4, seed=1)
C = normal(4, seed=2)
GRADIENT = [(lambda layer: True, lrp.Gradient())]
WEIGHTED = [lrp.Epsilon(0.1), lrp.ZPlus(), lrp.Gamma(), lrp.Flat(), lrp.AlphaBeta()]


def explained(f: Callable[..., Tensor], rule: lrp.Rule, x: Tensor = X, params: Any = W) -> Tensor:
    rules = [(lrp.Dense | lrp.Convolution, rule), *lrp.attn_lrp()]
    return lrp.attribute(f, rules)(params, x, target=0)


# ---------------------------------------------------------------------------------------------------------------------
# Dense layers with what is added and multiplied around them


@pytest.mark.parametrize("rule", WEIGHTED, ids=repr)
def test_the_operand_that_alpha_scales(rule: lrp.Rule) -> None:
    doubled = explained(lambda w, x: x @ (2 * w) + C, rule)
    torch.testing.assert_close(explained(lambda w, x: torch.add(C, x @ w, alpha=2), rule), doubled)
    plain = explained(lambda w, x: x @ w - 2 * C, rule)
    torch.testing.assert_close(explained(lambda w, x: torch.sub(x @ w, C, alpha=2), rule), plain)


@pytest.mark.parametrize("rule", WEIGHTED, ids=repr)
def test_an_addend_that_is_not_read(rule: lrp.Rule) -> None:
    garbage = torch.full((2, 4), torch.nan, dtype=torch.float64)
    for added in (0, C):
        expected = explained(lambda w, x, added=added: x @ (2 * w) + added, rule)
        found = explained(lambda w, x, added=added: torch.addmm(garbage, x, w, beta=0, alpha=2) + added, rule)
        torch.testing.assert_close(found, expected)
    both = explained(lambda w, x: torch.add(C, torch.addmm(garbage, x, w, beta=0, alpha=2), alpha=3), rule)
    torch.testing.assert_close(both, explained(lambda w, x: x @ (6 * w) + C, rule))


@pytest.mark.parametrize("rule", [*WEIGHTED, lrp.WSquare(), lrp.ZBox(-1.0, 1.0)], ids=repr)
def test_one_vector(rule: lrp.Rule) -> None:
    """The sample of a batch by itself."""
    expected = lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, rule)])(W, X[:1], target=0)
    found = lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, rule)])(W, X[0], target=0)
    torch.testing.assert_close(found, expected[0])


CONVOLUTIONS = {
    "plain": nn.Conv2d(2, 4, 3),
    "no bias": nn.Conv2d(2, 4, 3, bias=False),
    "groups": nn.Conv2d(2, 4, 3, groups=2),
    "transposed": nn.ConvTranspose2d(2, 4, 1),
}


@pytest.mark.parametrize("convolution", CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_a_frozen_batch_norm_is_merged_as_a_batch_norm_is(convolution: nn.Module) -> None:
    plain, frozen = nn.BatchNorm2d(4).eval(), FrozenBatchNorm2d(4)
    values = {k: normal(4, seed=i).abs() + 0.5 for i, k in enumerate(("weight", "bias", "running_mean", "running_var"))}
    values["weight"][1] *= -1
    for norm in (plain, frozen):
        norm.load_state_dict(values, strict=False)
    found = []
    for norm in (plain, frozen):
        net = nn.Sequential(convolution, norm, nn.ReLU(), nn.Flatten()).double().eval()
        rules = [(lrp.Convolution, lrp.ZPlus()), (lrp.Activation, lrp.Pass())]
        model_fn, params = lrp.from_module(net)
        found.append(lrp.attribute(model_fn, rules)(params, normal(1, 2, 5, 5), target=0))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    ("f", "merges"),
    [
        (lambda z, s, b: z * s + b, True),
        (lambda z, s, b: (z - b) / s, False),  # what is subtracted is a bias, and a scale alone follows
        (lambda z, s, b: (z - b) / s + s, True),
        (lambda z, s, b: s * z + b, True),
        (lambda z, s, b: z * s, False),
        (lambda z, s, b: z * 0.5 + b, False),
        (lambda z, s, b: z * s.mean() + b, False),
        (lambda z, s, b: (z * s + b) + z, False),
        (lambda z, s, b: s / z + b, False),
    ],
)
def test_what_is_merged_with_a_dense_layer(f: Any, merges: bool) -> None:
    """A scale and a shift of each feature by constants, that nothing else comes between."""
    params = {"w": W, "s": C.abs() + 0.5, "b": normal(4, seed=3)}
    table = lrp.explain(lambda p, x: f(x @ p["w"], p["s"], p["b"]), lrp.attn_lrp())(params, X, target=0)
    (dense,) = (row.layer for row in table.rows if row.layer.kind is lrp.Kind.DENSE)
    assert abs(table.residual) < 1e-9
    assert (dense.affine is not None and bool(dense.affine.norm)) is merges


# ---------------------------------------------------------------------------------------------------------------------
# Powers, and values that are written


@pytest.mark.parametrize(
    "f",
    [
        lambda z: z.relu() ** 1.5,
        lambda z: z.abs() ** 1.5,
        lambda z: F.lp_pool2d(z.relu().reshape(1, 1, 2, 4), 1.5, 2).flatten(1),
    ],
)
@pytest.mark.parametrize("rules", [lrp.attn_lrp(), lrp.epsilon_plus()], ids=["attn_lrp", "epsilon_plus"])
def test_powers_between_1_and_2(f: Any, rules: lrp.Composite) -> None:
    """Their second derivative is infinite at 0, where that of relevance is not."""
    x = X.clone()
    x[0, :] = 0
    x.requires_grad_()
    weight = W.clone().requires_grad_()
    relevance = lrp.attribute(lambda w, x: f(x @ w), rules)(weight, x, target=0)
    relevance.sum().backward()
    assert relevance.isfinite().all()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_a_slice_that_is_filled_carries_nothing() -> None:
    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        h = x @ w
        h[:, 0] = 0.0
        return h

    relevance_fn = lrp.attribute(model_fn, lrp.epsilon())
    assert not relevance_fn(W, X, target=0).any()
    expected = lrp.attribute(lambda w, x: x @ w, lrp.epsilon())(W, X, target=1)
    torch.testing.assert_close(relevance_fn(W, X, target=1), expected)
