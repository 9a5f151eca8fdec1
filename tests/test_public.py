"""The public surface is documented, and everything on it is."""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfunc as lrp
from lrpfunc import testing
from tests.cases import ATTENTION_RULES, COMPOSITES, ELEMENTWISE_RULES, LINEAR_RULES, SUM_RULES

PUBLIC = lrp.__all__
ERRORS = [name for name in PUBLIC if name.endswith(("Error", "Warning"))]
SELECTORS = ["Dense", "Convolution", "Activation", "ReLU", "BatchNorm", "AvgPool", "Sum"]
SELECTORS += ["Softmax", "Attention", "Product", "Quotient", "Normalization", "Statistic"]
SELECTORS += ["Gate", "Router", "Recurrent", "Scan"]
PARTS = ["BoundLayer", "Kind", "Role", "Layer", "Multiplier", "Relevance", "Explanation", "Row"]


def test_the_public_names_are_those_that_can_be_seen() -> None:
    seen = [name for name, value in vars(lrp).items() if not name.startswith("_") and not inspect.ismodule(value)]
    assert sorted(lrp.__all__) == sorted(seen)


def test_the_version_is_the_installed_one() -> None:
    assert lrp.__version__ == importlib.metadata.version("lrpfunc")


@pytest.mark.parametrize("name", [n for n in PUBLIC if n not in (*ERRORS, *SELECTORS, *PARTS)])
def test_every_public_name_has_an_example(name: str) -> None:
    assert "Example:" in (inspect.getdoc(getattr(lrp, name)) or "")


@pytest.mark.parametrize("name", [*ERRORS, *PARTS])
def test_every_other_public_name_has_a_docstring(name: str) -> None:
    assert getattr(lrp, name).__doc__


TESTING = [name for name in vars(testing) if not name.startswith("_") and not inspect.ismodule(getattr(testing, name))]
CONSTANTS = ["FAMILIES", "PROPERTIES"]
BLOCKS = ["Branch", "Conv", "Gated", "InPlace", "Linear", "Loop", "Normalize", "Pointwise", "Pool", "Rearrange"]
BLOCKS += ["Residual", "Reuse", "SelfAttention", "Tied"]


@pytest.mark.parametrize("name", [n for n in TESTING if n not in (*CONSTANTS, *BLOCKS)])
def test_every_public_name_of_testing_has_an_example(name: str) -> None:
    assert "Example:" in (inspect.getdoc(getattr(testing, name)) or "")


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_has_a_docstring_and_can_be_made_without_arguments(name: str) -> None:
    block = getattr(testing, name)
    assert block.__doc__
    assert repr(block()) == f"{name}()"
    assert testing.Net((block(),), (2, 3)).outputs() >= 1


def test_errors_are_builtin_errors_too() -> None:
    for name in ERRORS:
        assert any(base.__module__ == "builtins" and base is not Exception for base in getattr(lrp, name).__mro__[1:-3])


def test_every_composite_is_in_the_list() -> None:
    functions = [f for f in vars(lrp).values() if inspect.isfunction(f)]
    recipes = {f.__name__ for f in functions if f.__annotations__.get("return") == "Composite"}
    assert recipes == set(COMPOSITES)


def test_every_rule_is_in_a_list() -> None:
    rules = {v for v in vars(lrp).values() if inspect.isclass(v) and issubclass(v, lrp.Rule) and v is not lrp.Rule}
    listed = {**LINEAR_RULES, **ELEMENTWISE_RULES, **SUM_RULES, **ATTENTION_RULES}
    assert rules <= set(map(type, listed.values()))


@pytest.mark.parametrize("recipe", COMPOSITES)
def test_every_argument_of_a_composite_matters(recipe: str) -> None:
    """What a composite takes, it uses: the relevance of a net with everything in it tells."""
    make = getattr(lrp, recipe)
    other = {"stabilizer": 0.5, "zero_params": "weight", "beta_smooth": 2.0, "low": -2.0, "high": 2.0}
    given = {name: other.get(name, 0.5) for name in inspect.signature(make).parameters}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()]
        net = nn.Sequential(*convolutions, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 2)).double()
    model_fn, params = lrp.from_module(net.eval())
    x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    bounds = {"low": -3.0, "high": 3.0} if "low" in given else {}

    def relevance(**changed: Any) -> Tensor:
        return lrp.attribute(model_fn, make(**{**bounds, **changed}))(params, x, target=0)

    for name, value in given.items():
        assert not torch.equal(relevance(**{name: value}), relevance()), name


def test_python_and_torch_are_supported() -> None:
    assert torch.__version__ >= "2.13"
