"""What stays as it is when a model of torchvision's is explained: the model, its value, its gradients, its threads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules import module as global_hooks
from torchvision.models.resnet import BasicBlock

import lrpfunc as lrp
from tests.architectures.models import CLASSES, architecture, image, randomized
from tests.oracles import largest_difference

IMAGE = image(2, 3, 32, 32)


@pytest.fixture(scope="module", params=["resnet18", "vgg16_bn"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """With a gradient that must not be lost, hooks that must stay, and a module that is in training mode."""
    model = architecture(request.param)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda *_: None)
    first.register_forward_pre_hook(lambda *_: None)
    first.register_full_backward_hook(lambda *_: None)
    next(m for m in model.modules() if isinstance(m, nn.ReLU)).train()
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """All there is to a model and around it: objects by identity, tensors by their bits and version as well."""
    found: dict[str, Any] = {
        "gradients enabled": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "random state": bits(torch.get_rng_state()),
        "global hooks": hooks(global_hooks),
        "names": list(model.state_dict()),
    }
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        found[name] = (id(tensor), type(tensor), tensor._version, tensor.requires_grad, bits(tensor))
        found[f"{name}.grad"] = None if tensor.grad is None else (id(tensor.grad), bits(tensor.grad))
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"module {name}"] = (id(module), type(module), module.training, sorted(vars(module)))
        found[f"hooks of {name}"] = hooks(module)
    return found


def bits(tensor: Tensor) -> int:
    return hash(tensor.detach().numpy().tobytes())


def hooks(owner: Any) -> dict[str, Any]:
    return {name: list(hook.items()) for name, hook in vars(owner).items() if "hook" in name and isinstance(hook, dict)}


def changed(model: nn.Module, before: dict[str, Any]) -> list[str]:
    after = state(model)
    return [name for name in before | after if name not in before or name not in after or before[name] != after[name]]


class SmallResNet(nn.Sequential):
    """Merged batch norms, residual sums, ReLUs in place and called twice."""

    def __init__(self) -> None:
        stem = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
        super().__init__(*stem, BasicBlock(8, 8), BasicBlock(8, 8), *end)


@lru_cache(maxsize=1)
def function(model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """One for all tests of a model, which is then captured once."""
    return lrp.from_module(model)


def every_call(model: nn.Module) -> dict[str, Callable[[], Any]]:
    model_fn, params = function(model)
    rules = lrp.epsilon_plus_flat()
    relevance_fn = lrp.attribute(model_fn, rules)

    def pull_back() -> Any:
        output, pullback = lrp.vjp(model_fn, rules, params, IMAGE)
        return pullback(output)

    return {
        "from_module": lambda: lrp.from_module(model, return_buffers=True),
        "model function": lambda: model_fn(params, IMAGE),
        "attribute": lambda: relevance_fn(params, IMAGE, target=3),
        "layers": lambda: lrp.attribute(model_fn, rules, layers="*")(params, IMAGE, target=3),
        "parameters": lambda: lrp.attribute(model_fn, rules, argnums=0)(params, IMAGE, target=3),
        "attribute_and_value": lambda: lrp.attribute_and_value(model_fn, rules)(params, IMAGE, target=3),
        "vjp": pull_back,
        "explain": lambda: str(lrp.explain(model_fn, rules)(params, IMAGE, target=3)),
        "vmap": lambda: vmap(lambda t: relevance_fn(params, IMAGE, target=t))(torch.arange(2)),
        "grad": lambda: grad(lambda p: relevance_fn(p, IMAGE, target=3).square().sum())(params),
        "autograd": lambda: torch.autograd.grad(
            relevance_fn(params, IMAGE, target=3).square().sum(), list(model.parameters()), allow_unused=True
        ),
    }


@pytest.mark.parametrize("call", every_call(nn.Identity()))
def test_model_is_as_it_was(model: nn.Module, call: str):
    before = state(model)
    every_call(model)[call]()
    assert changed(model, before) == []


FAILURES: dict[str, tuple[type[Exception], str, Callable[..., Any]]] = {
    "uncovered": (
        lrp.UncoveredLayerError,
        "no rule covers",
        lambda f, p: lrp.attribute(f, [(lrp.Dense, lrp.Epsilon())])(p, IMAGE, target=3),
    ),
    "target": (
        lrp.TargetError,
        f"target={CLASSES} is out of range",
        lambda f, p: lrp.attribute(f)(p, IMAGE, target=CLASSES),
    ),
    "target tensor": (
        lrp.TargetError,
        "index out of range",
        lambda f, p: lrp.attribute(f)(p, IMAGE, target=torch.tensor([0, -CLASSES - 1])),
    ),
    "layers": (
        lrp.LayerNotFoundError,
        "layers='layer9' matches no layer",
        lambda f, p: lrp.attribute(f, layers="layer9")(p, IMAGE, target=3),
    ),
    "rule": (
        lrp.RuleError,
        r"shape \(3,\)",
        lambda f, p: lrp.attribute(f, lrp.epsilon_gamma_box(torch.zeros(3), torch.ones(3)))(p, IMAGE, target=3),
    ),
    "in the model": (RuntimeError, "channels", lambda f, p: lrp.attribute(f)(p, IMAGE[:, :2], target=3)),
    "explain": (
        lrp.CaptureError,
        "explain prints numbers",
        lambda f, p: vmap(lambda x: lrp.explain(f)(p, x[None]).start)(IMAGE),
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_model_is_as_it_was_after_an_error(model: nn.Module, failure: str):
    error, message, call = FAILURES[failure]
    before = state(model)
    with pytest.raises(error, match=message):
        call(*function(model))
    assert changed(model, before) == []


def test_training_mode_is_refused_and_left_on():
    model = randomized(SmallResNet()).train()
    model_fn, params = lrp.from_module(model)
    before = state(model)
    with pytest.raises(lrp.CaptureError, match="return_buffers=True"):
        lrp.attribute(model_fn)(params, IMAGE, target=3)
    assert changed(model, before) == []


def test_optimizer_made_before_trains_as_if_nothing_was_explained():
    """And what was made before the steps explains the model as it is after them."""
    explained, plain = randomized(SmallResNet()), randomized(SmallResNet())
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (explained, plain)]
    model_fn, params = lrp.from_module(explained)
    relevance_fn = lrp.attribute(model_fn)
    first = relevance_fn(params, IMAGE, target=3)
    for _ in range(2):
        for trained, optimizer in zip((explained, plain), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained(IMAGE), torch.tensor([1, 2])).backward()
            optimizer.step()
        relevance = relevance_fn(params, IMAGE, target=3)
    assert all(torch.equal(a, b) for a, b in zip(explained.parameters(), plain.parameters(), strict=True))
    assert not torch.equal(first, relevance)
    twin_fn, twin_params = lrp.from_module(plain)
    assert torch.equal(relevance, lrp.attribute(twin_fn)(twin_params, IMAGE, target=3))


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder, transposed, and whose two blocks are one module."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 4, 3)
        self.block = self.same_block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.decode = nn.ConvTranspose2d(4, 3, 3, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.same_block(self.block(self.encode(x))))


def test_tied_weights_stay_tied():
    model: Any = randomized(Tied())
    model_fn, params = lrp.from_module(model)
    before, x = state(model), image(2, 3, 6, 6)
    relevance, value = lrp.attribute_and_value(model_fn, lrp.epsilon_plus())(params, x)
    assert changed(model, before) == []
    assert model.decode.weight is model.encode.weight
    assert model.block is model.same_block
    assert torch.equal(value, model(x))
    untied = nn.Sequential(*map(copy.deepcopy, (model.encode, model.block, model.block, model.decode)))
    untied_fn, untied_params = lrp.from_module(untied)
    assert torch.equal(relevance, lrp.attribute(untied_fn, lrp.epsilon_plus())(untied_params, x))


# --------------------------------------------------------------------------------------------------------------
# Value and gradients

NO_AUXILIARY = {"aux_logits": False, "init_weights": False}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alexnet", {}),
        ("vgg11_bn", {}),
        ("resnet18", {}),
        ("squeezenet1_1", {}),
        ("densenet121", {}),
        ("googlenet", NO_AUXILIARY),
        pytest.param("inception_v3", NO_AUXILIARY, marks=SLOW),
        pytest.param("mobilenet_v2", {}, marks=SLOW),
        pytest.param("mnasnet0_5", {}, marks=SLOW),
        pytest.param("shufflenet_v2_x0_5", {}, marks=SLOW),
        pytest.param("resnext50_32x4d", {}, marks=SLOW),
    ],
)
def test_value_is_the_models(name: str, options: dict[str, Any]):
    model = architecture(name, **options)
    model_fn, params = lrp.from_module(model)
    x = image(1, 3, 80, 80)
    relevance, value = lrp.attribute_and_value(model_fn, lrp.epsilon_plus())(params, x)
    assert torch.equal(value, model(x))
    assert relevance.isfinite().all()
    assert relevance.any()


NOT_MERGED = (nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, CLASSES))
NORMALIZED: dict[str, Callable[[], nn.Module]] = {
    "merged": SmallResNet,
    "not merged": lambda: nn.Sequential(*NOT_MERGED),
    "resnet18": lambda: architecture("resnet18"),
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_gradients_of_the_value_are_the_models(name: str):
    model = randomized(NORMALIZED[name]())
    model_fn, params = lrp.from_module(model)
    value_fn = lrp.attribute_and_value(model_fn, lrp.epsilon_plus_flat())
    trained: dict[str, Tensor] = dict(model.named_parameters())

    def explained(parameters: dict[str, Tensor]) -> Tensor:
        return loss(value_fn({**params, **parameters}, IMAGE, target=3)[1])

    def plain(parameters: dict[str, Tensor]) -> Tensor:
        return loss(functional_call(model, parameters, (IMAGE,)))

    assert largest_difference(grad(explained)(trained), grad(plain)(trained)) <= 1e-12
    backward = [torch.autograd.grad(fn(trained), list(trained.values())) for fn in (explained, plain)]
    assert largest_difference(*backward) <= 1e-12


def loss(output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, torch.tensor([1, 2]))


# --------------------------------------------------------------------------------------------------------------
# Threads


def test_threads_share_a_transform_and_a_model():
    """Eight threads explain, each its own input and class, while another runs the live model."""
    model = randomized(SmallResNet())
    model_fn, params = lrp.from_module(model)
    images = [image(1, 3, 32, 32, seed=seed) for seed in range(8)]
    before, expected = state(model), [model(x) for x in images]
    done = Event()

    def run_the_model() -> list[bool]:
        seen = []
        while not done.wait(0.01):
            seen += [torch.equal(model(x), y) for x, y in zip(images, expected, strict=True)]
        return seen

    relevance_fn = lrp.attribute_and_value(model_fn, lrp.epsilon_plus())
    with ThreadPoolExecutor(9) as pool:
        beside = pool.submit(run_the_model)
        pending = [pool.submit(relevance_fn, params, x, target=k) for k, x in enumerate(images)]
        results = [future.result() for future in pending]
        done.set()
    assert len(beside.result()) >= len(images)
    assert all(beside.result())
    assert changed(model, before) == []
    for k, (x, y, (relevance, value)) in enumerate(zip(images, expected, results, strict=True)):
        alone, _ = relevance_fn(params, x, target=k)
        assert torch.equal(value, y)
        assert torch.equal(relevance, alone)


# --------------------------------------------------------------------------------------------------------------
# Relevance of layers


@pytest.fixture(scope="module")
def resnet18() -> Any:
    return architecture("resnet18")


def of_layers(model: nn.Module, layers: str | list[str]) -> dict[str, Tensor]:
    model_fn, params = function(model)
    return lrp.attribute(model_fn, lrp.epsilon_plus(), layers=layers)(params, IMAGE, target=3)[1]


def test_names_of_layers(resnet18: Any):
    """A module that is called again is `name@1`; a convolution and the batch norm merged into it are one entry."""
    block = ("conv1", "relu", "conv2", "relu@1")
    names = [f"layer1.{k}{part}" for k in (0, 1) for part in (*(f".{name}" for name in block), "")]
    found = of_layers(resnet18, "layer1.*")
    assert list(found) == names
    assert {relevance.shape for relevance in found.values()} == {(2, 64, 8, 8)}
    assert torch.equal(found["layer1.0.relu@1"], found["layer1.0"])
    assert not torch.equal(found["layer1.0.relu"], found["layer1.0.relu@1"])


def test_merged_batch_norm_shares_its_convolutions_entry(resnet18: Any):
    by_norm = of_layers(resnet18, ["layer1.0.bn1", "layer2.0.downsample.1"])
    by_convolution = of_layers(resnet18, ["layer1.0.conv1", "layer2.0.downsample.0"])
    assert list(by_norm) == ["layer1.0.bn1", "layer2.0.downsample.1"]
    for norm, convolution in zip(by_norm.values(), by_convolution.values(), strict=True):
        assert torch.equal(norm, convolution)


def test_relevance_of_a_layer_is_that_of_the_rest_explained_alone(resnet18: Any):
    net = resnet18
    start = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1)
    rest = nn.Sequential(net.layer2, net.layer3, net.layer4, net.avgpool, nn.Flatten(), net.fc)
    model_fn, params = lrp.from_module(rest)
    alone = lrp.attribute(model_fn, lrp.epsilon_plus())(params, start(IMAGE), target=3)
    assert largest_difference(of_layers(resnet18, "layer1")["layer1"], alone) <= 1e-12
