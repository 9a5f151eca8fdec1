"""What the captured operations are taken for: kinds, merging, names, selectors, balance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional as F

import lrpfunc as lrp
from tests.cases import (
    ATTENTION_CASES,
    ATTENTION_COMPOSITES,
    ATTENTION_MODELS,
    COMPOSITES,
    LINEAR_RULES,
    MODELS,
    Case,
    normal,
    randomized,
    with_rule,
)
from tests.oracles import largest_difference


def rows(model_fn: Any, params: Any, x: Any, rules: Any = None, **kwargs: Any) -> Any:
    return lrp.explain(model_fn, lrp.epsilon() if rules is None else rules)(params, x, **kwargs).rows


KINDS: dict[str, tuple[Any, lrp.Kind]] = {
    "linear": (lambda w, x: F.linear(x, w), lrp.Kind.DENSE),
    "matmul": (lambda w, x: x @ w.T, lrp.Kind.DENSE),
    "matmul_left": (lambda w, x: w @ x.T, lrp.Kind.DENSE),
    "mm": (lambda w, x: torch.mm(x, w.T), lrp.Kind.DENSE),
    "addmm": (lambda w, x: torch.addmm(w[:, 0], x, w.T), lrp.Kind.DENSE),
    "addmm_left": (lambda w, x: torch.addmm(w[:, :1], w, x.T), lrp.Kind.DENSE),
    "bmm": (lambda w, x: torch.bmm(x[None], w.T[None]), lrp.Kind.DENSE),
    "baddbmm": (lambda w, x: torch.baddbmm(w[:, 0], x[None], w.T[None], beta=0.5, alpha=2), lrp.Kind.DENSE),
    "einsum": (lambda w, x: torch.einsum("oi,ni->no", w, x), lrp.Kind.DENSE),
    "mv": (lambda w, x: torch.mv(w, x[0]), lrp.Kind.DENSE),
    "tensordot": (lambda w, x: torch.tensordot(x, w.T, 1), lrp.Kind.DENSE),
    "einsum_of_three": (lambda w, x: torch.einsum("ni,oi,oj->nj", x, w, w), lrp.Kind.LINEAR),
    "addcmul": (lambda w, x: torch.addcmul(w[:2], x, w[2:]), lrp.Kind.LINEAR),
    "affine_in_two": (lambda w, x: F.linear(x, w, x.sum(0)[0] * w[:, 0]), lrp.Kind.LINEAR),
    "accumulated": (lambda w, x: (x * 1).index_put((torch.tensor([0, 0]),), 2 * x, accumulate=True), lrp.Kind.LINEAR),
    "overwritten": (lambda w, x: (x * 1).index_put((torch.tensor([0]),), 2 * x[:1]), lrp.Kind.SELECT),
    "conv1d": (lambda w, x: F.conv1d(x[:, None], w[:, None, :2]), lrp.Kind.CONVOLUTION),
    "conv1d_same": (lambda w, x: F.conv1d(x[:, None], w[:, None], padding="same"), lrp.Kind.CONVOLUTION),
    "conv_transpose1d": (lambda w, x: F.conv_transpose1d(x[..., None], w[:3, :, None]), lrp.Kind.CONVOLUTION),
    "conv_as_kernel": (lambda w, x: F.conv1d(w[None, :3], x[:, :, None]), lrp.Kind.CONVOLUTION),
    "residual": (lambda w, x: x + x.flip(-1), lrp.Kind.SUM),
    "difference": (lambda w, x: x - x.flip(-1), lrp.Kind.SUM),
    "sum": (lambda w, x: x.sum(-1, keepdim=True), lrp.Kind.SUM),
    "constant": (lambda w, x: x + 1, lrp.Kind.LINEAR),
    "from_one": (lambda w, x: 1 - x, lrp.Kind.LINEAR),
    "upsample": (lambda w, x: F.interpolate(x[None], scale_factor=2, mode="linear"), lrp.Kind.LINEAR),
    "cumsum": (lambda w, x: x.cumsum(-1), lrp.Kind.LINEAR),
    "scale": (lambda w, x: x * w[0, :3], lrp.Kind.SCALE),
    "divide": (lambda w, x: x / 4, lrp.Kind.SCALE),
    "negate": (lambda w, x: -x, lrp.Kind.SCALE),
    "max_pool": (lambda w, x: F.max_pool1d(x, 2), lrp.Kind.WINNER),
    "amax": (lambda w, x: x.amax(-1, keepdim=True), lrp.Kind.WINNER),
    "topk": (lambda w, x: x.topk(2).values, lrp.Kind.WINNER),
    "max_dim": (lambda w, x: x.max(-1, keepdim=True).values, lrp.Kind.WINNER),
    "maximum": (lambda w, x: torch.maximum(x, x.flip(-1)), lrp.Kind.WINNER),
    "split": (lambda w, x: x.split(1, -1)[1], lrp.Kind.SELECT),
    "cat": (lambda w, x: torch.cat([x, w[:2, :3]], -1), lrp.Kind.SELECT),
    "pad": (lambda w, x: F.pad(x, (1, 1), value=2.0), lrp.Kind.SELECT),
    "where": (lambda w, x: torch.where(w[0, :3] > 0, x, 1.0), lrp.Kind.SELECT),
    "index": (lambda w, x: x[:, [0, 0, 2]], lrp.Kind.SELECT),
    "gather": (lambda w, x: x.gather(1, torch.zeros(2, 2, dtype=torch.int64)), lrp.Kind.SELECT),
    "relu": (lambda w, x: torch.relu(x), lrp.Kind.ACTIVATION),
    "maximum_of_constant": (lambda w, x: torch.maximum(x, torch.zeros(3).double()), lrp.Kind.ACTIVATION),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_and_their_exact_propagation(name: str) -> None:
    """Each operation is what it is taken for; LRP-0 through it is input times gradient, and the balance closes."""
    f, kind = KINDS[name]
    w, x = normal(4, 3), normal(2, 3, seed=1)
    rules = [(lrp.Activation, lrp.Pass())]
    explanation = lrp.explain(f, rules)(w, x)
    assert kind in [row.layer.kind for row in explanation.rows]
    assert abs(explanation.residual) < 1e-12
    expected = x * grad(lambda x: f(w, x).sum())(x)
    assert largest_difference(lrp.attribute(f, rules)(w, x), expected) < 1e-14
    # In the other form, relevance is conserved but for what lands on constants.
    start = normal(*f(w, x).shape, seed=2)
    explanation = lrp.explain(f, rules)(w, x, target=start)
    assert abs(explanation.residual) < 1e-12
    assert set(explanation.absorbed) <= {"constants", "bias", "conversion"}


POOLS: dict[str, Any] = {
    "avg_pool2d": lambda x: F.avg_pool2d(x, 4).flatten(1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "mean": lambda x: x.mean((2, 3)),
    "mean_negative": lambda x: x.mean([-2, -1]),
    "mean_flat": lambda x: x.flatten(2).mean(-1),
    "mean_twice": lambda x: x.mean(-1, keepdim=True).mean(-2)[..., 0],
    "sum": lambda x: x.sum((2, 3)) / 16,
    "module": lambda x: nn.AvgPool2d(4)(x)[:, :, 0, 0],
}


@pytest.mark.parametrize("name", POOLS)
def test_average_pooling_in_all_spellings(name: str) -> None:
    w, x = normal(3, 5), normal(2, 3, 4, 4, seed=1)
    rules = lrp.epsilon(0.0, stabilizer=0.0)
    results = [
        lrp.attribute(lambda w, x, f=f: f(x) @ w, rules)(w, x, target=1) for f in (POOLS[name], POOLS["adaptive"])
    ]
    assert largest_difference(*results) < 1e-12
    kinds = [row.layer.kind for row in rows(lambda w, x: POOLS[name](x) @ w, w, x, rules)]
    assert lrp.Kind.AVERAGE in kinds or (name == "sum" and lrp.Kind.SUM in kinds)


class Net(nn.Module):
    """A convolution and a batch norm with something between, after or beside them."""

    def __init__(self, variant: str):
        super().__init__()
        transposed = variant == "transposed"
        groups = 2 if variant in ("grouped", "transposed") else 1
        conv = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.variant = variant
        self.conv = conv(4, 6, 3, padding=1, groups=groups, bias=variant != "no_bias")
        self.norm = nn.BatchNorm2d(6, affine=variant != "not_affine")
        self.next = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.variant == "between":
            y = torch.relu(y)
        z = self.norm(y)
        if self.variant == "beside":
            z = z + y
        return self.next(z).mean((2, 3))


@pytest.mark.parametrize("variant", ["plain", "grouped", "transposed", "no_bias", "not_affine", "between", "beside"])
def test_batch_norm_merges_only_where_it_may(variant: str) -> None:
    module = randomized(Net(variant))
    model_fn, params = lrp.from_module(module)
    x = normal(2, 4, 5, 5)
    layers = rows(model_fn, params, x, lrp.epsilon_plus(), target=1)
    norms = [row for row in layers if row.layer.kind is lrp.Kind.BATCH_NORM]
    assert len(norms) == (variant in ("between", "beside"))
    if norms:
        return
    scale = (module.norm.weight if module.norm.affine else 1) / (module.norm.running_var + module.norm.eps).sqrt()
    weight = module.conv.weight
    if variant == "transposed":
        merged = (weight.reshape(2, 2, 3, 3, 3) * scale.reshape(2, 1, 3, 1, 1)).reshape(weight.shape)
    else:
        merged = weight * scale.reshape(-1, 1, 1, 1)
    old_bias = 0 if module.conv.bias is None else module.conv.bias
    bias = (old_bias - module.norm.running_mean) * scale + (module.norm.bias if module.norm.affine else 0)

    def by_hand(params: Any, x: Tensor) -> Tensor:
        conv = F.conv_transpose2d if variant == "transposed" else F.conv2d
        y = conv(x, params[0], params[1], padding=1, groups=module.conv.groups)
        return F.conv2d(y, params[2], params[3], padding=1).mean((2, 3))

    plain = (merged.detach(), bias.detach(), module.next.weight.detach(), module.next.bias.detach())
    for rules in (lrp.epsilon_plus(), lrp.epsilon_gamma_box(-3.0, 3.0), lrp.epsilon_alpha2_beta1_flat()):
        ours = lrp.attribute(model_fn, rules)(params, x, target=1)
        assert largest_difference(ours, lrp.attribute(by_hand, rules)(plain, x, target=1)) < 1e-10


def test_dense_batch_norm_merges_on_the_feature_axis_only() -> None:
    module = randomized(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    model_fn, params = lrp.from_module(module)
    (row,) = rows(model_fn, params, normal(2, 4), lrp.epsilon())
    assert len(row.layer.nodes) == 2
    # For inputs of three dimensions the batch norm's features are not the dense layer's.
    layers = rows(model_fn, params, normal(2, 3, 4), lrp.epsilon())
    assert [row.layer.kind for row in layers] == [lrp.Kind.BATCH_NORM, lrp.Kind.DENSE]


def test_a_bias_added_by_hand_is_the_layers() -> None:
    w, b, x = normal(4, 3), normal(3, seed=1), normal(2, 4, seed=2)
    for rule in LINEAR_RULES.values():
        rules = with_rule(rule)
        by_hand = lrp.attribute(lambda p, x: x @ p[0] + p[1], rules)((w, b), x, target=1)
        native = lrp.attribute(lambda p, x: F.linear(x, p[0].T, p[1]), rules)((w, b), x, target=1)
        assert largest_difference(by_hand, native) < 1e-13
    bias = normal(3, 1, 1)
    conv = lrp.attribute(lambda p, x: F.conv2d(x, p[0]) + p[1], lrp.epsilon_plus())
    native = lrp.attribute(lambda p, x: F.conv2d(x, p[0], p[1][:, 0, 0]), lrp.epsilon_plus())
    params, x = (normal(3, 2, 2, 2), bias), normal(2, 2, 4, 4)
    start = normal(2, 3, 3, 3)
    assert largest_difference(conv(params, x, target=start), native(params, x, target=start)) < 1e-13


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())
        self.act = nn.ReLU()
        self.head = nn.ModuleDict({"fc": nn.Linear(2, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.act(self.block(x) + x)
        return self.head["fc"](F.relu(x).mean((2, 3)))


class TestNamesAndSelectors:
    def setup_method(self) -> None:
        self.model_fn, self.params = lrp.from_module(randomized(Nested()))
        self.x = normal(1, 2, 4, 4)
        self.layers = [row.layer for row in rows(self.model_fn, self.params, self.x, target=1)][::-1]

    def chosen(self, selector: Any) -> list[str]:
        return [f"{layer.name}:{layer.operation}" for layer in self.layers if selector(layer)]

    def test_names(self) -> None:
        assert self.chosen(lambda layer: True) == [
            "block.0:conv2d", "block.1:relu", "add:add", "act:relu",
            "block.0@1:conv2d", "block.1@1:relu", "add@1:add", "act@1:relu",
            "relu:relu", "mean:mean", "head.fc:linear",
        ]  # fmt: skip

    def test_selectors(self) -> None:
        assert self.chosen(lrp.Dense) == ["head.fc:linear"]
        assert self.chosen(lrp.Convolution) == ["block.0:conv2d", "block.0@1:conv2d"]
        assert self.chosen(lrp.name("block.0")) == ["block.0:conv2d", "block.0@1:conv2d"]
        assert self.chosen(lrp.name("block.0@1")) == ["block.0@1:conv2d"]
        assert self.chosen(lrp.name("block") & ~lrp.Convolution) == ["block.1:relu", "block.1@1:relu"]
        assert self.chosen(lrp.name("head*")) == ["head.fc:linear"]
        assert self.chosen(lrp.first(lrp.Convolution | lrp.Dense)) == ["block.0:conv2d"]
        assert self.chosen(lrp.last(lrp.Activation)) == ["relu:relu"]
        assert self.chosen(lrp.operation("co*")) == ["block.0:conv2d", "block.0@1:conv2d"]
        assert self.chosen(lrp.AvgPool | lrp.Sum) == ["add:add", "add@1:add", "mean:mean"]
        assert self.chosen(lrp.ReLU & (lambda layer: layer.depth > 0.5)) == [
            "block.1@1:relu",
            "act@1:relu",
            "relu:relu",
        ]
        assert self.chosen((lambda layer: layer.depth > 0.5) & lrp.ReLU) == self.chosen(lrp.ReLU & lrp.depth(0.5, 1))
        third = lrp.depth(0, 1 / 3), lrp.depth(1 / 3, 2 / 3), lrp.depth(2 / 3, 1)
        kernels = [self.chosen((lrp.Dense | lrp.Convolution) & share) for share in third]
        assert kernels == [["block.0:conv2d"], ["block.0@1:conv2d"], ["head.fc:linear"]]
        assert sum(len(self.chosen(share)) for share in third) == len(self.layers)

    def test_the_first_match_wins(self) -> None:
        mine = lrp.Composite([(lrp.first(lrp.Convolution), lrp.Flat())])
        for rules in (mine + lrp.epsilon(), list(mine) + lrp.epsilon()):
            used = [type(row.rule) for row in rows(self.model_fn, self.params, self.x, rules, target=1)]
            assert used[-1] is lrp.Flat
            assert used[0] is lrp.Epsilon

    def test_first_means_first_executed_that_depends_on_the_input(self) -> None:
        def model_fn(params: Any, x: Tensor) -> Tensor:
            bias = F.linear(params["b"], params["a"])  # executed first, but not on the way
            return F.linear(F.linear(x, params["b"]) + bias, params["a"])

        params = {"a": normal(3, 3), "b": normal(3, 3, seed=1)}
        used = [r.rule for r in rows(model_fn, params, normal(3, 3, seed=2), lrp.epsilon_plus_flat(), target=1)]
        assert [type(rule) for rule in used] == [lrp.Epsilon, lrp.Flat]


@pytest.mark.parametrize("name", [*COMPOSITES, *(f"dense_{n}" for n in LINEAR_RULES)])
@pytest.mark.parametrize("model", MODELS)
def test_the_balance_closes(model: str, name: str) -> None:
    rules = {**COMPOSITES, **{f"dense_{n}": with_rule(r) for n, r in LINEAR_RULES.items()}}[name]
    check_balance(MODELS[model](), rules)


@pytest.mark.parametrize(("model", "name"), ATTENTION_CASES)
def test_the_balance_closes_through_attention(model: str, name: str) -> None:
    check_balance(ATTENTION_MODELS[model](), ATTENTION_COMPOSITES[name][0])


def check_balance(case: Case, rules: lrp.Composite | None) -> None:
    """From a logit, which starts a multiplier, and from any relevance."""
    for target in (1, normal(*case.model_fn(case.params, case.x).shape)):
        explain = lrp.explain(case.model_fn, rules)
        explanation = explain(case.params, case.x, target=target)
        for row in explanation.rows:
            assert abs(row.residual) <= 1e-9 * max(row.absolute, 1e-30), row
        assert abs(explanation.residual) <= 1e-9 * sum(row.absolute for row in explanation.rows)
        if not explain.attribution.rules.cotangent:
            assert abs(explanation.relevance_in - float(explanation.relevance.sum())) < 1e-9


def test_the_table() -> None:
    params = {"w": torch.tensor([[1.0, 2.0]]).double(), "b": torch.tensor([3.0]).double()}
    table = lrp.explain(lambda p, x: F.relu(F.linear(x, p["w"], p["b"])), lrp.epsilon(0.0))(
        params, torch.ones(1, 2).double(), target=0
    )
    assert str(table) == (
        "layer  operation  rule                                    in   out  R out  R in  absorbed\n"
        "-----  ---------  --------------------------------------  ---  ---  -----  ----  --------\n"
        "relu   relu       Pass()                                  1x1  1x1      6     6\n"
        "w      linear     Epsilon(epsilon=0.0, zero_params=None)  1x2  1x1      6     3  bias 3\n"
        "\n"
        "6 at the output = 3 at the input + 3 bias   (residual 0.0e+00)"
    )


CLAIMS: list[Any] = [
    lambda x: x.masked_fill(x > 0.5, -1),
    lambda x: torch.where(x > 0.5, x, -1),
    lambda x: torch.where(x > 0.5, -1, x),
    lambda x: x.scatter(1, torch.zeros(2, 1).long(), -3),
    lambda x: x.index_fill(1, torch.tensor([0]), -3),
    lambda x: F.pad(x, (1, 1), value=-1),
    lambda x: torch.constant_pad_nd(x, (1, 1), -1),
    lambda x: x * torch.tensor(-1),
    lambda x: x + torch.arange(-3, 1),
    lambda x: torch.cat([x, torch.full((2, 1), -1)], 1),
    lambda x: torch.add(x, x, alpha=-2),
    lambda x: torch.add(x, 1, alpha=-3),
    lambda x: x - 1,
    lambda x: x.clamp(0, -1),
    lambda x: F.softplus(x - 0.5, beta=-1),
    lambda x: F.softplus(x - 5, threshold=-5),
    lambda x: F.avg_pool2d(x[None, None], 2, divisor_override=-1)[0, 0],
    lambda x: torch.minimum(x, torch.full((2, 4), -1)),
    lambda x: -x,
    lambda x: x.cumsum(1) - x.cumsum(1).flip(1),
    lambda x: F.interpolate(x[None, None], scale_factor=3, mode="bicubic")[0, 0],
    lambda x: F.gelu(x - 0.5),
    lambda x: F.leaky_relu(x - 0.5),
]


@pytest.mark.parametrize("index", range(len(CLAIMS)))
def test_non_negativity_is_never_claimed_wrongly(index: int) -> None:
    f, x = CLAIMS[index], normal(2, 4)

    def model_fn(_: None, x: Tensor) -> Tensor:
        y = f(torch.relu(x))
        return F.linear(y, torch.ones(2, y.shape[-1]).double())

    rules = [(lrp.Activation, lrp.Pass()), (lrp.operation("*"), lrp.Gradient())]
    layers = rows(model_fn, None, x, rules)
    assert (f(torch.relu(x)) < 0).any()
    assert not layers[0].layer.nonnegative


def test_layers_before_a_detach_are_not_on_the_way() -> None:
    w, x = normal(3, 3), normal(2, 3)

    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        scale = torch.softmax(x @ w.T, -1).detach()
        return (x @ w) * scale

    used = [row.rule for row in rows(model_fn, w, x, lrp.epsilon_plus_flat())]
    assert [type(rule) for rule in used if type(rule).__name__ != "Scale"] == [lrp.Flat]
    with pytest.raises(lrp.NoPathError, match="does not depend on what should be explained"):
        lrp.attribute(lambda w, x: torch.relu(x).detach() @ w, lrp.epsilon())(w, x)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.zeros(2, 3).double().index_put((torch.tensor([0, 0]),), x),
        lambda x: (lambda y: (y.__setitem__(torch.tensor([1, 1]), x), y)[1])(torch.zeros(2, 3).double()),
        lambda x: torch.zeros(2, 3).double().scatter(0, torch.zeros(2, 3).long(), x),
        lambda x: torch.zeros(2, 3).double().index_copy(0, torch.tensor([0, 0]), x),
    ],
)
def test_overwriting_gives_to_the_winner_only(f: Any) -> None:
    x, start = normal(2, 3), torch.ones(2, 3).double()
    explanation = lrp.explain(f, [], argnums=0)(x, target=start)
    assert explanation.relevance.sum() == 3
    assert explanation.absorbed["constants"] == 3
    assert explanation.residual == 0


def test_a_number_copied_into_a_number() -> None:
    def f(x: Tensor) -> Tensor:
        return x[0].index_copy(0, torch.tensor([0]), 2 * x[1]).reshape(1, 1)

    x = normal(2).abs()
    assert torch.allclose(lrp.attribute(f, argnums=0)(x, target=0), torch.stack([0 * x[0], 2 * x[1]]))


def test_uniform_counts_places() -> None:
    x = normal(2, 3)
    for f in (lambda x: x.mm(x.T).diagonal(), lambda x: torch.einsum("ij,ij->ij", x, x)):
        relevance = lrp.attribute(f, [(lrp.Product, lrp.Uniform())], argnums=0)(x)
        assert torch.allclose(relevance.sum(), f(x).sum())
    with pytest.raises(lrp.RuleError, match="Uniform serves sums, products"):
        lrp.attribute(lambda x: torch.lerp(x, x.flip(0), 0.3), [(lrp.operation("lerp"), lrp.Uniform())], argnums=0)(x)


def test_factors_of_a_product_and_its_bias_are_the_layers() -> None:
    w, b, x = normal(4, 3), normal(3, seed=1), normal(2, 4, seed=2)
    same = [
        (lambda p, x: torch.addmm(p[1], x, p[0], alpha=-2, beta=-1), lambda p, x: F.linear(x, -2 * p[0].T, -p[1])),
        (lambda p, x: x @ p[0] - p[1], lambda p, x: F.linear(x, p[0].T, -p[1])),
        (lambda p, x: torch.add(x @ p[0], p[1], alpha=3), lambda p, x: F.linear(x, p[0].T, 3 * p[1])),
    ]
    for rule in (lrp.ZPlus(), lrp.AlphaBeta(), lrp.Gamma(), lrp.WSquare(), lrp.ZBox(-3.0, 3.0), lrp.Epsilon()):
        for one, other in same:
            results = [lrp.attribute(f, [(lrp.Dense, rule)])((w, b), x, target=1) for f in (one, other)]
            assert largest_difference(*results) < 1e-12


def test_infinite_masks_are_accounted_for() -> None:
    mask = torch.tensor([0.0, -torch.inf, 0.0]).double()
    rules = [(lrp.operation("softmax"), lrp.Gradient())]
    explanation = lrp.explain(lambda w, x: (x + mask).softmax(-1) @ w, rules)(normal(3, 2), normal(2, 3), target=0)
    assert abs(explanation.residual) < 1e-12


def test_operations_with_several_outputs_take_the_gradient() -> None:
    def model_fn(_: None, x: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(x @ x.mT)
        return torch.cat([values[:, -1:], vectors[:, 0] ** 2], -1)

    x = normal(2, 3, 4)
    rules = [(lrp.operation("linalg_eigh"), lrp.Gradient()), *lrp.attn_lrp()]
    explanation = lrp.explain(model_fn, rules)(None, x, target=0)
    # The largest eigenvalue is homogeneous of degree 2, and the product shares.
    assert largest_difference(explanation.relevance, x * grad(lambda x: model_fn(None, x)[:, 0].sum())(x) / 2) < 1e-12
    assert abs(explanation.residual) < 1e-12


def test_names_are_told_apart() -> None:
    f = lambda p, x: torch.relu(torch.relu(x @ p["w"]) @ p["w"])  # noqa: E731
    _, layers = lrp.attribute(f, lrp.epsilon(), layers="*")({"w": normal(3, 3)}, normal(2, 3))
    assert list(layers) == ["w", "relu", "w@1", "relu@1"]


def test_explain_names_what_is_read_through_detach() -> None:
    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        h = x @ w
        gate, mean = h.sigmoid().detach(), h.mean(-1, keepdim=True).detach()
        with torch.no_grad():
            largest = 2 * h.amax(-1, keepdim=True)
        return (h - mean + largest) * gate

    explanation = lrp.explain(model_fn, lrp.attn_lrp())(normal(4, 3), normal(2, 4), target=0)
    taken = {row.layer.name: row.absorbed.get("constants", 0.0) for row in explanation.rows}
    assert (
        "constants that are computed from the input, behind detach or no_grad:\n"
        "    mul: sigmoid 2x3, a factor\n"
        f"    add: mul 2x1, which takes {taken['add']:.5g}\n"
        f"    sub: mean 2x1, which takes {taken['sub']:.5g}\n"
    ) in str(explanation)
    # Not what carries nothing, and not the model's own constants.
    shifted = lambda w, x: (lambda h: torch.exp(h - h.amax(-1, keepdim=True).detach()))(x @ w)  # noqa: E731
    softmax = lambda w, x: (lambda e: e / e.sum(-1, keepdim=True))(shifted(w, x)) + w.detach().sum()  # noqa: E731
    assert "behind detach" not in str(lrp.explain(softmax, lrp.attn_lrp())(normal(4, 3), normal(2, 4), target=0))
    assert "amax" in str(lrp.explain(shifted, lrp.attn_lrp())(normal(4, 3), normal(2, 4), target=0))


def test_a_detached_addend_is_no_factor() -> None:
    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        h = x @ w
        y = F.linear(h, w, h.mean(0).detach()[:1].expand(4))
        return torch.where(x > 0, y, h.amax(-1, keepdim=True).detach())

    text = str(lrp.explain(model_fn, lrp.attn_lrp())(normal(4, 3), normal(2, 4), target=lambda out: out))
    assert "    linear: expand 4, which takes " in text
    assert "    where: amax 2x1, which takes " in text
    assert "a factor" not in text
