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


def test_an_exported_batch_norm_is_merged() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).double().eval()
    x = normal(1, 2, 5, 5)
    exported = torch.export.export(net, (x,)).run_decompositions({}).module()
    found = []
    for module in (net, exported):
        model_fn, params = lrp.from_module(module)
        found.append(lrp.attribute(model_fn, lrp.epsilon_plus())(params, x, target=0))
    torch.testing.assert_close(found[1], found[0])


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


def test_random_numbers_that_take_the_place_of_activations() -> None:
    found = lrp.attribute(lambda w, x: (x @ w).normal_() + x, lrp.attn_lrp())(W, X, target=0)
    torch.testing.assert_close(found, torch.cat([X[:, :1], torch.zeros(2, 3)], 1).double())


# ---------------------------------------------------------------------------------------------------------------------
# Functions of several operands, by their pieces

P = X.abs() + 0.5
WRITTEN: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], set[str]]] = {
    "addcmul": (lambda h, x: torch.addcmul(h, x, h, value=2.0), {"Product"}),
    "addcdiv": (lambda h, x: torch.addcdiv(h, h, x), {"Quotient", "Sum"}),
    "lerp": (lambda h, x: torch.lerp(h, x, x.sigmoid()), {"Activation", "Product", "Sum"}),
    "addbmm": (lambda h, x: torch.addbmm(h, x.reshape(1, 2, 4), h.T @ h[None]), {"Product", "Sum"}),
    "cross": (lambda h, x: torch.cross(h[:, :3], x[:, 1:], dim=1), {"Product", "Sum"}),
    "trapezoid": (lambda h, x: torch.trapezoid(h, x)[:, None], {"Product", "Sum"}),
    "cdist": (lambda h, x: torch.cdist(h, x), {"Statistic", "Sum"}),
    "prod": (lambda h, x: h.prod(1, keepdim=True), {"Product"}),
    "cumprod": (lambda h, x: h.cumprod(1), {"Product"}),
    "logaddexp": (lambda h, x: torch.logaddexp(h, x), {"Softmax"}),
    "logcumsumexp": (lambda h, x: h.logcumsumexp(1), {"Softmax"}),
    "hypot": (lambda h, x: torch.hypot(h, x), {"Statistic"}),
    "renorm": (lambda h, x: torch.renorm(h, 2, 0, 0.5), {"Normalization"}),
    "block_diag": (lambda h, x: torch.block_diag(h, x), set()),
    "multi_dot": (lambda h, x: torch.linalg.multi_dot([h, x.T, x]), {"Product"}),
    "median": (lambda h, x: h.median().reshape(1, 1), set()),
    "quantile": (lambda h, x: h.quantile(0.3, dim=1, keepdim=True), {"Linear"}),
    "cummax": (lambda h, x: h.cummax(1).values, set()),
    "scatter_reduce": (lambda h, x: torch.scatter_reduce(h, 1, torch.tensor([[0, 1, 1, 2]]), x, "amax"), set()),
    "scatter_mean": (lambda h, x: torch.scatter_reduce(h, 1, (h * 0).long(), x, "mean"), {"Linear"}),
    "index_reduce": (lambda h, x: torch.index_reduce(h, 0, torch.tensor([1, 0]), x, "amax"), set()),
    "clamp": (lambda h, x: torch.clamp(h, x - 1, x + 1), {"Linear"}),
    "affine_grid": (lambda h, x: F.affine_grid(h[:, :3].reshape(1, 2, 3), [1, 1, 2, 2]).reshape(1, -1), {"Sum"}),
    "grid_sample": (
        lambda h, x: F.grid_sample(h.reshape(1, 2, 2, 2), x[:, :2].reshape(1, 1, 2, 2) - 1).reshape(1, -1),
        {"Linear", "Product", "Sum"},
    ),
    "tanh_backward": (lambda h, x: torch.ops.aten.tanh_backward(h, x), {"Activation", "Linear", "Product"}),
    "layer_norm": (lambda h, x: F.layer_norm(h, (4,), x[0], x[1]), {"Normalization", "Product", "Sum"}),
    "solve": (lambda h, x: torch.linalg.solve(h.T @ h + torch.eye(4).double(), x[0])[None], {"Product", "Statistic"}),
    "det": (lambda h, x: torch.linalg.det(h[:, :2]).reshape(1, 1), {"Product"}),
    "maximum": (lambda h, x: torch.maximum(h, torch.zeros(3, 2, 4).double()).reshape(1, -1), set()),
}


@pytest.mark.filterwarnings("ignore:Default grid_sample and affine_grid behavior has changed")
@pytest.mark.filterwarnings("ignore:.*is in beta")
@pytest.mark.parametrize("name", WRITTEN)
def test_functions_of_several_operands(name: str) -> None:
    """To the bit, with torch's gradient, every balance closed, and the derivative of finite differences."""
    f, kinds = WRITTEN[name]

    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        return f(x @ w, x)

    x = P.clone().requires_grad_()
    output = model_fn(W, x)
    (gradient,) = torch.autograd.grad(output[:, 0].sum(), x)
    relevance, value = lrp.attribute_and_value(model_fn, GRADIENT)(W, P, target=0)
    assert torch.equal(value, output)
    torch.testing.assert_close(relevance, P * gradient)
    table = lrp.explain(model_fn, lrp.attn_lrp())(W, P, target=0)
    assert all(abs(row.residual) < 1e-9 * max(1.0, row.absolute) for row in table.rows)
    hidden = {"Select", "Scale", "Winner", "Dense"}
    assert {str(row.layer.kind) for row in table.rows} - hidden >= kinds
    relevance_fn = lrp.attribute(model_fn, lrp.attn_lrp(), lowered=False)

    def total(t: float | Tensor) -> Tensor:
        return (relevance_fn(W, P + t * normal(2, 4, seed=4), target=0) * normal(2, 4, seed=5)).sum()

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(total(t), t)
    expected = (total(1e-5) - total(-1e-5)) / 2e-5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_each_factor_of_a_product_has_the_same_share() -> None:
    x = torch.tensor([[2.0, 3.0, 5.0]], dtype=torch.float64)
    relevance = lrp.attribute(lambda _, x: x.prod(1, keepdim=True), lrp.attn_lrp())(None, x, target=0)
    torch.testing.assert_close(relevance, torch.full((1, 3), 10.0, dtype=torch.float64))
    relevance = lrp.attribute(lambda _, x: x.cumprod(1), lrp.attn_lrp())(None, x, target=1)
    torch.testing.assert_close(relevance, torch.tensor([[3.0, 3.0, 0.0]], dtype=torch.float64))


def test_the_winner_takes_it() -> None:
    x = torch.tensor([[1.0, 5.0, 2.0, 4.0]], dtype=torch.float64)
    for f, expected in (
        (lambda _, x: x.cummax(1).values[:, 2:], [0.0, 5.0, 0.0, 0.0]),
        (lambda _, x: x.quantile(0.5, dim=1, keepdim=True), [0.0, 0.0, 1.0, 2.0]),
        (
            lambda _, x: torch.zeros(1, 1).double().scatter_reduce(1, torch.zeros(1, 4).long(), x, "amax"),
            [0, 5.0, 0, 0],
        ),
    ):
        relevance = lrp.attribute(f, lrp.attn_lrp())(None, x, target=0)
        torch.testing.assert_close(relevance, torch.tensor([expected], dtype=torch.float64))


def test_an_operation_of_which_a_piece_cannot_be_explained_stays_whole() -> None:
    """And is refused under its own name."""
    with pytest.raises(lrp.UncoveredLayerError, match=r"linalg_cond   linalg_cond   \(2, 2\) -> \(\)"):
        lrp.attribute(lambda w, x: torch.linalg.cond(x @ w, "nuc").reshape(1, 1), lrp.attn_lrp())(W[:, :2], X)


def test_what_does_not_depend_on_the_input_is_not_written_out() -> None:
    """Neither does it become an operation of the forward pass that was not there."""
    table = lrp.explain(lambda w, x: x @ torch.lerp(w, w.T, w.sigmoid()), lrp.attn_lrp())(W, X, target=0)
    assert [row.layer.kind for row in table.rows] == [lrp.Kind.DENSE]


def test_what_broadcasts() -> None:
    """Cosines along an axis that only one of the two has."""
    x, y = normal(1, 2, 3), normal(2, 1, 3, seed=1)

    def model_fn(_: None, x: Tensor) -> Tensor:
        return F.cosine_similarity(x, y, dim=-2).reshape(1, -1)

    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model_fn(None, z)[0, 0], z)
    torch.testing.assert_close(lrp.attribute(model_fn, GRADIENT)(None, x, target=0), x * gradient)


def test_a_qr_decomposition() -> None:
    """The orthogonal factor is the matrix times the inverse of the other one."""
    x = normal(4, 3)
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.linalg.qr(z)[0][0, 1], z)
    relevance = lrp.attribute(lambda _, x: torch.linalg.qr(x)[0][:1], GRADIENT)(None, x, target=1)
    torch.testing.assert_close(relevance, x * gradient)
