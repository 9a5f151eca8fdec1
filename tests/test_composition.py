"""`vmap` equals a loop, and gradient equivalence, for every rule and composite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, stack_module_state, vmap

import lrpfunc as lrp
from lrpfunc._lower import lower
from lrpfunc._lower.cut import cut
from tests.cases import (
    ATTENTION_CASES,
    ATTENTION_COMPOSITES,
    ATTENTION_MODELS,
    COMPOSITES,
    LINEAR_RULES,
    MODELS,
    Case,
    Residual,
    normal,
    randomized,
    with_rule,
)
from tests.oracles import largest_difference, plain_vjp

RULES = {**COMPOSITES, **{f"dense_{name}": with_rule(rule) for name, rule in LINEAR_RULES.items()}}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("model", MODELS)
def test_vmap_equals_loop(model: str, name: str) -> None:
    check_vmap(MODELS[model](), RULES[name])


@pytest.mark.parametrize(("model", "name"), ATTENTION_CASES)
def test_vmap_equals_loop_through_attention(model: str, name: str) -> None:
    check_vmap(ATTENTION_MODELS[model](), ATTENTION_COMPOSITES[name][0])


def check_vmap(case: Case, rules: lrp.Composite | None) -> None:
    """Over targets, over samples and over an ensemble."""
    fn = lrp.attribute(case.model_fn, rules)
    targets = torch.arange(3)
    looped = torch.stack([fn(case.params, case.x, target=t) for t in targets])
    assert largest_difference(vmap(lambda t: fn(case.params, case.x, target=t))(targets), looped) < 1e-12

    xs = torch.stack([case.x, 2 * case.x, case.x.flip(0)])
    looped = torch.stack([fn(case.params, x, target=1) for x in xs])
    assert largest_difference(vmap(lambda x: fn(case.params, x, target=1))(xs), looped) < 1e-12

    stacked = {n: torch.stack([p, 0.9 * p, 1.1 * p]) for n, p in pytree_items(case.params)}
    ensemble = [rebuild(case.params, {n: p[i] for n, p in stacked.items()}) for i in range(3)]
    looped = torch.stack([fn(p, case.x, target=1) for p in ensemble])
    batched = vmap(lambda p: fn(rebuild(case.params, p), case.x, target=1))(stacked)
    assert largest_difference(batched, looped) < 1e-12


def pytree_items(params: dict[str, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    items = []
    for name, value in params.items():
        items += pytree_items(value, f"{prefix}{name}/") if isinstance(value, dict) else [(prefix + name, value)]
    return items


def rebuild(params: dict[str, Any], flat: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    return {
        name: rebuild(value, flat, f"{prefix}{name}/") if isinstance(value, dict) else flat[prefix + name]
        for name, value in params.items()
    }


SWEEPS = {
    "gamma": (lambda g: lrp.epsilon_gamma_box(-3.0, 3.0, 0.1, gamma=g), torch.tensor([0.0, 0.25, 2.0]).double()),
    "epsilon": (lambda e: lrp.epsilon(e, stabilizer=e), torch.tensor([0.0, 0.1, 1.0]).double()),
    "low": (lambda low: lrp.epsilon_gamma_box(low, 3.0, 0.1), torch.tensor([-3.0, -4.0]).double()),
    "high": (lambda high: lrp.epsilon_gamma_box(-3.0, high, 0.1), 3 + torch.rand(3, 2, 1, 1).double()),
    "beta_smooth": (lambda b: lrp.beta_smooth(b), torch.tensor([1.0, 10.0]).double()),
    "mixture": (
        lambda a: with_rule(a * lrp.Epsilon(0.1) + (1 - a) * lrp.ZPlus(0.1)),
        torch.tensor([0.0, 0.3]).double(),
    ),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_vmap_over_hyperparameters(name: str) -> None:
    case = MODELS["residual"]()
    make, values = SWEEPS[name]

    def relevance(value: Tensor) -> Tensor:
        return lrp.attribute(case.model_fn, make(value))(case.params, case.x, target=0)

    assert largest_difference(vmap(relevance)(values), torch.stack([relevance(v) for v in values])) < 1e-12


def test_nested_transforms() -> None:
    """Targets inside samples inside a gradient inside an ensemble, and one at a time."""
    case = MODELS["residual"]()
    fn = lrp.attribute(case.model_fn, lrp.epsilon_plus(0.1, stabilizer=0.1))
    xs = torch.stack([case.x, 0.5 * case.x])
    conv = torch.stack([case.params["conv1.weight"], 1.2 * case.params["conv1.weight"]]).detach()

    def loss(weight: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return fn({**case.params, "conv1.weight": weight}, x, target=t).square().sum()

    gradient = grad(loss)
    targets = torch.tensor([0, 3])
    nested = vmap(vmap(vmap(gradient, (None, None, 0)), (None, 0, None)), (0, None, None))(conv, xs, targets)
    looped = torch.stack([torch.stack([torch.stack([gradient(w, x, t) for t in targets]) for x in xs]) for w in conv])
    assert largest_difference(nested, looped) < 1e-12


def test_one_target_a_sample_inside_vmap() -> None:
    case = MODELS["mlp"]()
    fn = lrp.attribute(case.model_fn, lrp.epsilon())
    together = fn(case.params, case.x, target=torch.tensor([2, -3]))
    one_by_one = vmap(lambda x, t: fn(case.params, x[None], target=t)[0])(case.x, torch.tensor([2, 0]))
    assert largest_difference(together, one_by_one) < 1e-12


def test_one_recording_serves_batches_of_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = MODELS["residual"](), []
    monkeypatch.setattr(lower, "cut", lambda *args, **kwargs: made.append(1) or cut(*args, **kwargs))
    fn = lrp.attribute(case.model_fn, lrp.epsilon(0.125))
    one_sample = vmap(lambda x, t: fn(case.params, x[None], target=t)[0])
    for size in (2, 1, 3):
        x, target = normal(size, *case.x.shape[1:]), torch.arange(size)
        relevance = one_sample(x, target)
        assert len(made) == 1
        assert largest_difference(relevance, fn(case.params, x, target=target)) < 1e-12
        made[1:] = []


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobian_of_starting_relevance_is_the_pullback(transform: Any) -> None:
    case = MODELS["smooth"]()
    output, pullback = lrp.vjp(case.model_fn, lrp.epsilon_plus(), case.params, case.x)
    start = normal(*output.shape)
    jacobian = transform(pullback)(start)
    contracted = torch.einsum("abcij,ij->abc", jacobian, start)
    assert largest_difference(contracted, pullback(start)) < 1e-10


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_under_grad_modes(context: Any) -> None:
    case = MODELS["residual"]()
    rules = lrp.epsilon_gamma_box(-3.0, 3.0)
    expected = lrp.attribute(case.model_fn, rules)(case.params, case.x, target=1)
    with context():
        inside = lrp.attribute(case.model_fn, rules)(case.params, case.x.clone(), target=1)
    assert torch.equal(inside, expected)
    assert not inside.requires_grad


def test_ensemble_of_modules() -> None:
    modules = [randomized(Residual(), seed) for seed in range(3)]
    params, buffers = stack_module_state(modules)
    model_fn, names = lrp.from_module(modules[0])
    stacked = {n: {**params, **buffers}[n].detach() for n in names}
    fn = lrp.attribute(model_fn, lrp.epsilon_plus_flat())
    x = normal(2, 2, 6, 6)
    looped = [lrp.attribute(f, lrp.epsilon_plus_flat())(p, x, target=1) for f, p in map(lrp.from_module, modules)]
    assert largest_difference(vmap(lambda p: fn(p, x, target=1))(stacked), torch.stack(looped)) < 1e-12


@pytest.mark.parametrize("model", [*MODELS, *ATTENTION_MODELS])
def test_gradient_composite_is_vjp(model: str) -> None:
    case = {**MODELS, **ATTENTION_MODELS}[model]()
    output, pullback = lrp.vjp(case.model_fn, lrp.gradient(), case.params, case.x)
    expected, plain = plain_vjp(lambda x: case.model_fn(case.params, x), case.x)
    assert torch.equal(output, expected)
    cotangent = normal(*output.shape)
    assert largest_difference(pullback(cotangent), plain(cotangent)[0]) < 1e-14
    _, pullback = lrp.vjp(case.model_fn, lrp.gradient(), case.params, case.x, argnums=(0, 1))
    trained = {n: p for n, p in case.params.items() if "running" not in n}
    rest = {n: p for n, p in case.params.items() if "running" in n}
    _, plain = plain_vjp(lambda p, x: case.model_fn({**p, **rest}, x), trained, case.x)
    ours = pullback(cotangent)
    assert largest_difference(({n: ours[0][n] for n in trained}, ours[1]), plain(cotangent)) < 1e-12


def test_lrp0_is_input_times_gradient() -> None:
    def net(params: Any, x: Tensor) -> Tensor:
        return torch.relu(torch.relu(x @ params[0]) @ params[1]) @ params[2]

    params = [normal(5, 6), normal(6, 6, seed=1), normal(6, 3, seed=2)]
    x = normal(4, 5, seed=3)
    relevance = lrp.attribute(net, [(lrp.Activation, lrp.Pass())])(params, x, target=1)
    assert largest_difference(relevance, x * grad(lambda x: net(params, x)[:, 1].sum())(x)) < 1e-14
    assert largest_difference(relevance.sum(1), net(params, x)[:, 1]) < 1e-13


@pytest.mark.parametrize("rule", [r for r in LINEAR_RULES if r != "epsilon_norm_scale"])
def test_linear_in_relevance(rule: str) -> None:
    case = MODELS["residual"]()
    output, pullback = lrp.vjp(case.model_fn, with_rule(LINEAR_RULES[rule]), case.params, case.x)
    a, b = normal(*output.shape, seed=1), normal(*output.shape, seed=2)
    assert largest_difference(pullback(2 * a - 3 * b), 2 * pullback(a) - 3 * pullback(b)) < 1e-11
    assert (pullback(a).abs().max() > 0) == (rule != "stop")


@pytest.mark.parametrize(("model", "name"), ATTENTION_CASES)
def test_linear_in_relevance_through_attention(model: str, name: str) -> None:
    """One forward pass serves every call of the pullback, in a loop and in `vmap`."""
    case = ATTENTION_MODELS[model]()
    output, pullback = lrp.vjp(case.model_fn, ATTENTION_COMPOSITES[name][0], case.params, case.x)
    a, b = normal(*output.shape, seed=1), normal(*output.shape, seed=2)
    looped = torch.stack([pullback(a), pullback(b), pullback(2 * a - 3 * b)])
    assert looped.isfinite().all()
    assert looped.abs().max() > 0
    assert largest_difference(looped[2], 2 * looped[0] - 3 * looped[1]) < 1e-11
    assert largest_difference(vmap(pullback)(torch.stack([a, b, 2 * a - 3 * b])), looped) < 1e-12
    assert torch.equal(pullback(a), looped[0])


@pytest.mark.parametrize("model", ATTENTION_MODELS)
def test_nested_transforms_through_attention(model: str) -> None:
    """Targets and samples around a gradient, and a gradient around both."""
    case = ATTENTION_MODELS[model]()
    fn = lrp.attribute(case.model_fn, lrp.attn_lrp())
    xs, targets = torch.stack([case.x, 0.5 * case.x]), torch.tensor([0, 2])

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return fn(case.params, x, target=t).square().sum()

    nested = vmap(vmap(grad(loss), (None, 0)), (0, None))(xs, targets)
    looped = torch.stack([torch.stack([grad(loss)(x, t) for t in targets]) for x in xs])
    assert largest_difference(nested, looped) < 1e-12
    outside = grad(lambda xs: vmap(lambda x: vmap(lambda t: loss(x, t))(targets).sum())(xs).sum())(xs)
    assert largest_difference(outside, looped.sum(1)) < 1e-12


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("model", ATTENTION_MODELS)
def test_under_grad_modes_through_attention(model: str, context: Any) -> None:
    """The value is the model's own, bit for bit, in every mode; kernels round relevance differently."""
    case = ATTENTION_MODELS[model]()
    fn = lrp.attribute_and_value(case.model_fn, lrp.attn_lrp())
    detached = {name: p.detach() for name, p in case.params.items()}
    with context():
        value = case.model_fn(case.params, case.x)
        inside, ours = fn(case.params, case.x, target=1)
    assert torch.equal(ours, value)
    assert not inside.requires_grad
    for params, x in ((case.params, case.x), (detached, case.x.clone().requires_grad_()), (detached, case.x)):
        outside, ours = fn(params, x, target=1)
        assert torch.equal(ours, case.model_fn(params, x))
        assert largest_difference(outside, inside) < 1e-12
