"""On a GPU, where there is one: the numbers of the CPU, at every precision, and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree

import lrpfunc as lrp
from lrpfunc._capture.isolation import isolated
from tests.cases import ATTENTION_MODELS, MODELS
from tests.oracles import largest_difference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

ALL = {**MODELS, **ATTENTION_MODELS}
RULES = lrp.attn_lrp() + lrp.epsilon_plus(0.1, stabilizer=0.1)


def moved(name: str, dtype: torch.dtype = torch.float64) -> tuple:
    case = ALL[name]()
    tensors = pytree.tree_map(lambda t: t.detach().to("cuda", dtype), (case.params, case.x))
    return (case, *tensors)


@pytest.mark.parametrize("name", ALL)
def test_numbers_are_the_cpus(name: str) -> None:
    case, params, x = moved(name)
    fn = lrp.attribute(case.model_fn, RULES)
    assert largest_difference(fn(params, x, target=1).cpu(), fn(case.params, case.x, target=1)) < 1e-10


@pytest.mark.parametrize("name", ALL)
def test_derivatives_are_the_cpus(name: str) -> None:
    case, params, x = moved(name)
    fn = lrp.attribute(case.model_fn, RULES)
    slopes = [
        torch.func.grad(lambda x, p=p: fn(p, x, target=1).square().sum())(x)
        for p, x in ((params, x), (case.params, case.x))
    ]
    assert largest_difference(slopes[0].cpu(), slopes[1]) < 1e-8


@pytest.mark.parametrize("name", ["residual", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precisions(name: str, dtype: torch.dtype) -> None:
    case, params, x = moved(name, dtype)
    fn = lrp.attribute(case.model_fn, RULES)
    tolerance = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.3}[dtype]
    found = fn(params, x, target=1)
    assert found.dtype == dtype
    assert largest_difference(found.cpu().double(), fn(case.params, case.x, target=1)) < tolerance


@pytest.mark.parametrize("name", ["residual", "fused"])
def test_channels_last_autocast_and_compiled(name: str) -> None:
    case, params, x = moved(name, torch.float32)
    fn = lrp.attribute(case.model_fn, RULES)
    expected = fn(params, x, target=1)
    if x.ndim == 4:
        assert largest_difference(fn(params, x.to(memory_format=torch.channels_last), target=1), expected) < 1e-4
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert largest_difference(fn(params, x, target=1).float(), expected) < 0.3
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert largest_difference(compiled(params, x, target=1), expected) < 1e-4


def test_what_bind_prepares_runs_on_the_callers_stream() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        assert isolated(torch.cuda.current_stream) == torch.cuda.current_stream()
