"""What is captured is the model function as it is now, whatever surrounds the call."""

from __future__ import annotations

import collections
import contextvars
import functools
import os
import sysconfig
import threading
import types
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lrpfunc as lrp
from lrpfunc._capture.environment import Environment
from tests.cases import ATTENTION_MODELS, MODELS, Residual, normal, randomized
from tests.oracles import largest_difference, plain_vjp

SCALE = torch.tensor(2.0, dtype=torch.float64)
FACTOR = 2.0


def reads_globals(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w) * SCALE * FACTOR


def test_globals_and_closures_are_read_at_each_call() -> None:
    global SCALE, FACTOR
    w, x = torch.eye(2).double(), normal(1, 2)
    fn = lrp.attribute(reads_globals, lrp.epsilon(0.0))
    assert torch.allclose(fn(w, x), 4 * x)
    SCALE = torch.tensor(3.0, dtype=torch.float64)  # rebound
    assert torch.allclose(fn(w, x), 6 * x)
    SCALE.fill_(5.0)  # changed in place
    assert torch.allclose(fn(w, x), 10 * x)
    FACTOR = 3.0  # a number
    assert torch.allclose(fn(w, x), 15 * x)
    SCALE, FACTOR = torch.tensor(2.0, dtype=torch.float64), 2.0

    shift = torch.zeros(2).double()

    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        return x @ w @ shift[:, None]

    fn = lrp.attribute(model_fn, lrp.epsilon(0.0))
    assert fn(w, x).abs().max() == 0
    shift = torch.ones(2).double()
    assert torch.allclose(fn(w, x), x)


@pytest.mark.parametrize("kind", ["cell", "default", "attribute", "partial", "method", "namespace", "list", "dict"])
def test_values_a_function_can_reach(kind: str) -> None:
    holder = types.SimpleNamespace(scale=torch.tensor(2.0).double())

    def model_fn(x: Tensor, scale: Any) -> Tensor:
        return x * scale

    def with_default(x: Tensor, scale: Any = holder.scale) -> Tensor:
        return x * scale

    class Model:
        scale = holder.scale

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.scale

        def method(self, x: Tensor) -> Tensor:
            return self(x)

    instance, listed, keyed = Model(), [holder.scale], {"scale": holder.scale}

    def set_to(value: float) -> None:
        scale = torch.tensor(value).double()
        holder.scale = instance.scale = listed[0] = keyed["scale"] = scale
        with_default.__defaults__ = (scale,)
        partial.keywords["scale"] = scale

    partial = functools.partial(model_fn, scale=holder.scale)
    functions: dict[str, Any] = {
        "cell": lambda x: x * holder.scale,
        "default": with_default,
        "attribute": instance,
        "partial": partial,
        "method": instance.method,
        "namespace": lambda x: model_fn(x, holder.scale),
        "list": lambda x: x * listed[0],
        "dict": lambda x: x * keyed["scale"],
    }
    fn = lrp.attribute(functions[kind], lrp.gradient(), argnums=0)
    x = normal(1, 3)
    set_to(2.0)
    assert torch.equal(fn(x), torch.full_like(x, 2))
    set_to(5.0)
    assert torch.equal(fn(x), torch.full_like(x, 5))


def test_numbers_read_out_of_tensors_are_never_stale() -> None:
    scale = torch.tensor(2.0)
    fn = lrp.attribute(lambda x: x * scale.item(), lrp.gradient(), argnums=0)
    assert fn(torch.ones(1, 1)).item() == 2
    scale.fill_(7.0)
    assert fn(torch.ones(1, 1)).item() == 7


def test_fresh_lambdas_share_a_capture_only_if_they_are_the_same() -> None:
    x = normal(1, 2)
    results = [lrp.attribute(lambda x, k=k: x * k, lrp.gradient(), argnums=0)(x) for k in (1.0, 2.0, True)]
    assert [r[0, 0].item() for r in results] == [1, 2, 1]


def test_module_changes_are_seen() -> None:
    module = randomized(Residual())
    model_fn, params = lrp.from_module(module)
    fn = lrp.attribute_and_value(model_fn, lrp.epsilon_plus())
    x = normal(2, 2, 6, 6)

    def check() -> None:
        assert torch.equal(fn(params, x, target=1)[1], module(x))

    check()
    module.pool = nn.AvgPool2d(2)
    check()
    module.pool.kernel_size = 3
    check()
    module.fc.register_forward_hook(lambda module, args, output: 2 * output)
    check()
    params["fc.bias"].data.add_(1)
    check()
    module.forward = lambda x: module.fc(x.mean((2, 3)).repeat(1, 2)[:, :3])  # type: ignore[method-assign]
    check()


def test_shapes_dtypes_and_strides() -> None:
    case = MODELS["residual"]()
    fn = lrp.attribute_and_value(case.model_fn, lrp.epsilon_plus())
    for x in (
        normal(1, 2, 6, 6),
        normal(3, 2, 8, 10),
        normal(3, 2, 8, 10).contiguous(memory_format=torch.channels_last),
    ):
        relevance, value = fn(case.params, x, target=1)
        assert relevance.shape == x.shape
        assert torch.equal(value, case.model_fn(case.params, x))
    low = {n: p.float() for n, p in case.params.items()}
    assert fn(low, case.x.float(), target=1)[0].dtype == torch.float32


def test_transforms_inside_the_model() -> None:
    def attention_free(w: Tensor, x: Tensor) -> Tensor:
        return vmap(lambda row: torch.relu(row @ w))(x)

    w, x = normal(4, 3), normal(2, 4, seed=1)
    plain = lrp.attribute(lambda w, x: torch.relu(x @ w), lrp.epsilon(0.1))
    assert largest_difference(lrp.attribute(attention_free, lrp.epsilon(0.1))(w, x), plain(w, x)) < 1e-14

    def gradient_of_energy(w: Tensor, x: Tensor) -> Tensor:
        return grad(lambda x: ((x @ w).square()).sum())(x)

    fn = lrp.attribute(gradient_of_energy, lrp.gradient())
    assert largest_difference(fn(w, x), grad(lambda x: gradient_of_energy(w, x).sum())(x)) < 1e-13
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).double()
    model_fn, params = lrp.from_module(module)
    batched = lrp.attribute(lambda p, x: vmap(lambda row: model_fn(p, row))(x), lrp.epsilon(0.1))
    assert largest_difference(batched(params, x), lrp.attribute(model_fn, lrp.epsilon(0.1))(params, x)) < 1e-14


def test_layers_inside_transforms_have_names() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    model_fn, params = lrp.from_module(module)
    rules = [(lrp.name("0"), lrp.WSquare()), (lrp.name("3"), lrp.Flat()), *lrp.epsilon(0.1)]

    def mapped(params: Any, x: Tensor) -> Tensor:
        return vmap(lambda row: model_fn(params, row[None])[0])(x)

    found, expected = (
        lrp.attribute(f, rules, layers="*")(params, normal(2, 2, 6, 6), target=1) for f in (mapped, model_fn)
    )
    assert largest_difference(found[0], expected[0]) < 1e-14
    assert found[1].keys() == expected[1].keys()
    for name, relevance in found[1].items():
        assert largest_difference(relevance.squeeze(1), expected[1][name]) < 1e-14

    scores = lrp.attribute(lambda p, x: grad(lambda x: model_fn(p, x).square().sum())(x), lrp.gradient(), layers="0")
    with pytest.raises(lrp.LayerNotFoundError, match="0"):
        scores(params, normal(2, 2, 6, 6))


def test_tokens_of_samples_that_a_model_maps_over() -> None:
    module = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.ReLU(), nn.Flatten(-2), nn.Linear(12, 3)).double()
    model_fn, params = lrp.from_module(module)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found, expected = (
        lrp.attribute(f, layers="0")(params, tokens, target=1)[1]["0"]
        for f in (lambda p, tokens: vmap(lambda row: model_fn(p, row))(tokens), model_fn)
    )
    assert largest_difference(found, expected) < 1e-14


def test_transforms_that_begin_unseen() -> None:
    def model_fn(_: None, x: Tensor) -> Tensor:
        try:
            return vmap(torch.relu)(x)
        except:  # noqa: E722
            return x

    x = normal(2, 3)
    assert torch.equal(lrp.attribute_and_value(model_fn)(None, x, target=0)[1], x.relu())


def test_what_transforms_leave_is_gone_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search for what holds a trace's tensors goes through all objects, which other threads may be making."""
    monkeypatch.setattr("lrpfunc._capture.trace.forget_cached", lambda _: pytest.fail("searched"))
    for inner in (grad(lambda x: x.sin().sum()), vmap(torch.sin), torch.func.jacrev(torch.sin)):
        lrp.attribute(lambda _, x, inner=inner: inner(x), lrp.gradient())(None, normal(3))


def after_dispatch(model_fn: Any) -> Any:
    """The same function with a transform inside, so that kernels are recorded where there were whole operations."""
    return lambda params, x: model_fn(params, vmap(torch.clone)(x))


@pytest.mark.parametrize("name", [name for name in (*MODELS, *ATTENTION_MODELS) if name != "recurrent"])
def test_transforms_inside_a_model_change_nothing(name: str) -> None:
    case = {**MODELS, **ATTENTION_MODELS}[name]()
    found, expected = (
        lrp.attribute(f)(case.params, case.x, target=1) for f in (after_dispatch(case.model_fn), case.model_fn)
    )
    assert largest_difference(found, expected) < 1e-12


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(3), nn.InstanceNorm2d(3), nn.LayerNorm(4), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.LogSigmoid()],
    ids=lambda layer: type(layer).__name__,
)
def test_transforms_inside_a_model_in_training_mode(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), layer, nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).double()
    model_fn, params = lrp.from_module(randomized(module).train(), return_buffers=True)
    results = []
    for fn in (after_dispatch(model_fn), model_fn):
        torch.manual_seed(0)
        relevance, (value, buffers) = lrp.attribute_and_value(fn, has_aux=True)(params, normal(2, 2, 6, 6), target=1)
        results.append([relevance, value, *buffers.values()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3, track_running_stats=False)),
        *(nn.LayerNorm(4), nn.GroupNorm(3, 3), nn.LogSigmoid(), nn.MaxPool2d(2)),
    ],
    ids=str,
)
def test_derivatives_inside_the_model_by_kernels_of_several_results(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), layer).double()
    is_training = module.training and layer.training
    model_fn, params = lrp.from_module(randomized(module).train(layer.training), return_buffers=is_training)

    def gradient_of_energy(params: Any, x: Tensor) -> Tensor:
        def energy(x: Tensor) -> Tensor:
            output = model_fn(params, x)
            return (output[0] if is_training else output).exp().sum()

        return grad(energy)(x).flatten(1)

    x = normal(2, 2, 6, 6)
    expected = grad(lambda x: gradient_of_energy(params, x)[:, 1].sum())(x)
    assert largest_difference(lrp.attribute(gradient_of_energy, lrp.gradient())(params, x, target=1), expected) < 1e-12


def smooth(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ w)


def descended(w: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        step = grad(lambda x: smooth(w, x).square().sum())(x)
    return smooth(w, x - step)


def constant_in_energy(w: Tensor, x: Tensor) -> Tensor:
    def energy(x: Tensor) -> Tensor:
        with torch.no_grad():
            factor = smooth(w, x)
        return (smooth(w, x) * factor).sum()

    return grad(energy)(x)


def enabled_again(w: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        shift = vmap(lambda row: 2 * row)(x)
        with torch.enable_grad():
            factor = vmap(lambda row: (row * w).sum(-1))(x)
    return smooth(w, x + shift) * factor


def written(w: Tensor, x: Tensor) -> Tensor:
    x = vmap(torch.clone)(x)
    with torch.no_grad():
        x.mul_(2)
    return smooth(w, x)


def decorated(w: Tensor, x: Tensor) -> Tensor:
    return vmap(lambda row: row + torch.no_grad()(torch.exp)(row))(x) @ w


def enabled_in_vmap(w: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        shift = vmap(torch.enable_grad()(lambda row: torch.tanh(row @ w)))(x)
    return shift + x


def enabled_in_jvp(w: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        product = torch.enable_grad()(lambda row: row * torch.tanh(x @ w))
        value, tangent, *_ = jvp(product, (torch.ones_like(x),), (torch.ones_like(x),))
    return value + tangent + x


def enabled_for_good(w: Tensor, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)

    def row(x: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        return x.exp()

    return vmap(row)(x).detach() + torch.tanh(x @ w)


def masked_twice(w: Tensor, x: Tensor) -> Tensor:
    def row(x: Tensor) -> Tensor:
        scores = (x @ w).clone()
        with torch.no_grad():
            scores[:1] = -torch.inf
            scores.sub_(1.0)
        return torch.softmax(scores, -1)

    return vmap(row)(x)


def constant_slope_of_attention(w: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        slope = grad(lambda x: F.scaled_dot_product_attention(x, x, x).square().sum())(x[None] @ w)
    return x * slope[0]


def clamped_in_energy(w: Tensor, x: Tensor) -> Tensor:
    def energy(x: Tensor) -> Tensor:
        y = 2 * x
        y.clamp_(min=-1)
        return smooth(w, y).square().sum()

    return grad(energy)(x)


BESIDE_TRANSFORMS = [
    *(descended, constant_in_energy, enabled_again, written, decorated, enabled_in_vmap, enabled_in_jvp),
    *(enabled_for_good, masked_twice, constant_slope_of_attention, clamped_in_energy),
]


@pytest.mark.parametrize("model_fn", BESIDE_TRANSFORMS)
def test_no_grad_and_writes_beside_and_inside_transforms(model_fn: Any) -> None:
    w, x = normal(3, 3), normal(2, 3, seed=1).requires_grad_()
    output = model_fn(w, x)
    (expected,) = torch.autograd.grad(output[:, 1].sum(), x)
    relevance, value = lrp.attribute_and_value(model_fn, lrp.gradient())(w, x.detach(), target=1)
    assert largest_difference(relevance, expected) < 1e-14
    assert torch.equal(value, output)


def test_torch_has_no_second_derivative_of_fused_attention() -> None:
    def slope(w: Tensor, x: Tensor) -> Tensor:
        return grad(lambda x: F.scaled_dot_product_attention(x, x, x).square().sum())(x @ w)

    with pytest.raises(lrp.RuleError, match=r"torch has no derivative of `_scaled_dot_product_.*_backward`"):
        lrp.attribute(slope, lrp.gradient())(normal(3, 3), normal(1, 2, 2, 3), target=lambda y: y)


@pytest.mark.parametrize("network", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell])
def test_gates_beside_a_transform_are_refused(network: type[nn.Module]) -> None:
    model_fn, params = lrp.from_module(network(3, 3).double(), output=lambda out: out[0])
    relevance_fn = lrp.attribute(after_dispatch(model_fn))
    with pytest.raises(lrp.CaptureError, match="LSTM or a GRU and a transform"):
        relevance_fn(params, normal(2, 3))


SURROUNDINGS: dict[str, Any] = {
    "vmap": lambda f, x: vmap(f)(x[None])[0],
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "jacrev": lambda f, x: jacrev(f)(x).sum(),
    "jacfwd": lambda f, x: jacfwd(f)(x).sum(),
    "vmap_grad": lambda f, x: vmap(grad(lambda x: f(x).sum()))(x[None])[0],
    "grad_vmap": lambda f, x: grad(lambda x: vmap(f)(x[None]).sum())(x),
    "jacfwd_jacrev": lambda f, x: jacfwd(jacrev(lambda x: f(x).sum()))(x).sum(),
    "no_grad": lambda f, x: torch.no_grad()(f)(x),
    "inference_mode": lambda f, x: torch.inference_mode()(f)(x.clone()),
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_first_call_from_inside(surrounding: str) -> None:
    """A capture that happens inside a transform is the one that happens outside."""
    case = MODELS["smooth"]()
    x = case.x[:1]
    results = []
    for warm in (False, True):
        fn = lrp.attribute(lambda p, x, warm=warm: case.model_fn(p, x) * (1.0 + 0 * warm), lrp.epsilon(0.1))
        if warm:
            fn(case.params, x, target=1)
        results.append(SURROUNDINGS[surrounding](lambda x, fn=fn: fn(case.params, x, target=1), x))
    assert largest_difference(*results) == 0


def test_eight_threads_share_a_transform_while_the_model_runs() -> None:
    module = randomized(Residual())
    model_fn, params = lrp.from_module(module)
    fn = lrp.attribute(model_fn, lrp.epsilon_plus())
    inputs = [normal(1 + i % 4, 2, 6, 6 + i, seed=i) for i in range(8)]
    expected = [module(x).detach() for x in inputs]
    stop = threading.Event()
    wrong: list[Any] = []

    def keep_running() -> None:
        while not stop.is_set():
            wrong.extend(x for x, y in zip(inputs, expected, strict=True) if not torch.equal(module(x), y))

    results: list[Any] = [None] * 8
    user = threading.Thread(target=keep_running)
    user.start()
    workers = [
        threading.Thread(target=lambda i=i: results.__setitem__(i, fn(params, inputs[i], target=1))) for i in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    stop.set()
    user.join()
    assert not wrong
    for x, relevance in zip(inputs, results, strict=True):
        assert torch.equal(relevance, fn(params, x, target=1))
    assert all(p is q for (_, p), q in zip(module.named_parameters(), module.parameters(), strict=True))
    assert not any(isinstance(p, torch._subclasses.FakeTensor) for p in module.parameters())


def test_functional_call_by_hand() -> None:
    module = randomized(Residual())
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    fn = lrp.attribute(lambda p, x: functional_call(module, p, (x,)), lrp.epsilon_plus())
    model_fn, params = lrp.from_module(module)
    floating = {n: t for n, t in tensors.items() if t.is_floating_point()}
    x = normal(2, 2, 6, 6)
    assert torch.equal(fn(floating, x, target=0), lrp.attribute(model_fn, lrp.epsilon_plus())(params, x, target=0))


def without_gradients(y: Tensor) -> Tensor:
    with torch.no_grad():
        y.mul_(2)
        y[0].add_(1)
    return y * 3


IN_PLACE: dict[str, Any] = {
    "activation": lambda x: F.relu(x * 1.0, inplace=True),
    "residual": lambda x: (x * 2.0).add_(x),
    "both_names": lambda x: (lambda y: (y.relu_(), y)[1] * 1.0)(x * 1.0),
    "through_a_view": lambda x: (lambda y: (y.view(-1).mul_(3.0), y)[1] * 1.0)(x * 1.0),
    "part": lambda x: (lambda y: (y[:, 1].zero_(), y)[1] * 2.0)(x * 1.0),
    "part_by_index": lambda x: (lambda y: (y.__setitem__((slice(None), 0), 2.0 * x[:, 1]), y)[1])(x * 1.0),
    "view_read_later": lambda x: (lambda y: (lambda v: (y.relu_(), v)[1] * 1.0)(y[:, :2]))(x * 1.0),
    "narrowed": lambda x: (lambda y: (y.narrow(1, 0, 2).mul_(2.0), y)[1] * 1.0)(x * 1.0),
    "strided": lambda x: (lambda y: (y.as_strided((2, 2), (4, 2), 1).mul_(2.0), y)[1] * 1.0)(x * 1.0),
    "masked": lambda x: (x * 1.0).masked_fill_(torch.tensor([True, False, False, False]), 0.5),
    "squeezed": lambda x: (x * 1.0).unsqueeze_(0).squeeze_(0) * 1.0,
    "copied": lambda x: torch.zeros_like(x).copy_(x) * 3.0,
    "into_zeros": lambda x: (lambda y: (y[:, 1:3].copy_(x[:, :2]), y)[1])(torch.zeros_like(x)),
    "detached": lambda x: (lambda y: (y.detach()[0].zero_(), y)[1] * 1.0)(x * 1.0),
    "detached_view": lambda x: (lambda y, z: (z.mul_(2), y * x)[1])(*(lambda y: (y, y.detach()))(x * 1.0)),
    "view_of_reshaped": lambda x: (lambda y: (lambda z: (y.unsqueeze_(0), z.zero_(), y + 0)[2])(y[0]))(x * 1.0),
    "reshaped_view": lambda x: (lambda y: (lambda z: (z.squeeze_(0).mul_(2), y)[1])(y.view(1, 2, 4)))(x * 1.0),
    "transposed": lambda x: (lambda y: (lambda z: (y.t_(), z.mul_(3), y)[2] * 1.0)(y.view(-1)))(x * 1.0),
    "transposed_pair": lambda x: (x * 1.0).transpose_(0, 1).mul_(2) * 1.0,
    "without_gradients": lambda x: without_gradients(x * 1.0),
    "data": lambda x: (x * 1.0).data * x,
    "no_alpha_dropout": lambda x: (lambda y: (F.alpha_dropout(y, 0.5, False).relu_(), y)[1] * 1.0)(x * 1.0),
    "no_dropout": lambda x: (lambda y: (F.dropout(y, 0.5, False).relu_(), y)[1] * 1.0)(x * 1.0),
}


@pytest.mark.filterwarnings("ignore::lrpfunc.UnusedRuleWarning")
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operations(name: str) -> None:
    f, x = IN_PLACE[name], normal(2, 4)
    product, written = lrp.operation("mul"), lrp.operation("assigned")
    rules = [(lrp.Activation, lrp.Pass()), (product, lrp.Uniform()), (written, lrp.Gradient())]
    cotangent = normal(*f(x).shape, seed=1)
    output, pullback = lrp.vjp(f, lrp.gradient(), x, argnums=0)
    expected, plain = plain_vjp(f, x)
    assert torch.equal(output, expected)
    assert largest_difference(pullback(cotangent), plain(cotangent)[0]) == 0
    relevance = lrp.attribute(f, rules, argnums=0)
    vmapped = vmap(lambda x: relevance(x, target=cotangent))(torch.stack([x, -x]))
    assert largest_difference(vmapped, torch.stack([relevance(v, target=cotangent) for v in (x, -x)])) < 1e-12
    explanation = lrp.explain(f, rules, argnums=0)(x, target=cotangent)
    assert abs(explanation.residual) < 1e-12


def test_capture_follows_autocast_and_default_dtype() -> None:
    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        y = x @ w
        return y * 2 if y.dtype == torch.bfloat16 else y + torch.ones(())

    w, x = torch.eye(2), torch.ones(1, 2)
    fn = lrp.attribute_and_value(model_fn, lrp.epsilon(0.0))
    assert fn(w, x)[1].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        relevance, value = fn(w, x)
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, torch.full_like(value, 2.0))
    assert torch.allclose(relevance, 2 * x)


def test_no_grad_and_detach_stop_relevance() -> None:
    def model_fn(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x * 2
        return x + scale + x.detach()

    relevance = lrp.attribute(model_fn, lrp.epsilon(0.0), argnums=0)
    x = normal(1, 3)
    assert torch.allclose(relevance(x), x)
    assert torch.allclose(jacrev(lambda x: relevance(x))(x).squeeze(), torch.eye(3).double())


def test_a_call_leaves_no_thread_and_no_mode() -> None:
    threads = threading.active_count()
    case = MODELS["mlp"]()
    lrp.attribute(case.model_fn, lrp.epsilon())(case.params, case.x, target=1)
    assert threading.active_count() == threads
    assert torch.is_grad_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


class TestNothingIsLeftBehind:
    """What a function remembers while it is traced is of no use to it afterwards."""

    def check(self, f: Any, x: Tensor) -> None:
        for _ in range(2):
            _, value = lrp.attribute_and_value(f, lrp.gradient(), argnums=0)(x)
            assert torch.equal(value, f(x))
            assert type(f(x)) is Tensor

    def test_caches(self) -> None:
        memo: dict[int, Tensor] = {}
        collected: list[Tensor] = []

        @functools.lru_cache
        def grid(n: int) -> Tensor:
            return torch.arange(n, dtype=torch.float64) + 1

        def remembered(n: int) -> Tensor:
            if n not in memo:
                memo[n] = torch.arange(n, dtype=torch.float64) + 2
            return memo[n]

        class Lazy:
            grid = None

            def __call__(self, x: Tensor) -> Tensor:
                if self.grid is None:
                    self.grid = torch.arange(x.shape[-1], dtype=torch.float64) + 3
                collected.append(x * 2)
                return x * self.grid

        lazy = Lazy()
        x = normal(2, 4)
        # With a transform inside, a function is traced twice.
        self.check(lambda x: torch.vmap(lambda row: row * grid(4) * remembered(4))(x), x)
        grid.cache_clear()
        memo.clear()
        self.check(lambda x: x * grid(4), x)
        self.check(lambda x: x * remembered(4), x)
        self.check(lazy, x)
        assert all(type(t) is Tensor for t in (*collected, memo[4], lazy.grid))

    def test_hooks_that_collect(self) -> None:
        collected: dict[str, Tensor] = {}
        module = randomized(Residual())
        module.conv1.register_forward_hook(lambda m, args, out: collected.__setitem__("conv1", out.detach()))
        model_fn, params = lrp.from_module(module)
        fn = lrp.attribute(model_fn)
        fn(params, normal(2, 2, 6, 6), target=0)
        assert not collected
        module(normal(2, 2, 6, 6))
        assert type(collected["conv1"]) is Tensor


class Config:
    scale = 2.0
    table: ClassVar[dict[str, float]] = {"scale": 3.0}


class Rebindable:
    activation = staticmethod(torch.relu)

    def __call__(self, x: Tensor) -> Tensor:
        return self.activation(x) * Config.scale * Config.table["scale"]


def test_attributes_of_classes_are_read_at_each_call() -> None:
    x, fn = normal(2, 3), Rebindable()
    values = []
    for _ in range(4):
        value = lrp.attribute_and_value(fn, lrp.gradient(), argnums=0)(x)[1]
        assert torch.equal(value, fn(x))
        values.append(value)
        [
            lambda: setattr(Config, "scale", 5.0),
            lambda: Config.table.__setitem__("scale", 7.0),
            lambda: setattr(Rebindable, "activation", staticmethod(torch.tanh)),
            lambda: None,
        ][len(values) - 1]()
    assert len({float(v.sum()) for v in values}) == 4


def test_other_state_a_function_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, array, variable = collections.deque([1.0]), bytearray([1]), contextvars.ContextVar("scale", default=1.0)
    long = [1.0] * 20_000

    def f(x: Tensor) -> Tensor:
        return x * queue[0] * array[0] * variable.get() * long[7] * float(os.environ.get("LRPFUNC_TEST", "1"))

    x = torch.ones(1, 1)
    fn = lrp.attribute(f, lrp.gradient(), argnums=0)
    assert fn(x).item() == 1
    queue[0] = 2.0
    assert fn(x).item() == 2
    array[0] = 3
    assert fn(x).item() == 6
    variable.set(5.0)
    assert fn(x).item() == 30
    long[7] = 7.0
    assert fn(x).item() == 210
    monkeypatch.setenv("LRPFUNC_TEST", "11")
    assert fn(x).item() == 2310


gain = torch.tensor(3.0)


def test_attributes_are_not_taken_for_globals() -> None:
    class Model:
        gain = 2.0

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.gain

    environment = Environment(Model())
    assert not environment.tensors
    assert gain == 3


@pytest.mark.parametrize("read", [lambda t: float(t.numpy()[0]), lambda t: t.tolist()[0], lambda t: len(str(t))])
def test_numbers_read_from_closures_are_true(read: Any) -> None:
    tensor = torch.tensor([3.5, 1.0])
    f = lambda x: x * read(tensor)  # noqa: E731
    assert torch.equal(lrp.attribute_and_value(f, lrp.gradient(), argnums=0)(torch.ones(1, 1))[1], f(torch.ones(1, 1)))


def test_random_draws_are_the_models() -> None:
    def f(x: Tensor) -> Tensor:
        F.dropout(x, 0.5, True)  # unused, but it moves the generator on
        return F.dropout(x, 0.5, True)

    x = normal(4, 4)
    torch.manual_seed(0)
    expected = f(x)
    torch.manual_seed(0)
    relevance, value = lrp.attribute_and_value(f, [], argnums=0)(x)
    assert torch.equal(value, expected)
    assert torch.equal(relevance, value)
    for random in (lambda x: F.alpha_dropout(x, 0.5, True), lambda x: F.rrelu(x, training=True)):
        with pytest.raises(lrp.CaptureError, match="draws random numbers inside"):
            lrp.attribute(random, lrp.gradient(), argnums=0)(x)


def test_complex_numbers_on_the_way() -> None:
    f = lambda x: x + torch.fft.ifft(torch.fft.fft(x)).real  # noqa: E731
    x = normal(2, 4)
    output, pullback = lrp.vjp(f, lrp.gradient(), x, argnums=0)
    cotangent = normal(*output.shape, seed=1)
    assert largest_difference(pullback(cotangent), plain_vjp(f, x)[1](cotangent)[0]) < 1e-12
    with pytest.raises(lrp.UncoveredLayerError, match="fft_fft"):
        lrp.attribute(f, lrp.epsilon(), argnums=0)(x)


def test_compiled_and_scripted_parts() -> None:
    x = normal(2, 3)
    compiled = torch.compile(lambda x: torch.relu(x) * 2)
    relevance = lrp.attribute(lambda x: compiled(x), [(lrp.Activation, lrp.Pass())], argnums=0)
    assert torch.equal(relevance(x), torch.relu(x) * 2)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints() -> None:
    for reentrant in (False, True):
        f = lambda x, reentrant=reentrant: checkpoint(torch.tanh, x, use_reentrant=reentrant) + x  # noqa: E731
        if reentrant:
            with pytest.raises(lrp.CaptureError, match="use_reentrant=False"):
                lrp.attribute(f, lrp.epsilon(), argnums=0)(normal(2, 3))
        else:
            assert lrp.attribute(f, lrp.epsilon(), argnums=0)(normal(2, 3)).shape == (2, 3)


def test_sparse_tensors() -> None:
    adjacency = torch.eye(3).double().to_sparse()
    with pytest.raises(lrp.InputError, match=r"layout torch.sparse_coo, which cannot be traced"):
        lrp.attribute(lambda a, x: a @ x)(adjacency, normal(3, 2))


def test_caches_of_installed_code_keep_no_fake_tensors() -> None:
    """Such as the `lru_cache` around a table of relative positions, which a later plain call would find."""
    source = (
        "import functools, torch\n"
        "@functools.lru_cache\ndef table(n):\n    return torch.arange(n) * 2.0\n"
        "def scaled(x):\n    return x * table(x.shape[-1])\n"
    )
    installed: dict[str, Any] = {}
    exec(compile(source, os.path.join(sysconfig.get_path("purelib"), "positions.py"), "exec"), installed)
    table, scaled = installed["table"], installed["scaled"]

    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scaled(x)

    model_fn, params = lrp.from_module(Positions())
    x = torch.ones(1, 3)
    for _ in range(2):
        assert lrp.attribute(model_fn)(params, x).tolist() == [[0.0, 2.0, 4.0]]
        assert type(table(3)) is Tensor
        assert lrp.attribute(model_fn)(params, torch.ones(2, 3)).tolist() == [[0.0, 2.0, 4.0]] * 2


def test_results_of_an_operation_are_changed_in_place_apart() -> None:
    def model_fn(_: None, x: Tensor) -> Tensor:
        values, _indices = x.topk(2, -1)
        values /= values.sum(-1, keepdim=True)
        return values

    x = normal(2, 4).abs()
    relevance, value = lrp.attribute_and_value(model_fn)(None, x, target=0)
    assert torch.equal(value, model_fn(None, x))
    assert torch.allclose(relevance.sum(-1), value[:, 0])


def test_compiles_a_walk_through_fused_attention() -> None:
    def model_fn(weight: Tensor, x: Tensor) -> Tensor:
        h = torch.nn.functional.layer_norm(x, (8,))
        return (torch.nn.functional.scaled_dot_product_attention(h, h, h) @ weight).mean(1)

    weight, x = normal(8, 3), normal(2, 5, 8, seed=1)
    relevance_fn = lrp.attribute(model_fn, lrp.attn_lrp())
    compiled = torch.compile(relevance_fn, backend="eager", fullgraph=True)
    assert torch.equal(compiled(weight, x, target=1), relevance_fn(weight, x, target=1))
