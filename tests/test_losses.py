"""Losses of relevance: by hand, free of scale, and with derivatives everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import lrpfunc as lrp
from lrpfunc import losses
from tests.cases import normal

MASK = (normal(4, 1, 3, 5, seed=1) > 0).double()
MAP = normal(4, 2, 3, 5, seed=2)
LOSSES: dict[str, Callable[..., Tensor]] = {
    "outside": partial(losses.outside, mask=MASK),
    "outside, absolute": partial(losses.outside, mask=MASK, power=1.0),
    "alignment": partial(losses.alignment, map=MAP),
    "consistency": partial(losses.consistency, other=MAP),
    "sparsity": losses.sparsity,
    "total_variation": losses.total_variation,
}
R = normal(4, 2, 3, 5)


@pytest.mark.parametrize("name", LOSSES)
def test_scale_does_not_matter(name: str) -> None:
    loss = LOSSES[name](R)
    assert loss > 0
    for scale in (1e-3, 7.0):
        torch.testing.assert_close(LOSSES[name](scale * R), loss)
    # So the derivative along the relevance itself is zero.
    assert abs(float((grad(LOSSES[name])(R) * R).sum())) < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_the_derivative_is_that_of_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(LOSSES[name], R.clone().requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_a_sample_without_relevance(name: str) -> None:
    """It costs nothing, and neither its value nor its derivative is NaN."""
    some = R * torch.tensor([1.0, 0.0, 1.0, 0.0]).double().reshape(4, 1, 1, 1)
    assert grad(LOSSES[name])(some).isfinite().all()
    kept = torch.tensor([True, False, True, False])
    torch.testing.assert_close(2 * LOSSES[name](some), LOSSES[name](some, annotated=kept))
    assert LOSSES[name](0 * R) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_annotated_is_an_argument(name: str) -> None:
    weights = torch.tensor([1.0, 0.0, 3.0, 0.0]).double()
    one_each = torch.stack([LOSSES[name](R, annotated=torch.eye(4)[i]) for i in range(4)])
    torch.testing.assert_close(LOSSES[name](R, annotated=weights), (weights * one_each).sum() / 4)
    torch.testing.assert_close(LOSSES[name](R), one_each.mean())
    assert LOSSES[name](R, annotated=torch.zeros(4)) == 0
    mapped = vmap(lambda w: LOSSES[name](R, annotated=w))(torch.eye(4))
    torch.testing.assert_close(mapped, one_each)


def test_what_is_right_has_no_loss() -> None:
    assert losses.outside(R * MASK, MASK) == 0
    assert losses.outside(R * (1 - MASK), MASK) == 1
    assert float(losses.alignment(3 * MAP, MAP)) == pytest.approx(0)
    assert float(losses.alignment(-MAP, MAP)) == pytest.approx(2)
    assert float(losses.sparsity(torch.ones(2, 7))) == pytest.approx(1)
    assert losses.total_variation(torch.ones(2, 3, 4)) == 0


def test_errors() -> None:
    with pytest.raises(lrp.InputError, match=r"`mask` of shape \(4, 3, 5\) does not broadcast .*mask\[:, None\]"):
        losses.outside(R, torch.ones(4, 3, 5))
    with pytest.raises(lrp.InputError, match=r"`annotated` has shape \(3,\), and there are 4 samples"):
        losses.sparsity(R, annotated=torch.ones(3))
    with pytest.raises(lrp.InputError, match="dims=2 of relevance of shape"):
        losses.total_variation(torch.ones(2, 7))
