"""What a model function reads and leaves beside its arguments: numbers, settings, modules and objects of all kinds."""

from __future__ import annotations

import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import lrpfunc as lrp
from lrpfunc import _tree as tree
from tests.cases import normal

W, X = normal(4, 3), normal(2, 4, seed=1)


def value(model_fn: Callable[..., Any], *args: Any) -> Tensor:
    return lrp.attribute_and_value(model_fn, lrp.gradient())(*args, target=0)[1]


# -- numbers that are read out of tensors


def of_a_scalar(s: Tensor, w: Tensor, x: Tensor) -> Tensor:
    return x @ w * s.item()


def of_what_was_computed(s: Tensor, w: Tensor, x: Tensor) -> Tensor:
    steps = torch.arange(3)
    for _ in range(int(steps.sum() * s)):
        x = x * 1.5
    return x @ w


def of_a_branch(s: Tensor, w: Tensor, x: Tensor) -> Tensor:
    return x @ w if s > 2 else x @ w * 2


def of_what_was_written(s: Tensor, w: Tensor, x: Tensor) -> Tensor:
    steps = s.repeat(3)
    steps[1:] += 2
    row = steps[1]
    steps.mul_(2)
    return x @ w * float(row)


def of_lists_and_arrays(s: Tensor, w: Tensor, x: Tensor) -> Tensor:
    twice = s.repeat(2)
    return x @ w * sum(twice.tolist()) * float(twice.numpy().sum()) * (2.0 in twice)


def of_constants(s: Tensor, w: Tensor, x: Tensor) -> Tensor:
    return x @ w * torch.tensor(2.0).item() * torch.linspace(0, 1, 3).sum().item()


READS = [of_a_scalar, of_what_was_computed, of_a_branch, of_what_was_written, of_lists_and_arrays, of_constants]


@pytest.mark.parametrize("read", READS)
def test_numbers_in_constants_and_closed_over_tensors(read: Callable[..., Tensor], recordings: list[int]) -> None:
    s = torch.tensor(2.0, dtype=torch.float64)

    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        return read(s, w, x)

    for number in (2.0, 3.0, 2.0, 3.0):
        s.fill_(number)
        torch.testing.assert_close(value(model_fn, W, X), read(s, W, X), rtol=0, atol=0)
        assert s == number
    assert len(recordings) == (1 if read is of_constants else 2)  # one for each number
    vmapped = torch.vmap(lambda x: lrp.attribute(model_fn, lrp.gradient())(W, x[None], target=0))(X)
    torch.testing.assert_close(vmapped[:, 0], lrp.attribute(model_fn, lrp.gradient())(W, X, target=0))


def test_numbers_in_integer_arguments(recordings: list[int]) -> None:
    def model_fn(w: Tensor, x: Tensor, length: Tensor) -> Tensor:
        return x[:, : int(length)] @ w[: int(length)]

    relevance_fn = lrp.attribute(model_fn, lrp.epsilon())
    for length in (2, 3, 2, 3):
        relevance = relevance_fn(W, X, torch.tensor(length), target=0)
        assert [bool(r) for r in relevance.any(0)] == [i < length for i in range(4)]
    assert len(recordings) == 2


def test_compiled_code_holds_for_the_numbers_that_were_read() -> None:
    s = torch.tensor(2.0, dtype=torch.float64)
    relevance_fn = lrp.attribute(lambda w, x: x @ w * s.item(), lrp.gradient())
    compiled = torch.compile(lambda x: relevance_fn(W, x, target=0), fullgraph=True, backend="aot_eager")
    for number in (2.0, 3.0):
        s.fill_(number)
        torch.testing.assert_close(compiled(X), relevance_fn(W, X, target=0))


# fmt: off
def branches(w: Tensor, x: Tensor) -> Tensor:
    if x.sum() > 0: return x @ w  # noqa: E701
    return -x @ w
# fmt: on


def counts(w: Tensor, x: Tensor) -> Tensor:
    return x[:, : int(x.argmax())] @ w


LINES = {branches: "if x.sum() > 0: return x @ w", counts: "return x[:, : int(x.argmax())] @ w"}


@pytest.mark.parametrize("model_fn", LINES)
def test_an_unknown_number_names_the_line(model_fn: Callable[..., Tensor]) -> None:
    with pytest.raises(lrp.CaptureError, match=r"asks for a number inside a tensor of shape \(\)") as caught:
        lrp.attribute(model_fn, lrp.epsilon())(W, X, target=0)
    assert LINES[model_fn] in str(caught.value)
    assert f"{__file__}, line " in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


# -- torch's settings and logs


def test_a_first_call_under_detect_anomaly() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, that the mode is slow
        with torch.autograd.detect_anomaly():
            w = W.clone().requires_grad_()
            lrp.attribute(lambda w, x: (x @ w).relu(), lrp.epsilon(1.0))(w, X, target=0).sum().backward()
            assert torch.is_anomaly_enabled()
    assert w.grad is not None
    assert not torch.is_anomaly_enabled()


def test_recordings_are_silent_and_loggers_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = list(logger.filters), logger.level, logger.disabled, list(logger.handlers)
    with pytest.raises(RuntimeError, match="square matrices"):
        lrp.attribute(lambda w, x: torch.linalg.inv(x), lrp.epsilon())(W, X, target=0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (list(logger.filters), logger.level, logger.disabled, list(logger.handlers)) == before
    caplog.clear()
    logger.error("of somebody else")
    assert len(caplog.records) == 1


# -- what modules have as attributes


class NoLength(tuple[Any, ...]):
    def __len__(self) -> int:
        raise RuntimeError("not to be measured")


@pytest.mark.parametrize("make", [np.float32, np.int8, np.bool_, lambda k: NoLength((k, [NoLength((k,))]))])
def test_attributes_of_modules(make: Any, recordings: list[int]) -> None:
    class Scaled(nn.Linear):
        factor: Any

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(next(iter(self.factor)) if type(self.factor) is NoLength else self.factor)

    module = Scaled(4, 3, dtype=torch.float64)
    module.factor = make(1)
    model_fn, params = lrp.from_module(module)
    for _ in range(2):
        torch.testing.assert_close(value(model_fn, params, X), module(X))
    assert len(recordings) == 1
    module.factor = make(0)
    torch.testing.assert_close(value(model_fn, params, X), module(X))


@pytest.mark.parametrize("make", [fx.symbolic_trace, lambda m: torch.export.export(m, (X,)).module()])
def test_modules_made_from_graphs_are_recorded_once(make: Any, recordings: list[int]) -> None:
    module = make(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double())
    module(X)  # the first call of an exported module changes a setting in it
    graph, forward = module.graph, type(module).forward
    model_fn, params = lrp.from_module(module)
    for _ in range(3):
        torch.testing.assert_close(value(model_fn, params, X), module(X))
        value(lambda w, x: module(x), W, X)
    assert len(recordings) == 2
    assert module.graph is graph
    assert graph.owning_module is module
    assert type(module).forward is forward


# -- buffers


class Averaged(nn.Module):
    """Assigns a buffer where batch norms update theirs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 3, dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        self.calls = self.calls + 1
        return y - self.mean


def test_buffers_that_a_forward_pass_assigns(recordings: list[int]) -> None:
    module, plain = Averaged(), Averaged()
    plain.load_state_dict(module.state_dict())
    model_fn, params = lrp.from_module(module, return_buffers=True)
    relevance_fn = lrp.attribute(model_fn, lrp.epsilon(), has_aux=True)
    for step in range(3):
        plain(X + step)
        before = dict(params)
        _, buffers = relevance_fn(params, X + step, target=0)
        assert buffers.keys() == {"mean", "calls"}
        assert all(torch.equal(buffers[name], buffer) for name, buffer in plain.named_buffers())
        assert all(params[name] is before[name] for name in before)
        params |= buffers
    assert len(recordings) == 1
    assert not module.get_buffer("mean").any()


def test_a_plain_call_leaves_the_parameters_as_they_were() -> None:
    model_fn, params = lrp.from_module(Averaged())
    before = dict(params)
    model_fn(params, X)
    assert all(params[name] is before[name] for name in before)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(3), (7, 3)),
    "1d of sequences": (lambda: nn.BatchNorm1d(3), (6, 3, 5)),
    "2d": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 6)),
    "2d large": (lambda: nn.BatchNorm2d(3), (16, 3, 28, 28)),
    "3d": (lambda: nn.BatchNorm3d(3), (2, 3, 3, 4, 5)),
    "plain": (lambda: nn.BatchNorm2d(3, affine=False, momentum=0.3), (4, 3, 5, 6)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 5, 6)),
    "synchronized": (lambda: nn.SyncBatchNorm(3), (4, 3, 5, 6)),
    "instances 1d": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (4, 3, 5)),
    "instances 2d": (lambda: nn.InstanceNorm2d(3, track_running_stats=True, affine=True), (4, 3, 5, 6)),
    "instances 3d": (lambda: nn.InstanceNorm3d(3, track_running_stats=True), (2, 3, 3, 4, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NORMS)
def test_running_statistics_are_those_of_plain_training_to_the_bit(name: str, dtype: torch.dtype) -> None:
    make, shape = NORMS[name]
    module, plain = make().to(dtype), make().to(dtype)
    model_fn, params = lrp.from_module(module, return_buffers=True)
    forward = lrp.attribute_and_value(model_fn, lrp.gradient(), has_aux=True)

    def loss(floats: dict[str, Tensor], params: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        relevance, (output, buffers) = forward(params | floats, x, target=lambda output: output)
        return (relevance.square().sum() + output.square().sum()), buffers

    trained = dict(params)
    for step in range(5):
        x = normal(*shape, seed=step).to(dtype) * (step + 0.5) + step
        expected = plain(x)
        _, (output, buffers) = forward(params, x, target=lambda output: output)
        assert torch.equal(output, expected)
        floats = {key: t for key, t in trained.items() if t.is_floating_point()}
        _, differentiated = torch.func.grad(loss, has_aux=True)(floats, trained, x)
        for key, buffer in plain.named_buffers():
            assert torch.equal(buffers[key], buffer)
            assert torch.equal(differentiated[key], buffer)
        params |= buffers
        trained |= differentiated


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_running_statistics_under_transforms(norm: Any) -> None:
    module = norm(3, track_running_stats=True, dtype=torch.float64)
    model_fn, params = lrp.from_module(module, return_buffers=True)
    relevance_fn = lrp.attribute(model_fn, lrp.gradient(), has_aux=True)
    x = normal(2, 4, 3, 5)

    def buffers(params: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return relevance_fn(params, x, target=lambda output: output)[1]

    mapped = torch.vmap(buffers, (None, 0))(params, x)
    for index in range(2):
        one = buffers(params, x[index])
        torch.testing.assert_close({key: b[index] for key, b in mapped.items()}, one, rtol=1e-12, atol=1e-12)
    slope = torch.func.grad(lambda mean: buffers({**params, "running_mean": mean}, x[0])["running_mean"].sum())
    torch.testing.assert_close(slope(params["running_mean"]), torch.full((3,), 0.9, dtype=torch.float64))


def test_a_cumulative_average_without_its_buffers_is_refused_in_words() -> None:
    model_fn, params = lrp.from_module(nn.BatchNorm1d(3, momentum=None, dtype=torch.float64))
    with pytest.raises(lrp.CaptureError, match="return_buffers=True"):
        lrp.attribute(model_fn, lrp.gradient())(params, normal(5, 3), target=0)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_in_training(wrap: Any, recordings: list[int]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(wrap(nn.Linear(4, 3)), nn.ReLU(), wrap(nn.Linear(3, 2))).double()
    torch.manual_seed(0)
    plain = nn.Sequential(wrap(nn.Linear(4, 3)), nn.ReLU(), wrap(nn.Linear(3, 2))).double()
    model_fn, params = lrp.from_module(module, return_buffers=True)
    forward = lrp.attribute_and_value(model_fn, lrp.gradient(), has_aux=True)
    for step in range(3):
        x = (X + step).requires_grad_()
        expected = plain(x)
        (gradient,) = torch.autograd.grad(expected.sum(), x)
        relevance, (output, buffers) = forward(params, x.detach(), target=lambda output: torch.ones_like(output))
        assert torch.equal(output, expected)
        torch.testing.assert_close(relevance, gradient)
        assert all(torch.equal(buffers[name], buffer) for name, buffer in plain.named_buffers())
        params |= buffers
    assert len(recordings) == 1


# -- objects that a model function is given


@dataclass
class Keys:
    """A cache of the user's own."""

    count: int = 0
    kept: list[Tensor] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)
    last: Any = None


def remembers(w: Tensor, x: Tensor, cache: Any) -> Tensor:
    if isinstance(cache, Keys):
        cache.kept.append(x @ w)
        cache.names |= {"last": cache.kept[-1], str(cache.count): 1}
        cache.count += 1
        cache.last = cache.names.pop("first", None)
        kept = cache.kept
    elif isinstance(cache, dict):
        cache["kept"] = kept = [*cache["kept"], x @ w]
    else:
        cache.append(x @ w)
        kept = cache
    return torch.stack(kept).sum(0).sigmoid()


def keys(kept: list[Tensor]) -> Keys:
    return Keys(1, kept, {"first": 1, "second": 2})


@pytest.mark.parametrize("make", [list, lambda kept: {"kept": kept}, keys])
def test_objects_that_are_given_come_back_unchanged(make: Any, recordings: list[int]) -> None:
    constant = normal(2, 3, seed=5)
    cache = make([constant])
    relevance_fn = lrp.attribute(remembers, lrp.gradient())
    plain_fn = lrp.attribute(lambda w, x: (x @ w + constant).sigmoid(), lrp.gradient())
    for _ in range(3):
        printed = repr(cache)
        torch.testing.assert_close(relevance_fn(W, X, cache, target=1), plain_fn(W, X, target=1))
        assert repr(cache) == printed
        constant += 1  # what is in it is read anew
    assert len(recordings) <= 2  # the plain function is recorded once for all


def test_tensors_in_objects_that_are_given_are_changed_for_the_function_alone() -> None:
    def model_fn(w: Tensor, x: Tensor, cache: Keys) -> Tensor:
        cache.kept[0][0] += x[0] @ w
        cache.kept[0].mul_(2)
        return cache.kept[0] * x.sum()

    def plain(w: Tensor, x: Tensor, kept: Tensor) -> Tensor:
        return 2 * torch.stack([kept[0] + x[0] @ w, kept[1]]) * x.sum()

    kept = normal(2, 3, seed=5)
    cache = Keys(kept=[kept.clone()])
    for _ in range(2):
        found = lrp.attribute_and_value(model_fn, lrp.gradient())(W, X, cache, target=1)
        torch.testing.assert_close(found, lrp.attribute_and_value(plain, lrp.gradient())(W, X, kept, target=1))
        assert torch.equal(cache.kept[0], kept)
    with pytest.raises(lrp.CaptureError, match=r"changes in place a tensor of shape \(2, 4\) that it was given"):
        lrp.attribute(lambda w, x, y: (x @ w, y.add_(1))[0], lrp.gradient())(W, X, X.clone(), target=1)


def llama() -> tuple[nn.Module, str]:
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config), "model.embed_tokens"


def gpt2() -> tuple[nn.Module, str]:
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config), "transformer.wte"


def prefilled(module: nn.Module, cache: Any, tokens: Tensor) -> Any:
    with torch.no_grad():
        module(tokens, past_key_values=cache, use_cache=True)
    return cache


def contents(cache: Any) -> list[Any]:
    return [[getattr(layer, name, None) for name in ("keys", "values", "is_initialized")] for layer in cache.layers]


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [llama, pytest.param(gpt2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["dynamic", pytest.param("made for the model", marks=pytest.mark.slow), "static"])
def test_generation_step_by_step_over_a_cache(make: Any, kind: str) -> None:
    torch.manual_seed(0)
    module, embedding = make()
    module = module.double().eval()

    def new_cache() -> Any:
        if kind == "static":
            return transformers.StaticCache(config=module.config, max_cache_len=8)
        return transformers.DynamicCache(**({"config": module.config} if kind == "made for the model" else {}))

    model_fn, params = lrp.from_module(module, output=lambda out: out.logits[:, -1])
    relevance_fn = lrp.attribute_and_value(model_fn, lrp.attn_lrp(), layers=embedding)

    # A plain function, which makes a cache of its own out of what it takes as constants.
    def plain(params: dict[str, Tensor], token: Tensor, past: list[list[Tensor]]) -> Tensor:
        cache = transformers.DynamicCache()
        for place, (key, value) in enumerate(past):
            cache.update(key.detach(), value.detach(), place)
        return model_fn(params, token, past_key_values=cache, use_cache=True)

    plain_fn = lrp.attribute_and_value(plain, lrp.attn_lrp(), layers=embedding)
    cache = new_cache()
    tokens, past = torch.tensor([[1, 2, 3]]), []
    for _ in range(3):
        before = tree.map(lambda t: t.clone() if isinstance(t, Tensor) else t, contents(cache))
        (_, relevance), logits = relevance_fn(params, tokens, past_key_values=cache, use_cache=True, target=4)
        after = contents(cache)
        assert all(
            torch.equal(a, b) if isinstance(a, Tensor) else a is b
            for a, b in zip(tree.leaves(before), tree.leaves(after), strict=True)
        )
        (_, expected), expected_logits = plain_fn(params, tokens, past, target=4)
        torch.testing.assert_close(relevance, expected, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(logits, expected_logits, rtol=1e-10, atol=1e-14)
        prefilled(module, cache, tokens)  # the caller goes on
        reached = int(cache.get_seq_length())
        past = [[keys[:, :, :reached], values[:, :, :reached]] for keys, values, _ in contents(cache)]
        tokens = logits.argmax(-1, keepdim=True)
    assert reached == 5


# -- what a trace leaves where Python does not see it


class Counting(nn.Module):
    """Assigns to a buffer, a number, a list and a dictionary."""

    __annotations__ = {"log": list[Tensor], "named": dict[str, Tensor], "last": Optional[Tensor]}  # noqa: UP045 (TorchScript)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(3, dtype=torch.float64))
        self.log, self.named, self.last, self.count = [], {}, None, 0

    def forward(self, y: Tensor) -> Tensor:
        self.state = self.state * 0.9 + y.detach().mean(0)
        self.log.append(y)
        self.named["last"] = y
        self.last = y
        self.count += 1
        return y + self.state


def found_in(module: Any) -> list[Any]:
    return [module.state, module.log, module.named, module.last, module.count]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_scripted_modules_are_put_back() -> None:
    module = torch.jit.script(nn.Sequential(nn.Linear(4, 3, dtype=torch.float64), Counting()))
    relevance_fn = lrp.attribute_and_value(lambda x: module(x), lrp.gradient(), argnums=0)
    counting = dict(module.named_children())["1"]
    for step in range(3):
        before = found_in(counting)
        _, output = relevance_fn(X, target=0)
        assert all(a is b or a == b for a, b in zip(found_in(counting), before, strict=True))
        expected = module(X)  # which goes on from there
        assert type(expected) is Tensor
        assert torch.equal(output, expected)
        assert counting.count == step + 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_scripted_modules_are_put_back_after_an_error() -> None:
    module = torch.jit.script(nn.Sequential(Counting(), nn.BatchNorm1d(3, dtype=torch.float64)))
    with pytest.raises(lrp.CaptureError, match="changes in place"):  # the statistics
        lrp.attribute(lambda x: module(x), lrp.gradient(), argnums=0)(normal(5, 3), target=0)
    norm = dict(module.named_children())["1"]
    assert norm.num_batches_tracked == 0
    assert dict(module.named_children())["0"].count == 0
    assert type(module(normal(5, 3))) is Tensor


def test_what_stays_where_nobody_looks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = types.ModuleType("hidden_state")
    vars(hidden)["kept"] = {}
    monkeypatch.setitem(sys.modules, "hidden_state", hidden)

    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        importlib.import_module("hidden_" + "state").kept["last"] = y = x @ w
        return y * 1.0

    with pytest.raises(lrp.CaptureError, match=r"keeps a tensor that it computed, in `hidden_state.kept\['last'\]`"):
        lrp.attribute(model_fn, lrp.gradient())(W, X, target=0)


# -- subclasses of tensors


class Plain(Tensor):
    """Has a name of its own, and nothing else."""


class Doubling(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) else result


def test_tensors_that_do_otherwise_are_refused_by_name() -> None:
    doubled = X.as_subclass(Doubling)
    with pytest.raises(lrp.InputError, match=r"test_state\.Doubling says by its own `__torch_function__`"):
        lrp.attribute(lambda w, x: x @ w, lrp.gradient())(W, doubled, target=0)
    with pytest.raises(lrp.InputError, match=r"test_state\.Doubling says by its own `__torch_function__`"):
        lrp.attribute(lambda w, x: (x * doubled) @ w, lrp.gradient())(W, X, target=0)
    for x in (X.as_subclass(Plain), nn.Parameter(X), nn.Buffer(X)):
        assert torch.equal(value(lambda w, x: x @ w, W, x), X @ W)


# -- sparse tensors


@pytest.mark.parametrize("product", [torch.sparse.mm, torch.mm, lambda a, x: a @ x])
@pytest.mark.parametrize("lowered", [True, False])
def test_closed_over_sparse_tensors(product: Any, lowered: bool, recordings: list[int]) -> None:
    dense = torch.tensor([[0.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    adjacency = dense.to_sparse()

    def propagated(w: Tensor, x: Tensor) -> Tensor:
        return product(adjacency, x).relu() @ w

    relevance_fn = lrp.attribute_and_value(propagated, lrp.epsilon(), lowered=lowered)
    plain_fn = lrp.attribute_and_value(lambda w, x: (dense @ x).relu() @ w, lrp.epsilon(), lowered=lowered)
    for _ in range(2):
        torch.testing.assert_close(relevance_fn(W, X, target=1), plain_fn(W, X, target=1))
        assert torch.equal(relevance_fn(W, X, target=1)[1], propagated(W, X))
    assert len(recordings) <= 2
    adjacency.values().mul_(3)  # is read anew
    dense.mul_(3)
    torch.testing.assert_close(relevance_fn(W, X, target=1), plain_fn(W, X, target=1))
    adjacency = (2 * dense).to_sparse()
    dense.mul_(2)
    torch.testing.assert_close(relevance_fn(W, X, target=1), plain_fn(W, X, target=1))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_other_sparse_layouts_are_refused_in_words() -> None:
    adjacency = torch.eye(2, dtype=torch.float64).to_sparse_csr()
    with pytest.raises(lrp.CaptureError, match=r"layout torch.sparse_csr.*\n?.*to_sparse_coo\(\)"):
        lrp.attribute(lambda w, x: adjacency @ x @ w, lrp.epsilon())(W, X, target=0)


# -- nothing under vmap


def test_targets_are_mapped_over_where_the_input_is_integers() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).double()
    model_fn, params = lrp.from_module(model)
    ids = torch.tensor([[1, 2], [3, 4]])
    relevance_fn = lrp.attribute(lambda p, t: model_fn(p, t).sum(1), lrp.epsilon(), layers="0")
    targets = torch.arange(3)
    mapped = torch.vmap(lambda t: relevance_fn(params, ids, target=t))(targets)
    nested = torch.vmap(torch.vmap(lambda t: relevance_fn(params, ids, target=t)))(targets[None])
    inside = torch.vmap(
        lambda t: torch.func.grad(
            lambda p: (relevance_fn(p, ids, target=t)[1]["0"].sum(), relevance_fn(p, ids, target=t)), has_aux=True
        )(params)[1]
    )(targets)
    assert mapped[0] is nested[0] is inside[0] is None
    for target in range(3):
        nothing, expected = relevance_fn(params, ids, target=target)
        assert nothing is None
        torch.testing.assert_close(mapped[1]["0"][target], expected["0"])
        torch.testing.assert_close(nested[1]["0"][0, target], expected["0"])
        torch.testing.assert_close(inside[1]["0"][target], expected["0"])
