"""The flat programs that run: equal to the walk operation by operation, no work that the answer does not need."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lrpfunc as lrp
from benchmarks.measure import flops, gradient, peak_memory
from lrpfunc._lower import lower
from tests.cases import ATTENTION_CASES, ATTENTION_COMPOSITES, ATTENTION_MODELS, COMPOSITES, MODELS, normal, randomized
from tests.oracles import largest_difference

BOTH = [
    *((MODELS, model, rules) for rules in COMPOSITES.values() for model in MODELS),
    *((ATTENTION_MODELS, model, ATTENTION_COMPOSITES[name][0]) for model, name in ATTENTION_CASES),
]


class Counted(TorchDispatchMode):
    """Counts the operations that run; a transposed convolution is one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts["convolution, transposed" if name == "convolution" and args[6] else name] += 1
        return func(*args, **(kwargs or {}))


def counted(fn: Callable[[], Any]) -> Counter[str]:
    with Counted() as counted:
        fn()
    return counted.counts


@pytest.mark.parametrize(("models", "model", "rules"), BOTH)
@pytest.mark.parametrize("differentiated", [False, True])
def test_equals_the_walk_operation_by_operation(models: Any, model: str, rules: Any, differentiated: bool) -> None:
    case = models[model]()
    x = case.x.clone().requires_grad_(differentiated)
    params = case.params if differentiated else pytree.tree_map(Tensor.detach, case.params)
    expected = lrp.attribute_and_value(case.model_fn, rules, lowered=False)(params, x, target=1)
    found = lrp.attribute_and_value(case.model_fn, rules)(params, x, target=1)
    assert largest_difference(found[0], expected[0]) < 1e-12
    assert torch.equal(found[1], expected[1])


# ---------------------------------------------------------------------------------------------------------------------
# What runs, counted


class Stack(nn.Module):
    """Convolutions that each cost the same, with ReLUs between them."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth)]
        self.layers = nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.ReLU())))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


def stack() -> tuple[nn.Module, Callable[..., Any], Any, Tensor]:
    torch.manual_seed(0)
    model = Stack().eval().requires_grad_(False)
    return model, *lrp.from_module(model), torch.randn(2, 4, 8, 8)


PASSES = {
    # forward passes and passes back of five convolutions, of which the first sees an input of either sign
    "epsilon": (lrp.epsilon(), 5, 5),
    "epsilon_plus": (lrp.epsilon_plus(), 5 + 4 + 2, 4 + 2),
    "epsilon_plus_flat": (lrp.epsilon_plus_flat(), 5 + 4 + 1, 5),
    "epsilon_alpha2_beta1": (lrp.epsilon_alpha2_beta1(), 5 + 8 + 4, 8 + 4),
    "epsilon_gamma_box": (lrp.epsilon_gamma_box(-1.0, 1.0), 5 + 4 + 3, 4 + 3),
}


@pytest.mark.parametrize("name", PASSES)
def test_convolutions_are_run_as_often_as_the_rule_needs(name: str) -> None:
    rules, forward, backward = PASSES[name]
    model, model_fn, params, x = stack()
    relevance_fn = lrp.attribute(model_fn, rules)
    relevance_fn(params, x, target=0)
    counts = counted(lambda: relevance_fn(params, x, target=0))
    assert (counts["convolution"], counts["convolution, transposed"]) == (forward, backward)
    multiple = flops(lambda: relevance_fn(params, x, target=0)) / flops(gradient(model, x, 0))
    assert multiple == pytest.approx((forward + backward) / 10, abs=1e-3)


@pytest.mark.parametrize("differentiated", [False, True])
def test_inputs_known_to_be_non_negative_have_no_positive_part_taken(differentiated: bool) -> None:
    _, model_fn, params, x = stack()
    params = {name: value.clone().requires_grad_(differentiated) for name, value in params.items()}
    relevance_fn = lrp.attribute(model_fn, lrp.epsilon_plus())
    relevance_fn(params, x, target=0)
    counts = counted(lambda: relevance_fn(params, x, target=0))
    assert counts["threshold_backward"] == 5 + 5 + 1  # of weights, biases and the first input


def test_the_forward_pass_keeps_what_the_walk_needs() -> None:
    def model_fn(_: Any, x: Tensor) -> Tensor:
        x = F.layer_norm(F.max_pool1d(x, 2), (4,))
        x = F.scaled_dot_product_attention(x, x, x)
        return x.mean(-1).softmax(-1)

    relevance_fn = lrp.attribute(model_fn)
    x = torch.randn(2, 3, 8)
    relevance_fn(None, x, target=lambda out: out)
    counts = counted(lambda: relevance_fn(None, x, target=lambda out: out))
    assert [counts[name] for name in ("max_pool2d_with_indices", "_softmax")] == [1, 1]
    assert counts["_scaled_dot_product_flash_attention_for_cpu"] <= 1  # torch chooses the kernel


def test_one_target_or_many_need_one_forward_pass() -> None:
    _, model_fn, params, x = stack()
    output, pullback = lrp.vjp(model_fn, lrp.epsilon_plus_flat(), params, x)
    starts = torch.eye(4)[:, None] * output
    expected = torch.stack([lrp.attribute(model_fn, lrp.epsilon_plus_flat())(params, x, target=t) for t in range(4)])
    for chunk in (None, 1, 3):
        counts = counted(lambda: torch.vmap(pullback, chunk_size=chunk)(starts))  # noqa: B023
        assert counts["convolution"] == 0
        assert largest_difference(torch.vmap(pullback, chunk_size=chunk)(starts), expected) < 1e-5
    relevance_fn = lrp.attribute(model_fn, lrp.epsilon_plus_flat())
    every = torch.vmap(lambda t: relevance_fn(params, x, target=t))
    every(torch.arange(4))
    counts = counted(lambda: every(torch.arange(4)))
    assert counts["convolution"] == 5 + 4 + 1


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_pullback_may_be_mapped_and_differentiated_in_any_order(name: str) -> None:
    """Mapped over, it writes into tensors of its own; what the forward pass saved stays as it is."""
    case = MODELS["residual"]()
    output, pullback = lrp.vjp(case.model_fn, COMPOSITES[name], case.params, case.x)
    starts = torch.stack([output * k for k in (1, -2, 3)])
    looped = torch.stack([pullback(start) for start in starts])
    for _ in range(2):
        assert largest_difference(torch.vmap(pullback)(starts), looped) < 1e-12
        slopes = torch.func.jacrev(lambda start: pullback(start).square().sum())(output)
        mapped = torch.vmap(torch.func.grad(lambda start: pullback(start).square().sum()))(output[None])[0]
        assert largest_difference(mapped, slopes) < 1e-12
    x = case.x.clone().requires_grad_()
    relevance = torch.vmap(lambda t: lrp.attribute(case.model_fn, COMPOSITES[name])(case.params, x, target=t))
    (mapped,) = torch.autograd.grad(relevance(torch.arange(3)).square().sum(), x)
    one = lrp.attribute(case.model_fn, COMPOSITES[name])
    (expected,) = torch.autograd.grad(sum(one(case.params, x, target=t).square().sum() for t in range(3)), x)  # type: ignore[arg-type]
    assert largest_difference(mapped, expected) < 1e-12


def test_walks_over_targets_reuse_memory() -> None:
    _, model_fn, params, x = stack()
    relevance_fn = lrp.attribute(model_fn, lrp.epsilon_plus())
    counts = counted(lambda: torch.vmap(lambda t: relevance_fn(params, x, target=t))(torch.arange(3)))
    assert counts["div_"] > counts["div"]


def test_memory_is_freed_as_the_walk_goes() -> None:
    model = Stack(12).eval().requires_grad_(False)
    model_fn, params = lrp.from_module(model)
    x = torch.randn(2, 4, 64, 64)
    relevance_fn = lrp.attribute(model_fn, lrp.epsilon())
    relevance_fn(params, x, target=0)
    gc.collect()
    assert peak_memory(lambda: relevance_fn(params, x, target=0)) <= 1.25 * peak_memory(gradient(model, x, 0))


@pytest.mark.parametrize("rules", [lrp.epsilon(), lrp.epsilon_plus()])
def test_segments_trade_compute_for_memory(rules: lrp.Composite) -> None:
    model_fn, params = lrp.from_module(Stack(36).eval().requires_grad_(False))
    x = torch.randn(2, 4, 64, 64)
    whole, parts = (lrp.attribute(model_fn, rules, segments=n) for n in (1, 6))
    assert torch.equal(whole(params, x, target=0), parts(params, x, target=0))
    assert peak_memory(lambda: parts(params, x, target=0)) < 0.6 * peak_memory(lambda: whole(params, x, target=0))
    runs = [counted(lambda: fn(params, x, target=0))["convolution"] for fn in (whole, parts)]  # noqa: B023
    assert 30 <= runs[1] - runs[0] <= 36


def test_segments_need_a_program() -> None:
    with pytest.raises(lrp.InputError, match=r"segments=3 divides the program that lowered=False does without"):
        lrp.attribute(lambda w, x: x @ w, segments=3, lowered=False)


@pytest.mark.parametrize("model", [*MODELS, *ATTENTION_MODELS])
def test_segments_change_no_number(model: str) -> None:
    case = {**MODELS, **ATTENTION_MODELS}[model]()
    fns = [lrp.attribute(case.model_fn, lrp.attn_lrp() + lrp.epsilon_plus(), segments=n) for n in (1, 3)]
    whole, parts = (fn(case.params, case.x, target=1) for fn in fns)
    assert torch.equal(whole, parts)
    slopes = [torch.func.grad(lambda x: fn(case.params, x, target=1).square().sum())(case.x) for fn in fns]  # noqa: B023
    assert largest_difference(*slopes) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# When a program may be used again


def test_a_program_is_made_once_for_a_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = normal(3, 2), normal(4, 3)
    made: list[Any] = []
    monkeypatch.setattr(lower, "_joint", lambda *args, make=lower._joint: made.append(args) or make(*args))

    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        return x @ w

    for epsilon in (0.5, 1.5, 2.5):
        for _ in range(2):
            found = lrp.attribute(model_fn, lrp.epsilon(torch.tensor(epsilon).double()))(w, x, target=0)
            assert largest_difference(found, x * w[:, 0] / (1 + epsilon / (x @ w)[:, :1].abs())) < 1e-12
    assert len(made) == 1
    lrp.attribute(model_fn, lrp.epsilon(0.5))(w, x, target=0)
    assert len(made) == 2


FACTOR = 2.0


@dataclasses.dataclass(frozen=True, eq=False)
class Global(lrp.Rule):
    def propagate(self, layer: Any, message: Any) -> tuple[Any, ...]:
        return (lrp.Relevance(FACTOR * message.relevance(layer.output)),)


@dataclasses.dataclass(frozen=True, eq=False)
class Noisy(lrp.Rule):
    def propagate(self, layer: Any, message: Any) -> tuple[Any, ...]:
        return (lrp.Relevance(message.value + torch.randn_like(message.value)),)


@dataclasses.dataclass(frozen=True, eq=False)
class Branching(lrp.Rule):
    def propagate(self, layer: Any, message: Any) -> tuple[Any, ...]:
        return (lrp.Relevance(message.value if message.value.sum() > 0 else 0 * message.value),)


def test_what_a_rule_reads_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    relevance_fn = lrp.attribute(lambda _, x: x.relu(), [(lrp.Activation, Global())])
    x = normal(2, 3).abs()
    assert torch.allclose(relevance_fn(None, x), 2 * x)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
    assert torch.allclose(relevance_fn(None, x), 3 * x)


def test_random_numbers_are_drawn_at_each_call() -> None:
    relevance_fn = lrp.attribute(lambda _, x: x.relu(), [(lrp.Activation, Noisy())])
    x = normal(2, 3)
    assert not torch.equal(relevance_fn(None, x), relevance_fn(None, x))


def test_a_rule_that_depends_on_numbers_walks_operation_by_operation() -> None:
    rules = [(lrp.Activation, Branching())]
    x = normal(2, 3).abs()
    with pytest.raises(lrp.RuleError, match=r"lowered=False"):
        lrp.attribute(lambda _, x: x.relu(), rules)(None, x)
    assert torch.allclose(lrp.attribute(lambda _, x: x.relu(), rules, lowered=False)(None, x), x)


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_relevance_function_inside_a_model_function(differentiated: bool) -> None:
    w, x = normal(3, 2 + differentiated), normal(1, 3)
    inner = lrp.attribute(lambda w, x: (x @ w).square(), lrp.attn_lrp() + lrp.epsilon(0.0))
    with pytest.raises(lrp.CaptureError, match="Call the inner transform once"):
        lrp.attribute(lambda w, x: inner(w, x, target=1))(w, x)
    inner(w.clone().requires_grad_(differentiated), x, target=1)
    relevance = lrp.attribute(lambda w, x: inner(w, x, target=1), lrp.gradient())(w, x)
    (expected,) = torch.func.vjp(lambda x: inner(w, x, target=1), x)[1](torch.ones_like(x))
    assert largest_difference(relevance, expected) < 1e-12


def test_a_target_may_close_over_what_is_differentiated() -> None:
    case = ATTENTION_MODELS["fused"]()

    def scaled(factor: Tensor, lowered: bool) -> Tensor:
        fn = lrp.attribute(case.model_fn, lowered=lowered)
        return fn(case.params, case.x, target=lambda out: factor * out).square().sum()

    factor = torch.tensor(1.5).double()
    slopes = [torch.func.grad(lambda f: scaled(f, lowered))(factor) for lowered in (True, False)]  # noqa: B023
    assert torch.allclose(*slopes)


# ---------------------------------------------------------------------------------------------------------------------
# bind


def test_bind_computes_what_is_made_of_parameters_once() -> None:
    _, model_fn, params, x = stack()
    relevance_fn = lrp.attribute(model_fn, lrp.epsilon_alpha2_beta1())
    bound = relevance_fn.bind(params)
    assert torch.equal(bound(x, target=1), relevance_fn(params, x, target=1))
    unbound, counts = counted(lambda: relevance_fn(params, x, target=1)), counted(lambda: bound(x, target=1))
    saved = [unbound[name] - counts[name] for name in ("threshold_backward", "relu")]
    assert saved == [2 * 5, 2 * 5]  # weights and biases


def kept(bound: Any) -> list[frozenset[int]]:
    """Where the tensors are that each program has from the bound parameters."""
    return [frozenset(t.data_ptr() for t in prepared) for prepared in bound._bound._prepared.values()]


def test_bind_keeps_what_other_shapes_share() -> None:
    _, model_fn, params, x = stack()
    relevance_fn = lrp.attribute(model_fn, lrp.epsilon_alpha2_beta1())
    bound = relevance_fn.bind(params)
    with torch.no_grad():
        for batch, target in ((x, 1), (x[:1], 1), (x, lambda y: y)):
            assert torch.equal(bound(batch, target=target), relevance_fn(params, batch, target=target))
    assert len(kept(bound)) > 2
    assert len(set(kept(bound))) == 1


@pytest.mark.parametrize("lowered_first", [False, True])
def test_bind_shares_nothing_between_precisions(lowered_first: bool) -> None:
    """The same expression of parameters is another number inside autocast."""
    relevance_fn = lrp.attribute(lambda p, x: (x @ (p[0] + p[1] @ p[2])).relu() @ p[3], lrp.epsilon(0.1))
    params = [normal(*shape).float() for shape in ((3, 4), (3, 2), (2, 4), (4, 2))]
    x, bound = normal(2, 3).float(), relevance_fn.bind(params)
    for autocast in (lowered_first, not lowered_first):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert torch.equal(bound(x, target=1), relevance_fn(params, x, target=1))


@pytest.mark.parametrize("around", [torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)])
def test_bind_shares_what_is_computed_under_a_mode(around: Any) -> None:
    def model_fn(weight: Tensor, x: Tensor) -> Tensor:
        with around:
            weight = (weight.clamp(min=0) @ weight.new_ones(3, 3)).float()
        return x @ weight

    with around:
        pass  # it remembers the mode before it, which is read like any attribute
    bound = lrp.attribute(model_fn, lrp.epsilon(0.1), dynamic=False).bind(normal(4, 3).float())
    for size in range(1, 4):
        bound(normal(size, 4).float(), target=1)
    assert len(kept(bound)) == 3
    assert len(set(kept(bound))) == 1
    expressions = len(bound._bound._expressions)
    lrp.clear_cache()
    gc.collect()
    assert (expressions > 0, len(bound._bound._expressions), len(bound._bound._prepared)) == (True, 0, 0)


def test_bind_is_a_snapshot_that_differentiates_the_rest() -> None:
    case = MODELS["residual"]()
    params = {name: p.detach().clone() for name, p in case.params.items()}
    relevance_fn = lrp.attribute(case.model_fn, COMPOSITES["epsilon_plus_flat"])
    bound, expected = relevance_fn.bind(params), relevance_fn(params, case.x, target=1)
    for p in params.values():
        p.add_(1)
    assert torch.equal(bound(case.x, target=1), expected)

    def loss(fn: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.func.grad(lambda x: fn(x).square().sum())(case.x)

    slope = loss(lambda x: relevance_fn(case.params, x, target=1))
    assert largest_difference(loss(lambda x: bound(x, target=1)), slope) < 1e-12
    every = torch.vmap(lambda t: bound(case.x, target=t))(torch.arange(4))
    assert largest_difference(every[1], expected) < 1e-12
    relevance, value = lrp.attribute_and_value(case.model_fn, lrp.epsilon()).bind(case.params)(case.x, target=1)
    assert torch.equal(value, case.model_fn(case.params, case.x))
    assert relevance.shape == case.x.shape


def test_bind_in_inference_mode_and_conversion() -> None:
    case = MODELS["residual"]()
    relevance_fn = lrp.attribute(case.model_fn, lrp.epsilon_plus(0.1))
    with torch.inference_mode():
        bound = relevance_fn.bind(case.params)
        bound(case.x, target=1)
    x = case.x.clone().requires_grad_()
    bound(x, target=1).square().sum().backward()
    assert x.grad is not None

    low = {name: tensor.detach().float() for name, tensor in case.params.items()}
    expected = relevance_fn(low, case.x.float(), target=1)
    assert torch.equal(bound.float()(case.x.float(), target=1), expected)


def test_bind_refuses_what_is_explained() -> None:
    with pytest.raises(lrp.InputError, match=r"argnums=0 explains argument 0"):
        lrp.attribute(lambda x: x.relu(), lrp.epsilon(), argnums=0).bind(normal(2))


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile and torch.export


class Reordering(nn.Module):
    """A small net that reads an integer buffer."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 5)
        self.register_buffer("order", torch.arange(16).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1)[:, self.order])


@pytest.fixture
def reordering() -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Reordering().double().eval()
    return module, *lrp.from_module(module), normal(2, 1, 4, 4)


def whole(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


TARGETS: dict[str, Any] = {
    "index": 3,
    "all": None,
    "indices": torch.tensor([1, 2]),
    "one_hot": lrp.one_hot(2, 1.5),
    "contrast": lrp.contrast(1, 2),
    "relevance": normal(2, 5),
    "function": lambda out: out * out,
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_compiles_as_one_graph(reordering: Any, target: Any) -> None:
    _, model_fn, params, x = reordering
    fn = lrp.attribute_and_value(model_fn, lrp.epsilon_plus_flat(), layers="*")
    assert largest_difference(whole(fn)(params, x, target=target), fn(params, x, target=target)) < 1e-12


def test_a_compiled_training_step(reordering: Any) -> None:
    module, model_fn, params, x = reordering
    fn = lrp.attribute_and_value(model_fn, lrp.epsilon_plus_flat())

    def loss(params: Any, x: Tensor) -> Tensor:
        relevance, value = fn(params, x, target=3)
        return value.square().sum() + relevance.square().sum()

    weights = list(module.parameters())
    found = torch.autograd.grad(whole(loss)(params, x), weights)
    assert largest_difference(found, torch.autograd.grad(loss(params, x), weights)) < 1e-12


def test_compiles_with_transforms_inside(reordering: Any) -> None:
    _, model_fn, params, x = reordering
    params = {name: p.detach() for name, p in params.items()}
    fn = lrp.attribute(model_fn, lrp.epsilon_plus_flat())

    def slopes(params: Any, x: Tensor) -> Any:
        return torch.func.grad(lambda p: fn(p, x, target=3).square().sum())(params)

    def every(params: Any, x: Tensor) -> Tensor:
        return torch.vmap(lambda t: fn(params, x, target=t))(torch.arange(5))

    for transformed in (slopes, every):
        assert largest_difference(whole(transformed)(params, x), transformed(params, x)) < 1e-12


def test_compiles_again_for_another_batch_and_bound(reordering: Any) -> None:
    _, model_fn, params, _ = reordering
    fn = lrp.attribute(model_fn, lrp.epsilon_plus_flat())
    compiled, bound = whole(fn), whole(fn.bind(params))
    for batch in (2, 3, 5):
        x = normal(batch, 1, 4, 4, seed=batch)
        assert largest_difference(compiled(params, x, target=1), fn(params, x, target=1)) < 1e-12
        assert largest_difference(bound(x, target=1), fn(params, x, target=1)) < 1e-12


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_for_images_of_many_sizes(dynamic: bool | None) -> None:
    relevance_fn = lrp.attribute(lambda w, x: F.conv2d(x, w).relu().mean((2, 3)), lrp.epsilon_plus())
    w = normal(4, 1, 3, 3)
    torch.compiler.reset()
    compiled = torch.compile(relevance_fn, fullgraph=True, dynamic=dynamic, backend="eager")
    for seed, shape in enumerate([(2, 1, 4, 4), (2, 1, 5, 6), (3, 1, 6, 8), (3, 1, 9, 7)]):
        x, target = normal(*shape, seed=seed), normal(shape[0], 4, seed=seed)
        for t in (1, target):
            assert largest_difference(compiled(w, x, target=t), relevance_fn(w, x, target=t)) < 1e-12


LOAD = """
import sys, torch
sys.modules["lrpfunc"] = None  # an import of it would fail
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
assert (program.module()(x, target=3) - expected).abs().max() < 1e-12
"""


def test_exports_to_a_process_without_lrpfunc(reordering: Any, tmp_path: Path) -> None:
    _, model_fn, params, x = reordering
    bound = lrp.attribute(model_fn, lrp.epsilon_plus_flat()).bind(params)
    program = torch.export.export(bound, (x,), {"target": 3})
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((x, bound(x, target=3)), tmp_path / "expected.pt")
    paths = [str(tmp_path / name) for name in ("program.pt2", "expected.pt")]
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Other dtypes and layouts


@pytest.mark.parametrize(("models", "model", "rules"), BOTH)
def test_other_devices(models: Any, model: str, rules: Any) -> None:
    """Tensors without data have a device of their own, and no operation but with numbers mixes it with the CPU."""
    case = models[model]()
    params, x, target = pytree.tree_map(lambda t: t.detach().to("meta"), (case.params, case.x, torch.tensor([1, 0])))
    relevance = lrp.attribute(case.model_fn, rules)(params, x, target=target)
    assert (relevance.device, relevance.shape) == (x.device, x.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model", ["residual", "transformer", "fused"])
def test_other_dtypes(model: str, dtype: torch.dtype) -> None:
    case = {**MODELS, **ATTENTION_MODELS}[model]()
    params, x = pytree.tree_map(lambda t: t.detach().to(dtype), (case.params, case.x))
    rules = lrp.attn_lrp() + lrp.epsilon_plus(0.1, stabilizer=0.1)
    found, steps = (lrp.attribute(case.model_fn, rules, lowered=n)(params, x, target=1) for n in (True, False))
    assert found.dtype == dtype
    assert largest_difference(found, steps) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("training", [False, True])
def test_norms_more_precise_than_their_layers(training: bool) -> None:
    """Batch norms in float32 around layers in a lower precision, as mixed precision has it."""
    module = randomized(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)))
    module.float().train(training)
    x, rules, results = normal(2, 2, 6, 6).float(), lrp.epsilon_plus(0.1, stabilizer=0.1), []
    for dtype in (torch.float32, torch.bfloat16):
        for layer in (module[0], module[4]):
            layer.to(dtype)
        model_fn, params = lrp.from_module(module, return_buffers=training)
        found = lrp.attribute(model_fn, rules, has_aux=training)(params, x.to(dtype), target=1)
        results.append(found[0] if training else found)
    assert results[1].dtype is torch.bfloat16
    assert largest_difference(results[1].float(), results[0]) < 0.1


def test_autocast_and_channels_last() -> None:
    case = MODELS["residual"]()
    params, x = pytree.tree_map(lambda t: t.detach().float(), (case.params, case.x))
    fns = [lrp.attribute(case.model_fn, COMPOSITES["epsilon_plus"], lowered=n) for n in (True, False)]
    expected = fns[0](params, x, target=1)
    rearranged = x.to(memory_format=torch.channels_last)
    assert largest_difference(fns[0](params, rearranged, target=1), expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, steps = (fn(params, x, target=1) for fn in fns)
    assert largest_difference(found.float(), steps.float()) < 0.02
    assert largest_difference(found.float(), expected) < 0.2
