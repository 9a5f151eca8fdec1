"""What a type checker sees; `make lint` checks what stands in `assert_type`."""

from __future__ import annotations

from typing import Any, assert_type

import torch
from torch import Tensor

import lrpfunc as lrp


def model_fn(params: Tensor, x: Tensor) -> Tensor:
    return x @ params


def with_aux(params: Tensor, x: Tensor) -> tuple[Tensor, int]:
    return x @ params, 3


PARAMS, X = torch.eye(2), torch.tensor([[1.0, 3.0]])


def test_relevance_is_a_tensor() -> None:
    assert_type(lrp.attribute(model_fn)(PARAMS, X), Tensor)
    assert_type(lrp.attribute(model_fn, lrp.epsilon(), lowered=False)(PARAMS, X, target=1), Tensor)
    assert_type(lrp.attribute(model_fn).bind(PARAMS)(X), Tensor)
    assert_type(lrp.attribute(with_aux, has_aux=True)(PARAMS, X), tuple[Tensor, int])


def test_layers_are_a_dictionary() -> None:
    relevance, layers = lrp.attribute(model_fn, layers="*")(PARAMS, X)
    assert_type(relevance, Tensor)
    assert_type(layers, dict[str, Tensor])
    (_, named), aux = lrp.attribute(with_aux, has_aux=True, layers=["*"])(PARAMS, X)
    assert_type(named, dict[str, Tensor])
    assert_type(aux, int)


def test_the_value_is_the_models() -> None:
    relevance, value = lrp.attribute_and_value(model_fn)(PARAMS, X)
    assert_type(relevance, Tensor)
    assert_type(value, Tensor)
    assert_type(lrp.attribute_and_value(with_aux, has_aux=True)(PARAMS, X), tuple[Tensor, tuple[Tensor, int]])


def test_pullbacks_take_the_output() -> None:
    output, pullback = lrp.vjp(model_fn, lrp.epsilon(), PARAMS, X)
    assert_type(output, Tensor)
    assert_type(pullback(1, rows=[0]), Tensor)
    assert_type(pullback(1), Tensor)
    _, pullback, aux = lrp.vjp(with_aux, lrp.epsilon(), PARAMS, X, has_aux=True)
    assert_type(pullback(output), Tensor)
    assert_type(aux, int)


def test_other_arguments_are_whatever_they_are() -> None:
    assert_type(lrp.attribute(model_fn, lrp.epsilon(), argnums=(0, 1))(PARAMS, X), Any)
