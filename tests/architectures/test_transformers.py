"""Models whose output is a dataclass of the transformers library."""

from __future__ import annotations

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import lrpfunc as lrp
from tests.cases import normal, randomized
from tests.oracles import largest_difference


def tiny_resnet() -> torch.nn.Module:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    return randomized(ResNetForImageClassification(config))


def test_output_picks_the_logits() -> None:
    module, x = tiny_resnet(), normal(2, 3, 32, 32)
    model_fn, params = lrp.from_module(module, output=lambda out: out.logits)
    relevance, logits = lrp.attribute_and_value(model_fn, lrp.epsilon_plus())(params, x, target=1)
    assert torch.equal(logits, module(x).logits)
    assert relevance.shape == x.shape
    explanation = lrp.explain(model_fn, lrp.epsilon_plus())(params, x, target=1)
    assert abs(explanation.residual) < 1e-12


def test_the_whole_output_is_a_pytree() -> None:
    module, x = tiny_resnet(), normal(2, 3, 32, 32)
    whole, params = lrp.from_module(module)
    picked, _ = lrp.from_module(module, output=lambda out: out.logits)
    relevance, value = lrp.attribute_and_value(whole, lrp.epsilon_plus())(params, x)
    assert type(value) is type(module(x))
    assert largest_difference(relevance, lrp.attribute(picked, lrp.epsilon_plus())(params, x)) == 0


def test_keyword_arguments() -> None:
    module, x = tiny_resnet(), normal(2, 3, 32, 32)
    model_fn, params = lrp.from_module(module, output=lambda out: out[0])
    tuple_output = lrp.attribute(model_fn, lrp.epsilon_plus())(params, x, return_dict=False, target=0)
    assert torch.equal(tuple_output, lrp.attribute(model_fn, lrp.epsilon_plus())(params, x, target=0))
