"""A compiled relevance function is compiled again as soon as anything that it reads has changed.

What it computes is in `test_lowered.py`, `test_lowered_rules.py` and `test_cuda.py`.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

import lrpfunc as lrp
from lrpfunc._api import dynamo
from tests.cases import normal
from tests.oracles import largest_difference

SETTINGS = {"scale": 2.0}
FACTOR = 2.0


@dataclass(frozen=True)
class Doubled(lrp.Rule):
    """A rule with a hyperparameter that can be changed, though the rule is frozen."""

    factors: list[float] = field(default_factory=lambda: [2.0])

    def propagate(self, layer: Any, message: lrp.Relevance) -> tuple[Any, ...]:
        return (lrp.Relevance(message.value * self.factors[0]),)


class Changeable(nn.Module):
    """Reads its mode, an attribute, a submodule, a buffer, a closed-over variable, a container and a global."""

    order: Tensor

    def __init__(self, values: dict[str, Any]):
        super().__init__()
        self.linear, self.act, self.shift, self.values = nn.Linear(4, 4), nn.ReLU(), 0.5, values
        self.register_buffer("order", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.linear(x)[..., self.order] + self.shift) * self.values["weight"] * SETTINGS["scale"] * FACTOR
        return x.flip(-1) if self.training else x


def setting(monkeypatch: pytest.MonkeyPatch, **names: Any) -> None:
    for name, value in names.items():
        monkeypatch.setattr(sys.modules[__name__], name, value)


CHANGES: dict[str, Callable[[Changeable, Doubled, pytest.MonkeyPatch], Any]] = {
    "mode": lambda module, rule, patch: module.train(),
    "mode of a part": lambda module, rule, patch: (module.act.train(), setattr(module, "shift", -2.0)),
    "attribute": lambda module, rule, patch: setattr(module, "shift", -2.0),
    "submodule": lambda module, rule, patch: setattr(module, "act", nn.Tanh()),
    "buffer, replaced": lambda module, rule, patch: setattr(module, "order", module.order.flip(0)),
    "buffer, in place": lambda module, rule, patch: module.order.copy_(module.order.flip(0)),
    "closed over, replaced": lambda module, rule, patch: module.values.update(weight=normal(4, seed=5)),
    "closed over, in place": lambda module, rule, patch: module.values["weight"].mul_(3),
    "container": lambda module, rule, patch: patch.setitem(SETTINGS, "scale", 3.0),
    "global": lambda module, rule, patch: setting(patch, FACTOR=3.0),
    "hook": lambda module, rule, patch: module.linear.register_forward_hook(lambda *called: called[-1] * 2),
    "rule": lambda module, rule, patch: rule.factors.append(rule.factors.pop() * 2),
}


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_seen(change: Any, bound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    rule = Doubled()
    module = Changeable({"weight": normal(4, seed=3)}).double().eval()
    model_fn, params = lrp.from_module(module)
    relevance_fn = lrp.attribute(model_fn, [(lrp.Activation, rule), *lrp.epsilon()])
    fn, args = (relevance_fn.bind(params), ()) if bound else (relevance_fn, (params,))
    x = normal(2, 4)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, backend=counter)

    before = fn(*args, x, target=1)
    for _ in range(2):
        assert largest_difference(compiled(*args, x, target=1), before) < 1e-12
    assert counter.frame_count == 1
    change(module, rule, monkeypatch)
    expected = fn(*args, x, target=1)
    assert largest_difference(before, expected) > 1e-3
    for _ in range(2):
        assert largest_difference(compiled(*args, x, target=1), expected) < 1e-12
    assert counter.frame_count == 2
    again = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert largest_difference(again(*args, x, target=1), expected) < 1e-12


def test_what_is_an_argument_may_change() -> None:
    """A step of an optimizer writes to the module's parameters, which the model function could read, but is given."""
    torch.compiler.reset()
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    model_fn, params = lrp.from_module(module)
    fn, x = lrp.attribute(model_fn, lrp.epsilon(0.1)), normal(2, 3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda params, x: fn(params, x, target=1).square().sum(), fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        loss = compiled(params, x)
        assert largest_difference(loss, fn(params, x, target=1).square().sum()) < 1e-12
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert counter.frame_count == 1


def test_what_is_bound_may_be_converted() -> None:
    torch.compiler.reset()
    bound = lrp.attribute(lambda w, x: (x @ w).relu(), lrp.epsilon_plus()).bind(normal(3, 2))
    compiled = torch.compile(bound, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float64, torch.float32):
        bound.to(dtype)
        x = normal(2, 3).to(dtype)
        assert torch.equal(compiled(x, target=1), bound(x, target=1))


@pytest.mark.filterwarnings("ignore::lrpfunc.CaptureWarning")
def test_what_does_not_count_its_changes_or_changes_at_each_call() -> None:
    torch.compiler.reset()
    with torch.inference_mode():
        scale = normal(2)
    calls = []

    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        calls.append(len(calls))
        return (x @ w) * scale

    fn, w, x = lrp.attribute(model_fn, lrp.epsilon()), normal(3, 2), normal(1, 3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, backend=counter)
    for _ in range(3):
        assert largest_difference(compiled(w, x, target=1), x * w[:, 1] * scale[1]) < 1e-4
    assert counter.frame_count == 1


def test_what_changes_is_seen_inside_of_a_compiled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    relevance_fn = lrp.attribute(lambda w, x: (x @ w) * SETTINGS["scale"], lrp.epsilon())
    loss = lambda w, x: relevance_fn(w, x * 2, target=1).square().sum()  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for scale in (2.0, 3.0, 2.0):
        monkeypatch.setitem(SETTINGS, "scale", scale)
        assert largest_difference(compiled(normal(3, 2), normal(1, 3)), loss(normal(3, 2), normal(1, 3))) < 1e-12


def test_two_functions_do_not_share_a_program() -> None:
    """They are compiled from one piece of code, and one may be another's equal."""
    torch.compiler.reset()
    w, x = normal(3, 2), normal(1, 3)
    for scale in range(4):
        relevance_fn = lrp.attribute(lambda w, x, scale=scale: (x @ w) * scale, lrp.epsilon())
        compiled = torch.compile(relevance_fn, fullgraph=True, backend="aot_eager")
        assert largest_difference(compiled(w, x, target=1), scale * w[:, 1] * x) < 1e-4


def test_many_functions_compile_in_regions_of_their_own() -> None:
    torch.compiler.reset()
    w, x = normal(3, 2), normal(1, 3)
    for scale in range(10):
        relevance_fn = lrp.attribute(lambda w, x, scale=scale: (x @ w) * scale, lrp.epsilon())
        options: dict[str, Any] = {"isolate_recompiles": True}
        torch.compile(relevance_fn, fullgraph=True, backend="eager", **options)(w, x, target=1)


def test_what_compiling_remembers_is_forgotten_with_the_function() -> None:
    torch.compiler.reset()
    gc.collect()
    known = set(dynamo._results)
    relevance_fn = lrp.attribute(lambda w, x: x @ w, lrp.epsilon())
    torch.compile(relevance_fn, fullgraph=True, backend="eager")(normal(3, 2), normal(1, 3), target=1)
    assert len(set(dynamo._results) - known) == 1
    del relevance_fn
    torch.compiler.reset()
    gc.collect()
    assert not set(dynamo._results) - known


def test_functions_made_inside() -> None:
    """They are made outside of the graph, which breaks there."""
    torch.compiler.reset()
    w, x = normal(3, 2), normal(1, 3)

    def attributes(w: Tensor, x: Tensor) -> Any:
        return lrp.attribute(lambda w, x: (x @ w).relu(), lrp.epsilon(0.1))(w, x * 2, target=1) + 1

    def binds(w: Tensor, x: Tensor) -> Any:
        return lrp.attribute(lambda w, x: (x @ w).relu(), lrp.epsilon(0.1)).bind(w)(x * 2, target=1) + 1

    def pulls(w: Tensor, x: Tensor) -> Any:
        output, pullback = lrp.vjp(lambda w, x: (x @ w).relu(), lrp.epsilon(0.1), w, x * 2)
        return pullback(output * 2) + 1

    for fn in (attributes, binds, pulls):
        assert largest_difference(torch.compile(fn, backend="aot_eager")(w, x), fn(w, x)) < 1e-12
        torch.compiler.reset()
        with pytest.raises(Unsupported, match="lrpfunc makes a function here"):
            torch.compile(fn, fullgraph=True, backend="aot_eager")(w, x)


# ---------------------------------------------------------------------------------------------------------------------
# Cold processes, in which `lrpfunc` comes before or after `torch._dynamo`

COLD = """
torch.set_num_threads(1)
torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double().eval()
model_fn, params = lrp.from_module(module)
x = torch.randn(2, 3, dtype=torch.float64)
relevance_fn = lrp.attribute(model_fn, lrp.epsilon())

def slopes(params, x):
    return torch.func.grad(lambda p: relevance_fn(p, x, target=1).square().sum())(params)["0.weight"]

def every(params, x):
    return torch.vmap(lambda t: relevance_fn(params, x, target=t))(torch.arange(2))

def backward(params, x):
    x = x.clone().requires_grad_()
    relevance_fn(params, x, target=1).square().sum().backward()
    return x.grad

def pulled(params, x):
    output, pullback = lrp.vjp(model_fn, lrp.epsilon(), params, x * 2)
    return pullback(output)

def compiled(fn, **options):
    return torch.compile(fn, backend="aot_eager", **options)

params = {name: p.detach() for name, p in params.items()}
x_ = x.clone().requires_grad_()
found = {
    "compiled": compiled(lambda p, x: relevance_fn(p, x, target=1), fullgraph=True)(params, x),
    "direct": compiled(relevance_fn, fullgraph=True)(params, x, target=1),
    "grad": compiled(slopes, fullgraph=True)(params, x),
    "vmap": compiled(every, fullgraph=True)(params, x),
    "vjp": compiled(pulled)(params, x),
}
compiled(relevance_fn, fullgraph=True)(params, x_, target=1).square().sum().backward()
bound = relevance_fn.bind(params)
found["bound"] = compiled(bound, fullgraph=True)(x, target=1)
for strict in (False, True):
    found[strict] = torch.export.export(bound, (x,), {"target": 1}, strict=strict).module()(x, target=1)
expected = relevance_fn(params, x, target=1)
others = {"grad": slopes(params, x), "vmap": every(params, x), "vjp": pulled(params, x)}
for name, value in found.items():
    assert (value - others.get(name, expected)).abs().max() < 1e-12, name
assert (x_.grad - backward(params, x)).abs().max() < 1e-12
"""

BEFORE = """
import sys, torch
import lrpfunc as lrp
assert "torch._dynamo" not in sys.modules
"""


@pytest.mark.parametrize("begin", [BEFORE, "import torch, torch._dynamo\nimport lrpfunc as lrp"], ids=["first", "last"])
def test_a_cold_process_compiles_and_exports(begin: str) -> None:
    subprocess.run([sys.executable, "-c", begin + COLD], check=True)
