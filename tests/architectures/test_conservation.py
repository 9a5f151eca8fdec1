"""Relevance that starts at the output is found again, to rounding: at the input, or where a formula says it went."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfunc as lrp
from tests.architectures.models import architecture, image

COMPOSITES = {
    "epsilon": lrp.epsilon(),
    "epsilon_gamma_box": lrp.epsilon_gamma_box(-5.0, 5.0),
    "epsilon_plus": lrp.epsilon_plus(),
    "epsilon_plus_flat": lrp.epsilon_plus_flat(),
    "epsilon_alpha2_beta1": lrp.epsilon_alpha2_beta1(),
    "epsilon_alpha2_beta1_flat": lrp.epsilon_alpha2_beta1_flat(),
    "excitation_backprop": lrp.excitation_backprop(),
    "gradient": lrp.gradient(),
    "deconvnet": lrp.deconvnet(),
    "guided_backprop": lrp.guided_backprop(),
    "beta_smooth": lrp.beta_smooth(),
}
LRP_0 = [(lrp.Dense | lrp.Convolution, lrp.Epsilon(0.0)), (lrp.Activation, lrp.Pass())]


IMAGE = image(2, 3, 32, 32)


@pytest.fixture(scope="module", params=["resnet18", "vgg16_bn"])
def function(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Tensor]]:
    return lrp.from_module(architecture(request.param))


def without_biases(model: nn.Module) -> nn.Module:
    """The model with nothing added anywhere: no bias, and no shift or mean of a batch norm."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("bias", "running_mean")):
                tensor.zero_()
    return model


def test_relevance_is_conserved():
    """Average pooling and sums are left without a rule, and take LRP-0."""
    model = without_biases(architecture("resnet18"))
    model_fn, params = lrp.from_module(model)
    x = image(2, 3, 64, 64)
    relevance, output = lrp.attribute_and_value(model_fn, LRP_0)(params, x, target=3)
    torch.testing.assert_close(relevance.sum((1, 2, 3)), output[:, 3], rtol=1e-9, atol=0)


@pytest.mark.parametrize("composite", COMPOSITES)
def test_balance(function: tuple[Any, dict[str, Tensor]], composite: str):
    """Each layer on its own: relevance out is relevance in and what was absorbed, each by its own formula."""
    model_fn, params = function
    rules = COMPOSITES[composite]
    explanation = lrp.explain(model_fn, rules)(params, IMAGE, target=3)
    off = [(str(row.layer), row.residual) for row in explanation.rows if not abs(row.residual) <= 1e-9 * row.absolute]
    assert off == []
    scale = sum(row.absolute for row in explanation.rows)
    assert abs(explanation.residual) <= 1e-9 * scale
    relevance = lrp.attribute(model_fn, rules)(params, IMAGE, target=3)
    assert torch.equal(explanation.relevance, relevance)
    total = (IMAGE * relevance).sum() if rules.cotangent else relevance.sum()
    assert explanation.relevance_in == pytest.approx(total.item(), rel=1e-12)


def test_only_biases_absorb_with_lrp_0():
    """Those of merged batch norms among them."""
    model_fn, params = lrp.from_module(architecture("resnet18"))
    explanation = lrp.explain(model_fn, LRP_0)(params, IMAGE, target=3)
    absorbed = explanation.absorbed
    assert abs(explanation.start - explanation.relevance_in - absorbed["bias"]) <= 1e-9 * abs(absorbed["bias"])
    assert abs(absorbed["bias"]) > 1e-3 * abs(explanation.start)
