"""The grammar of the transform: arguments, targets, layers, auxiliary outputs, buffers."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

import lrpfunc as lrp
from tests.cases import COMPOSITES, MODELS, Residual, normal, randomized
from tests.oracles import largest_difference

W, X = normal(3, 4), normal(2, 3, seed=1)


def linear(w: Tensor, x: Tensor) -> Tensor:
    return x @ w


class TestTargets:
    fn = staticmethod(lrp.attribute(linear, lrp.epsilon(0.0)))

    def start(self, target: Any) -> Tensor:
        """The starting relevance, which an identity layer hands back."""
        return lrp.attribute(linear, lrp.epsilon(0.0))(torch.eye(4).double(), X @ W, target=target)

    def test_integers_start_with_the_logit(self) -> None:
        out = X @ W
        expected = torch.zeros_like(out)
        expected[:, 2] = out[:, 2]
        for target in (2, -2, torch.tensor(2), torch.tensor(-2), torch.tensor([2, 2]), torch.tensor([-2, 2])):
            assert torch.equal(self.start(target), expected)
        expected[1] = 0
        expected[1, 0] = out[1, 0]
        assert torch.equal(self.start(torch.tensor([2, 0], dtype=torch.int32)), expected)

    def test_none_starts_with_the_output(self) -> None:
        assert torch.allclose(self.start(None), X @ W)

    def test_tensors_and_callables_are_the_relevance(self) -> None:
        relevance = normal(2, 4, seed=3)
        assert torch.allclose(self.start(relevance), relevance)
        assert torch.allclose(self.start(lambda out: out.softmax(-1)), (X @ W).softmax(-1))

    def test_contrast_and_one_hot(self) -> None:
        out = X @ W
        contrast = self.start(lrp.contrast(1, 3))
        assert torch.equal(contrast, torch.stack([0 * out[:, 0], out[:, 1], 0 * out[:, 0], -out[:, 3]], 1))
        assert torch.equal(contrast, lrp.contrast(1, -1)(out))
        assert torch.allclose(self.start(lrp.one_hot(1, value=2.0)), torch.tensor([0.0, 2, 0, 0]).double().expand(2, 4))
        each = lrp.one_hot(torch.tensor([1, 0]), torch.tensor([2, 3]))
        assert torch.allclose(self.start(each), torch.tensor([[0.0, 2, 0, 0], [3, 0, 0, 0]]).double())
        assert torch.equal(self.start(lrp.one_hot(1)), self.start(1))
        per_sample = self.start(lrp.contrast(torch.tensor([0, 1]), torch.tensor([1, 0])))
        assert torch.equal(per_sample[1], torch.stack([-out[1, 0], out[1, 1], 0 * out[1, 0], 0 * out[1, 0]]))

    def test_one_sample_without_a_batch(self) -> None:
        assert torch.allclose(self.fn(W, X[0], target=1), X[0] * W[:, 1])

    def test_cotangent_composites_start_with_ones(self) -> None:
        fn = lrp.attribute(linear, lrp.gradient())
        assert torch.allclose(fn(W, X, target=1), W[:, 1].expand(2, 3))
        assert torch.allclose(fn(W, X), W.sum(1).expand(2, 3))
        assert torch.allclose(fn(W, X, target=lrp.contrast(1, 0)), (W[:, 1] - W[:, 0]).expand(2, 3))
        assert torch.allclose(fn(W, X, target=torch.ones(2, 4).double()), W.sum(1).expand(2, 3))


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def test_pytrees_in_and_out() -> None:
    def model_fn(params: Any, x: dict[str, Any], *, shift: float = 0.0) -> Any:
        a, b = x["pair"]
        return {"sum": (a + b) @ params["w"][0], "more": [a * 2 + shift, b], "none": None}

    x = {"pair": Pair(normal(2, 3), normal(2, 3, seed=1))}
    fn = lrp.attribute(model_fn, [])
    relevance = fn({"w": (W,)}, x, shift=1.0)
    assert isinstance(relevance["pair"], Pair)
    a, b = x["pair"]
    assert torch.allclose(relevance["pair"].left, a * W.sum(1) + 2 * a)
    assert torch.allclose(relevance["pair"].right, b * W.sum(1) + b)
    start = {"sum": torch.zeros(2, 4).double(), "more": [torch.ones(2, 3).double(), 0 * b], "none": None}
    output, pullback = lrp.vjp(model_fn, [], {"w": (W,)}, x)
    assert pytree.tree_structure(output) == pytree.tree_structure(model_fn({"w": (W,)}, x))
    assert torch.allclose(pullback(start)["pair"].left, torch.ones_like(a))


def test_argnums() -> None:
    def model_fn(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return (x @ params["w"] + params["b"]) + y

    params, y = {"w": W, "b": normal(4)}, normal(2, 4, seed=2)
    rules = [(lrp.Dense, lrp.Epsilon(0.0))]
    one = lrp.attribute(model_fn, rules)(params, X, y, target=1)
    assert torch.allclose(one, X * W[:, 1])
    first, second = lrp.attribute(model_fn, rules, argnums=(1, 2))(params, X, y, target=1)
    assert torch.allclose(first, one)
    assert torch.allclose(second[:, 1], y[:, 1])
    (alone,) = lrp.attribute(model_fn, rules, argnums=(-1,))(params, X, y, target=1)
    assert torch.equal(alone, second)


def test_relevance_of_parameters() -> None:
    """A tap: complete for each layer on its own, and nothing else changes for it."""
    case = MODELS["mlp"]()
    rules = lrp.epsilon(0.0)
    params, x = lrp.attribute(case.model_fn, rules, argnums=(0, 1))(case.params, case.x, target=1)
    assert torch.equal(x, lrp.attribute(case.model_fn, rules)(case.params, case.x, target=1))
    alone = lrp.attribute(case.model_fn, rules, argnums=0)(case.params, case.x, target=1)
    assert largest_difference(alone, params) == 0
    logits = case.model_fn(case.params, case.x)[:, 1]
    second = params["second"]
    assert torch.allclose(second["w"].sum() + second["b"].sum(), logits.sum())
    hidden = F.elu(case.x @ case.params["first"]["w"] + case.params["first"]["b"])
    assert torch.allclose(second["w"][:, 1], (hidden * case.params["second"]["w"][:, 1]).sum(0))
    first = params["first"]
    into = (hidden * case.params["second"]["w"][:, 1]).sum()
    assert torch.allclose(first["w"].sum() + first["b"].sum(), into)


def test_parameters_of_a_merged_batch_norm() -> None:
    case = MODELS["residual"]()
    fn = lrp.attribute(case.model_fn, lrp.epsilon_plus(), argnums=(0, 1))
    params, x = fn(case.params, case.x, target=1)
    assert params.keys() == case.params.keys()
    assert torch.equal(x, lrp.attribute(case.model_fn, lrp.epsilon_plus())(case.params, case.x, target=1))
    expected = params["fc.weight"].sum() + params["fc.bias"].sum()
    assert torch.allclose(expected, case.model_fn(case.params, case.x)[:, 1].sum())


def test_a_single_argument_is_data() -> None:
    fn = lrp.attribute(lambda x: torch.relu(x @ W), lrp.epsilon(0.0), argnums=0)
    expected = lrp.attribute(lambda w, x: torch.relu(x @ w), lrp.epsilon(0.0))(W, X, target=0)
    assert torch.equal(fn(X, target=0), expected)


def test_has_aux_and_order_of_results() -> None:
    def model_fn(w: Tensor, x: Tensor) -> Any:
        y = x @ w
        return y, {"argmax": y.argmax(-1), "text": "kept"}

    relevance, aux = lrp.attribute(model_fn, lrp.epsilon(), has_aux=True)(W, X, target=0)
    both, (value, again) = lrp.attribute_and_value(model_fn, lrp.epsilon(), has_aux=True)(W, X, target=0)
    assert torch.equal(relevance, both)
    assert torch.equal(value, X @ W)
    assert aux["text"] == again["text"] == "kept"
    assert torch.equal(aux["argmax"], (X @ W).argmax(-1))
    output, pullback, aux = lrp.vjp(model_fn, lrp.epsilon(), W, X, has_aux=True)
    assert torch.equal(output, value)
    assert torch.allclose(pullback(F.one_hot(torch.tensor([0, 0]), 4) * output), relevance)
    assert torch.equal(aux["argmax"], again["argmax"])


def test_output_picks_what_is_explained() -> None:
    @dataclasses.dataclass
    class Output:
        logits: Tensor
        text: str

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Output(super().forward(x), "text")

    model_fn, params = lrp.from_module(Model(3, 4).double(), output=lambda out: out.logits)
    assert lrp.attribute(model_fn)(params, X, target=2).shape == X.shape


class TestLayers:
    def test_names_and_relevance(self) -> None:
        case = MODELS["residual"]()
        fn = lrp.attribute(case.model_fn, lrp.epsilon_plus(), layers="*")
        relevance, layers = fn(case.params, case.x, target=1)
        assert list(layers) == ["conv1", "relu", "conv2", "relu@1", "pool", "drop", "fc"]
        assert torch.equal(relevance, lrp.attribute(case.model_fn, lrp.epsilon_plus())(case.params, case.x, target=1))
        assert torch.allclose(layers["fc"], F.one_hot(torch.tensor([1, 1]), 4) * case.model_fn(case.params, case.x))
        assert torch.equal(layers["conv1"], layers["relu"])  # Pass
        assert layers["relu@1"].shape == (2, 3, 6, 6)

    def test_a_merged_batch_norm_shares_the_entry(self) -> None:
        case = MODELS["residual"]()
        _, both = lrp.attribute(case.model_fn, layers=["conv1", "bn1"])(case.params, case.x, target=1)
        _, norm = lrp.attribute(case.model_fn, layers="bn1")(case.params, case.x, target=1)
        assert list(both) == ["conv1"]
        assert list(norm) == ["bn1"]
        assert torch.equal(both["conv1"], norm["bn1"])

    def test_containers_and_structured_outputs(self) -> None:
        class Split(nn.Module):
            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"a": x * 2, "b": x.detach()}

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
                self.split = Split()

            def forward(self, x: Tensor) -> Tensor:
                y = self.split(self.block(x))
                return y["a"] + y["b"]

        model_fn, params = lrp.from_module(Model().double())
        _, layers = lrp.attribute(model_fn, lrp.epsilon(), layers="*")(params, X)
        assert list(layers) == ["block.0", "block.1", "block", "split"]
        assert torch.equal(layers["block"], layers["block.1"])
        split: Any = layers["split"]
        assert split["b"] is None
        assert split["a"].shape == X.shape

    def test_functions_without_modules_use_parameter_paths(self) -> None:
        case = MODELS["mlp"]()
        _, layers = lrp.attribute(case.model_fn, lrp.epsilon(), layers="*")(case.params, case.x, target=1)
        assert list(layers) == ["first.w", "elu", "second.w"]

    def test_token_ids_are_explained_at_the_embedding(self) -> None:
        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(7, 4)
                self.head = nn.Linear(4, 2)

            def forward(self, ids: Tensor) -> Tensor:
                return self.head(self.embed(ids).mean(1))

        module = Tokens().double()
        model_fn, params = lrp.from_module(module)
        ids = torch.tensor([[1, 2, 3], [4, 5, 5]])
        relevance, layers = lrp.attribute(model_fn, lrp.epsilon(0.0, stabilizer=0.0), layers="embed")(
            params, ids, target=1
        )
        assert relevance is None
        expected = module.embed(ids) * module.head.weight[1] / 3
        assert largest_difference(layers["embed"], expected) < 1e-12
        explanation = lrp.explain(model_fn, lrp.epsilon(), layers="embed")(params, ids, target=1)
        assert abs(explanation.residual) < 1e-12
        assert abs(explanation.relevance_in - float(explanation.relevance[1]["embed"].sum())) < 1e-12

    def test_one_of_two_integer_inputs(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left, self.right = nn.Embedding(5, 3), nn.Embedding(5, 3)

            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                return self.left(a) + 2 * self.right(b)

        module = Two().double()
        model_fn, params = lrp.from_module(module)
        ids = torch.tensor([1, 2])
        for argnums, name, factor in ((1, "left", 1), (2, "right", 2)):
            fn = lrp.attribute(model_fn, [], argnums=argnums, layers=["left", "right"][argnums - 1])
            _, layers = fn(params, ids, ids)
            assert torch.allclose(layers[name], factor * getattr(module, name)(ids))
        for argnums, name in ((1, "left"), (2, "right")):
            _, layers = lrp.attribute(model_fn, [], argnums=argnums, layers="*")(params, ids, ids)
            assert list(layers) == [name]

    def test_they_compose(self) -> None:
        case = MODELS["residual"]()
        fn = lrp.attribute(case.model_fn, layers="relu*")
        batched = vmap(lambda t: fn(case.params, case.x, target=t)[1])(torch.arange(3))
        assert batched["relu@1"].shape == (3, 2, 3, 6, 6)
        assert torch.allclose(batched["relu"][2], fn(case.params, case.x, target=2)[1]["relu"])


class TestTrainingMode:
    """Batch norm keeps learning while one explains."""

    def setup_method(self) -> None:
        self.module: Any = randomized(Residual()).train()
        self.module.drop.p = 0.0
        self.model_fn, self.params = lrp.from_module(self.module, return_buffers=True)
        self.x = normal(4, 2, 6, 6)

    def test_buffers_learn_as_the_module_would(self) -> None:
        assert "bn1.num_batches_tracked" in self.params
        fn = lrp.attribute_and_value(self.model_fn, lrp.epsilon_plus(), has_aux=True)
        before = copy.deepcopy(self.module.state_dict())
        _, (value, buffers) = fn(self.params, self.x, target=1)
        assert all(torch.equal(v, before[n]) for n, v in self.module.state_dict().items())
        twin = copy.deepcopy(self.module)
        assert torch.equal(value, twin(self.x))
        for name, buffer in twin.named_buffers():
            assert torch.allclose(buffers[name], buffer, rtol=1e-14)

    def test_one_step_on_task_and_relevance_together(self) -> None:
        fn = lrp.attribute_and_value(self.model_fn, lrp.epsilon_plus(), has_aux=True)
        weights = {n: p for n, p in self.params.items() if n in dict(self.module.named_parameters())}
        buffers = {n: p for n, p in self.params.items() if n not in weights}
        labels = torch.tensor([0, 1, 2, 3])

        def loss(weights: Any) -> Any:
            relevance, (value, new) = fn({**weights, **buffers}, self.x, target=labels)
            return F.cross_entropy(value, labels) + relevance.square().sum(), new

        gradient, new = grad(loss, has_aux=True)(weights)
        assert new["bn1.num_batches_tracked"] == self.params["bn1.num_batches_tracked"] + 1
        assert all(g.abs().sum() > 0 for n, g in gradient.items() if n not in ("conv1.bias",))

    def test_rules_of_batch_norm_in_training(self) -> None:
        layers = lrp.explain(self.model_fn, has_aux=True)(self.params, self.x, target=0).rows
        kinds = [row.layer.kind for row in layers]
        assert kinds.count(lrp.Kind.BATCH_NORM) == 2
        with pytest.raises(lrp.UncoveredLayerError, match=r"bn1.*batch_norm_train"):
            lrp.attribute(self.model_fn, [(lrp.Activation, lrp.Pass())], has_aux=True)(self.params, self.x)

    def test_dropout_draws_what_the_module_draws(self) -> None:
        self.module.drop.p = 0.5
        fn = lrp.attribute_and_value(self.model_fn, lrp.epsilon(0.0), has_aux=True)
        torch.manual_seed(3)
        relevance, (value, _) = fn(self.params, self.x)
        torch.manual_seed(3)
        assert torch.equal(value, copy.deepcopy(self.module)(self.x))
        assert relevance.isfinite().all()


def test_transforms_are_values() -> None:
    """They pickle, compare, hash and print."""
    model_fn, params = lrp.from_module(randomized(Residual()))
    for rules in COMPOSITES.values():
        assert pickle.loads(pickle.dumps(rules)) == rules
        assert hash(rules) == hash(pickle.loads(pickle.dumps(rules)))
        fn = lrp.attribute(model_fn, rules, layers=["conv1"])
        assert fn == lrp.attribute(model_fn, rules, layers=["conv1"])
        assert hash(fn) == hash(lrp.attribute(model_fn, rules, layers=["conv1"]))
        assert fn != lrp.attribute(model_fn, rules)
        assert "Attribution(" in repr(fn)
        again = pickle.loads(pickle.dumps(fn))
        x = normal(1, 2, 6, 6)
        assert torch.equal(again(params, x, target=0)[0], fn(params, x, target=0)[0])
    gamma = torch.tensor(0.5)
    assert lrp.Gamma(gamma) == lrp.Gamma(gamma)
    assert lrp.Gamma(gamma) != lrp.Gamma(gamma.clone())
    assert lrp.Gamma(0.5) != lrp.ZPlus(0.5)


def test_half_precision_is_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        stabilized = lrp.Stabilizer()(torch.zeros(3, dtype=dtype))
        assert (1 / stabilized).isfinite().all()
        module = randomized(Residual()).to(dtype)
        model_fn, params = lrp.from_module(module)
        x = normal(2, 2, 6, 6).to(dtype)
        reference = randomized(Residual())
        exact_fn, exact = lrp.from_module(reference)
        for name in ("epsilon", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_gamma_box", "guided_backprop"):
            relevance = lrp.attribute(model_fn, COMPOSITES[name])(params, x, target=1)
            assert relevance.dtype == dtype
            assert relevance.isfinite().all()
            expected = lrp.attribute(exact_fn, COMPOSITES[name])(exact, normal(2, 2, 6, 6), target=1)
            assert largest_difference(relevance.double(), expected) < (0.02 if dtype == torch.float16 else 0.2)


def test_zero_epsilon_reads_zero_over_zero_as_zero() -> None:
    w = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]).double()
    x = torch.tensor([[1.0, 1.0]]).double()
    fn = lrp.attribute(linear, lrp.epsilon(0.0))
    assert torch.equal(fn(w, x, target=torch.tensor([[3.0, 4.0]]).double()), torch.tensor([[2.0, 2.0]]).double())
    jacobian = torch.func.jacrev(lambda x: fn(w, x, target=torch.ones(1, 2).double()))(x)
    assert jacobian.isfinite().all()
