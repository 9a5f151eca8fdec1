"""One clear error at the call: the value, the reason, the line to write. Nothing is changed by it."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import lrpfunc as lrp
from tests.cases import MODELS, Residual, normal, randomized

W, X = normal(3, 4), normal(2, 3, seed=1)


def linear(w: Tensor, x: Tensor) -> Tensor:
    return x @ w


def test_uncovered_layers_are_listed_with_the_line_to_write() -> None:
    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        return torch.softmax(F.layer_norm(x @ w, (4,)), -1)

    with pytest.raises(lrp.UncoveredLayerError, match="2 layers are not linear") as info:
        lrp.attribute(model_fn, lrp.epsilon())(W, X, target=0)
    assert str(info.value) == (
        "2 layers are not linear and no rule covers them:\n\n"
        "    layer_norm   layer_norm   (2, 4) -> (2, 4)\n"
        "    softmax      softmax      (2, 4) -> (2, 4)\n\n"
        "Relevance would be lost or invented there. Add rules in front of yours, for example\n\n"
        "    rules = lrp.attn_lrp() + rules\n\n"
        "The last, softmax, is the output. Explain its logits instead, which say what speaks for a class and not only "
        "how sure the model is. Let the model function return them:\n\n"
        "    return logits  # not logits.softmax(-1)"
    )
    rules = lrp.attn_lrp() + lrp.epsilon()
    assert lrp.attribute(model_fn, rules)(W, X, target=0).shape == X.shape


@pytest.mark.parametrize(
    ("f", "line"),
    [
        (lambda w, x: torch.relu(x), r"rules = \[\(lrp.Activation, lrp.Pass\(\)\)\] \+ rules"),
        (lambda w, x: x * x, r"rules = \[\(lrp.Activation, lrp.Pass\(\)\)\] \+ rules"),
        (lambda w, x: x.exp(), r"rules = \[\(lrp.Activation, lrp.Pass\(\)\)\] \+ rules"),
        (lambda w, x: x @ x.T, r"rules = lrp.attn_lrp\(\) \+ rules"),
        (lambda w, x: x / x.sum(), r"rules = lrp.attn_lrp\(\) \+ rules"),
        (lambda w, x: torch.addcmul(w[:2, :3], x, x), r"rules = lrp.attn_lrp\(\) \+ rules"),
        (
            lambda w, x: torch.fft.rfft(x).real,
            r"rules = \[\(lrp.operation\('fft_rfft'\), lrp.Gradient\(\)\), .*\] \+ rules",
        ),
        (
            lambda w, x: torch.linalg.eigh(x @ x.T)[1][:, :1] + x.softmax(0),
            r"rules = \[.*'linalg_eigh'.*\] \+ lrp.attn_lrp\(\) \+ rules",
        ),
        (lambda w, x: (x * 1).scatter(0, torch.zeros(1, 3).long(), x, reduce="add"), r"operation\('scatter'\)"),
        (lambda w, x: F.cosine_similarity(x, x * 2), "not linear"),
    ],
)
def test_the_suggested_line_fits_the_layer(f: Any, line: str) -> None:
    with pytest.raises(lrp.UncoveredLayerError, match=line):
        lrp.attribute(f, [])(W, X)


def test_rule_on_a_layer_it_cannot_serve() -> None:
    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        return torch.relu(x @ w).mean(-1, keepdim=True)

    with pytest.raises(lrp.RuleError, match=r"1 layer .*\n\n    relu   relu   .*\n.*Epsilon.* this one is not linear"):
        lrp.attribute(model_fn, [(lrp.Activation, lrp.Epsilon())])(W, X)
    with pytest.raises(lrp.RuleError, match="ZPlus modifies weights, which only dense layers and convolutions have"):
        lrp.attribute(model_fn, [(lrp.AvgPool, lrp.ZPlus()), *lrp.epsilon()])(W, X)
    with pytest.raises(lrp.RuleError, match="Pass serves layers that act on each element of one input by itself"):
        lrp.attribute(model_fn, [(lrp.Dense, lrp.Pass()), *lrp.epsilon()])(W, X)
    with pytest.raises(lrp.RuleError, match="2 layers cannot be served"):
        lrp.attribute(model_fn, [(lambda layer: True, lrp.WSquare())])(W, X)


def test_bounds_of_the_box() -> None:
    conv = lambda w, x: F.conv2d(x, w)  # noqa: E731
    w, x = normal(4, 3, 2, 2), normal(2, 3, 5, 5)
    with pytest.raises(
        lrp.RuleError, match=r"`low` has shape \(3,\).*give it shape \(3, 1, 1\): low.reshape\(-1, 1, 1\)"
    ):
        lrp.attribute(conv, [(lrp.Convolution, lrp.ZBox(-torch.ones(3), 1.0))])(w, x)
    with pytest.raises(lrp.RuleError, match=r"`high` of shape \(4, 1, 1\) does not broadcast .* \(2, 3, 5, 5\)"):
        lrp.attribute(conv, [(lrp.Convolution, lrp.ZBox(-1.0, torch.ones(4, 1, 1)))])(w, x)
    assert lrp.attribute(conv, [(lrp.Convolution, lrp.ZBox(-torch.ones(3, 1, 1), 1.0))])(w, x).shape == x.shape


def test_hyperparameters_that_do_not_fit() -> None:
    with pytest.raises(lrp.RuleError, match=r"AlphaBeta\(alpha=2.0, beta=0.5\) has alpha - beta = 1.5"):
        lrp.AlphaBeta(2.0, 0.5)
    with pytest.raises(lrp.RuleError, match="must not be negative"):
        lrp.AlphaBeta(0.5, -0.5)
    assert lrp.AlphaBeta(1.4, 0.4).alpha == 1.4
    with pytest.raises(ValueError, match="zero_params names 'weight' or 'bias', not 'biases'"):
        lrp.Epsilon(zero_params="biases")
    with pytest.raises(TypeError, match=r"pairs \(selector, rule\), not of"):
        lrp.Composite([lrp.Epsilon()])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"rules must say which layers Epsilon\(epsilon=1e-06"):
        lrp.attribute(linear, lrp.Epsilon())  # type: ignore[arg-type]


TARGETS: dict[str, tuple[Any, str]] = {
    "too_large": (4, r"target=4 is out of range for an output of shape \(2, 4\) with 4 classes: use .* -4 to 3"),
    "too_small": (-5, "target=-5 is out of range"),
    "tensor_too_large": (torch.tensor([0, 4]), r"index out of range for an output of shape \(2, 4\) with 4 classes"),
    "tensor_too_small": (torch.tensor(-5), "index out of range"),
    "batch": (
        torch.tensor([0, 1, 2]),
        r"target has shape \(3,\), but .* \(2, 4\) takes a single index or one a sample",
    ),
    "shape": (torch.ones(4), r"starting relevance has shape \(4,\), the output \(2, 4\)"),
    "device": (torch.ones(2, 4, device="meta"), "starting relevance is on meta, the output on cpu"),
    "value": (lrp.one_hot(1, torch.ones(4)), r"value has shape \(4,\), but .* \(2, 4\) takes .* one a sample"),
    "structure": (lambda out: (out, out), "starting relevance has the structure"),
    "type": ("cat", "must be a floating-point tensor, not 'cat'"),
    "callable_type": (lambda out: out > 0, "an index must be an integer, not a tensor of torch.bool"),
    "callable_out_of_range": (lambda out: out.argmax(-1) + 4, "index out of range"),
    "float_index": (lrp.one_hot(torch.tensor(1.7)), "an index must be an integer, not a tensor of torch.float32"),
    "bool_index": (torch.tensor(True), "an index must be an integer, not a tensor of torch.bool"),
    "contrast": (lrp.contrast(1, 9), "target=9 is out of range"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str) -> None:
    target, message = TARGETS[name]
    with pytest.raises(lrp.TargetError, match=message):
        lrp.attribute(linear, lrp.epsilon())(W, X, target=target)


def test_rules_that_are_none() -> None:
    with pytest.raises(TypeError, match=r"write epsilon_plus\(...\)"):
        lrp.attribute(linear, lrp.epsilon_plus)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unsupported operand"):
        lrp.epsilon() + None  # type: ignore[operator]


def test_integer_targets_need_a_vector_or_a_matrix() -> None:
    fn = lrp.attribute(lambda w, x: (x @ w).reshape(2, 2, 2), lrp.epsilon())
    with pytest.raises(lrp.TargetError, match=r"target=1 indexes the last axis .* shape \(2, 2, 2\)\. For one"):
        fn(W, X, target=1)
    pair = lrp.attribute(lambda w, x: {"a": x @ w, "b": x}, lrp.epsilon())
    with pytest.raises(lrp.TargetError, match=r"2 leaves, of shapes \[\(2, 4\), \(2, 3\)\]"):
        pair(W, X, target=1)


def test_what_is_explained_must_be_floating_point() -> None:
    with pytest.raises(lrp.InputError, match=r"argument 1: it is a tensor of torch.int64.*write x.float\(\).*layers="):
        lrp.attribute(lambda w, x: F.embedding(x, w))(W, torch.tensor([1, 2]))
    conv = lambda w, x: F.conv2d(x, w)  # noqa: E731
    with pytest.raises(lrp.InputError, match=r"it is a tensor of torch.uint8"):
        lrp.attribute(conv)(normal(4, 3, 2, 2), torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(lrp.InputError, match=r"it is a tensor of torch.complex64"):
        lrp.attribute(lambda w, x: x.real)(W, torch.ones(2, dtype=torch.complex64))
    with pytest.raises(lrp.InputError, match=r"argument 1 at `b`: it is 3, which is no tensor"):
        lrp.attribute(lambda w, x: x["a"] * x["b"])(W, {"a": X, "b": 3})
    with pytest.raises(lrp.InputError, match=r"argnums=1 names argument 1, but .* 1 positional"):
        lrp.attribute(lambda x: x)(X)


def test_the_output_must_be_floating_point_tensors() -> None:
    with pytest.raises(lrp.InputError, match=r"the output has a tensor of torch.int64 and shape \(2,\)"):
        lrp.attribute(lambda w, x: (x @ w).argmax(-1))(W, X)

    @dataclasses.dataclass
    class Output:
        logits: Tensor

    with pytest.raises(lrp.InputError, match=r"(?s)the output is Output.*output=lambda out: out.logits"):
        lrp.attribute(lambda w, x: Output(x @ w))(W, X)
    with pytest.raises(TypeError, match=r"with has_aux=True .* pair \(output, aux\), not Tensor"):
        lrp.attribute(linear, has_aux=True)(W, X)
    with pytest.raises(lrp.InputError, match=r"model_fn must be a function .* not int"):
        lrp.attribute(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"from_module takes a torch.nn.Module, not function"):
        lrp.from_module(linear)  # type: ignore[arg-type]


@pytest.mark.parametrize("f", [lambda w, x: w * 2, lambda w, x: x.detach() @ w, lambda w, x: (x > 0).double()])
def test_no_path_from_the_input(f: Any) -> None:
    with pytest.raises(lrp.NoPathError, match="the output does not depend on what should be explained"):
        lrp.attribute(f, lrp.epsilon())(W, X)


@pytest.mark.parametrize("f", [lambda z: z.softmax(-1), lambda z: -z.log_softmax(-1), lambda z: z.softmax(-1)[:, 1:]])
def test_an_output_that_the_rules_hold_constant(f: Any) -> None:
    """Relevance of zero everywhere explains nothing; another output may still have some."""
    message = r"(?s)the output is a softmax.*softmax   .*Explain the logits.*\[\(lrp.Softmax, lrp.TaylorSoftmax\(\)\)\]"
    with pytest.raises(lrp.NoPathError, match=message):
        lrp.attribute(lambda w, x: f(x @ w), lrp.cp_lrp())(W, X)
    for model_fn in (lambda w, x: (x @ w, f(x @ w)), lambda w, x: f(x @ w) * x[:, :1]):
        assert lrp.attribute(model_fn, lrp.cp_lrp())(W, X).abs().max() > 0
    covered = [(lrp.Softmax, lrp.TaylorSoftmax()), *lrp.cp_lrp()]
    assert lrp.attribute(lambda w, x: f(x @ w), covered)(W, X).abs().max() > 0


def test_relevance_that_starts_at_a_softmax() -> None:
    with pytest.warns(lrp.RelevanceWarning, match=r"(?s)starts at a softmax.*return logits  # not logits.softmax"):
        lrp.attribute(lambda w, x: (x @ w).softmax(-1), lrp.attn_lrp())(W, X[:1], target=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rules in (lrp.gradient(), lrp.attn_lrp()):  # the second has been told
            lrp.attribute(lambda w, x: (x @ w).softmax(-1), rules)(W, X[:1], target=0)


@pytest.mark.parametrize("network", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(network: Any) -> None:
    rnn = randomized(network(3, 2, batch_first=True))
    lengths, x = torch.tensor([4, 2]), normal(2, 4, 3)

    def packed(_: Any, x: Tensor) -> Tensor:
        _, last = rnn(pack_padded_sequence(x, lengths, batch_first=True))
        return (last[0] if isinstance(last, tuple) else last)[-1]

    def padded(_: Any, x: Tensor) -> Tensor:
        states, _ = rnn(x)
        return states[torch.arange(len(x)), lengths - 1]

    with pytest.raises(lrp.CaptureError, match=r"packs sequences .*\n\n    states, _ = rnn\(x\) .*\n.*lengths - 1\]"):
        lrp.attribute(packed)(None, x)
    relevance, value = lrp.attribute_and_value(padded)(None, x)
    assert torch.allclose(value, packed(None, x))
    assert relevance[1, 2:].abs().max() == 0 < relevance[1, 1].abs().max()


def test_data_where_parameters_are_expected() -> None:
    def two_inputs(x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(F.linear(x, W)) + F.linear(y, W)

    x, y = normal(2, 4), normal(2, 4, seed=1)
    for argnums in (0, (0, 1)):
        with pytest.raises(lrp.InputError, match=r"(?s)argument 0 is taken to be parameters.*argnums=\(1, 2\)"):
            lrp.attribute(two_inputs, lrp.epsilon(), argnums=argnums)(x, y)
    first, second = lrp.attribute(lambda _, x, y: two_inputs(x, y), lrp.epsilon(), argnums=(1, 2))(None, x, y)
    assert first.shape == second.shape == x.shape


def test_layers_that_match_nothing() -> None:
    case = MODELS["residual"]()
    with pytest.raises(lrp.LayerNotFoundError, match=r"layers='conv3' matches no layer .* The names are conv1, bn1"):
        lrp.attribute(case.model_fn, layers="conv3")(case.params, case.x)
    with pytest.raises(lrp.LayerNotFoundError, match="layers='nothing'"):
        lrp.attribute(case.model_fn, layers=["conv1", "nothing"])(case.params, case.x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def test_custom_autograd_functions() -> None:
    with pytest.raises(lrp.CaptureError, match=r"(?s)custom autograd.Function Doubled.*inline_functions=True"):
        lrp.attribute(lambda w, x: Doubled.apply(x @ w))(W, X)
    with pytest.raises(lrp.CaptureError, match="Doubled"):
        lrp.attribute(lambda w, x: x @ Doubled.apply(w))(W, X)
    with pytest.raises(lrp.CaptureError, match="Doubled"):
        lrp.attribute(lambda w, x: sum(map(Doubled.apply, [x @ w])))(W, X)
    relevance = lrp.attribute(lambda w, x: Doubled.apply(x @ w), lrp.epsilon(0.0), inline_functions=True)(W, X)
    assert torch.allclose(relevance.sum(), 2 * (X @ W).sum())


def test_custom_autograd_functions_that_do_nothing_forward() -> None:
    class Reversed(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return -grads[0]

    with pytest.raises(lrp.CaptureError, match="Reversed"):
        lrp.attribute(lambda w, x: Reversed.apply(x @ w))(W, X)


def test_custom_autograd_functions_made_while_the_model_runs() -> None:
    def model_fn(w: Tensor, x: Tensor) -> Any:
        class Late(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return 2 * x

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Tensor:
                return grads[0]

        return Late.apply(x @ w)

    with pytest.raises(lrp.CaptureError, match="Late"):
        lrp.attribute(model_fn)(W, X)


def test_custom_autograd_functions_beside_a_debugger() -> None:
    threading.settrace(lambda *_: None)
    try:
        with pytest.raises(lrp.CaptureError, match="Doubled"):
            lrp.attribute(lambda w, x: Doubled.apply(x @ w))(W, X)
    finally:
        threading.settrace(None)  # type: ignore[arg-type]


def test_checkpoints() -> None:
    checkpointed = lambda w, x: checkpoint(linear, w, x, use_reentrant=False)  # noqa: E731
    assert lrp.attribute(checkpointed, lrp.epsilon())(W, X).shape == X.shape
    with pytest.raises(lrp.CaptureError, match=r"reentrant form.*checkpoint\(..., use_reentrant=False\)"):
        lrp.attribute(lambda w, x: checkpoint(linear, w, x.clone().requires_grad_(), use_reentrant=True))(W, X)


def test_a_closure_over_a_transformed_tensor() -> None:
    message = r"closes over `scale`, a tensor of shape \(\) that an outer vmap, grad or jvp transforms"
    with pytest.raises(lrp.CaptureError, match=message):
        vmap(lambda scale: lrp.attribute(lambda w, x: x @ w * scale)(W, X))(torch.ones(3))
    with pytest.raises(lrp.CaptureError, match=message):
        grad(lambda scale: lrp.attribute(lambda w, x: x @ w * scale)(W, X).sum())(torch.ones(()))


def test_mutation_of_arguments() -> None:
    module = randomized(Residual()).train()
    model_fn, params = lrp.from_module(module)
    before = {n: p.clone() for n, p in module.state_dict().items()}
    with pytest.raises(lrp.CaptureError, match=r"(?s)in the module `bn1`.*from_module\(module, return_buffers=True\)"):
        lrp.attribute(model_fn)(params, normal(2, 2, 6, 6))
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())
    x = X.clone()
    with pytest.raises(
        lrp.CaptureError, match=r"(?s)changes in place a tensor of shape \(2, 3\) that it was given.*x = x \+ 1"
    ):
        lrp.attribute(lambda w, x: x.add_(1) @ w)(W, x)
    with pytest.raises(lrp.CaptureError, match="that it was given"):
        lrp.attribute(lambda w, x: x.view(-1).relu_().reshape(2, 3) @ w)(W, x)
    assert torch.equal(x, X)
    counter = torch.zeros(())
    with pytest.raises(lrp.CaptureError, match=r"of shape \(\) that it closes over"):
        lrp.attribute(lambda w, x: x @ w * counter.add_(1))(W, X)
    assert counter == 0


def test_control_flow_on_values() -> None:
    with pytest.raises(lrp.CaptureError, match=r"Python control flow that depends on the numbers inside a tensor"):
        lrp.attribute(lambda w, x: x if x.sum() > 0 else -x)(W, X)


def test_errors_of_the_model_come_through() -> None:
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|size|same reduction dim"):
        lrp.attribute(linear)(W.T, X)
    with pytest.raises(ZeroDivisionError, match="division"):
        lrp.attribute(lambda w, x: x / (1 // 0))(W, X)


def test_explain_needs_numbers() -> None:
    fn = lrp.explain(linear, lrp.epsilon())
    with pytest.raises(lrp.CaptureError, match=r"explain prints numbers.*attribute\(model_fn, rules, layers='\*'\)"):
        vmap(lambda x: fn(W, x[None]))(X)
    with pytest.raises(lrp.CaptureError, match="explain prints numbers"):
        vmap(lambda e: lrp.explain(linear, lrp.epsilon(e))(W, X).start)(torch.ones(2))


def test_a_raised_call_leaves_the_module_alone() -> None:
    module = randomized(Residual())
    model_fn, params = lrp.from_module(module)
    objects, bits = list(module.parameters()), {n: p.clone() for n, p in module.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    uncovered, out_of_range, unfit = "no rule covers", "target=99 is out of range", "cannot be served by the rule"
    for rules, target, message in (
        ([], 0, uncovered),
        (lrp.epsilon(), 99, out_of_range),
        ([(lrp.Sum, lrp.ZPlus())], 0, unfit),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            lrp.attribute(model_fn, rules)(params, normal(2, 2, 6, 6), target=target)
    assert all(a is b for a, b in zip(objects, module.parameters(), strict=True))
    assert all(torch.equal(p, bits[n]) for n, p in module.state_dict().items())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    assert not module.training
    assert all(p.grad is None for p in module.parameters())
    assert isinstance(module, nn.Module)
