"""What the walk is made of are values: nobody changes them, and what holds tensors or nodes compares by identity."""

from __future__ import annotations

import copy
import dataclasses
import pkgutil
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

import lrpfunc as lrp
from tests.cases import ATTENTION_RULES, ELEMENTWISE_RULES, LINEAR_RULES, SUM_RULES

STOREYS = ("lrpfunc._walk", "lrpfunc.rules", "lrpfunc._layers")
RULES = {**LINEAR_RULES, **ELEMENTWISE_RULES, **SUM_RULES, **ATTENTION_RULES}


def dataclasses_of(package: str) -> Iterator[type]:
    for found in pkgutil.walk_packages(import_module(package).__path__, f"{package}."):
        module = import_module(found.name)
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__ and dataclasses.is_dataclass(value):
                yield value


@pytest.mark.parametrize("package", STOREYS)
def test_values_are_frozen(package: str) -> None:
    found = list(dataclasses_of(package))
    assert found
    assert [cls for cls in found if not cls.__dataclass_params__.frozen] == []  # type: ignore[attr-defined]


def test_what_holds_tensors_does_not_compare_them() -> None:
    """A comparison of fields would ask a tensor whether it is true."""
    plain = {"BoundLayer", "Nature", "_Origin", "Tile", "Relevance", "Multiplier", "Structure", "Place", "Quotient"}
    compared = {
        cls.__name__
        for package in STOREYS
        for cls in dataclasses_of(package)
        if cls.__dataclass_params__.eq and not cls.__module__.endswith("select")  # type: ignore[attr-defined]
    }
    assert compared == plain


@pytest.mark.parametrize("name", RULES)
def test_rules_compare_by_their_numbers(name: str) -> None:
    rule = RULES[name]
    assert copy.copy(rule) == rule
    assert hash(copy.copy(rule)) == hash(rule)
    assert sum(other == rule for other in (*LINEAR_RULES.values(),)) <= 1


def test_tensors_in_rules_compare_by_identity() -> None:
    one, other = (torch.ones(2) for _ in range(2))
    assert lrp.ZBox(one, 1.0) == lrp.ZBox(one, 1.0)
    assert lrp.ZBox(one, 1.0) != lrp.ZBox(other, 1.0)
    assert len({lrp.ZBox(one, 1.0), lrp.ZBox(one, 1.0), lrp.ZBox(other, 1.0)}) == 2
