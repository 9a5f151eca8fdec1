"""What people write at first: taken where its meaning is plain, and otherwise one line that helps."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrpfunc as lrp
from tests.cases import normal, randomized

W, X = normal(3, 4), normal(2, 3, seed=1)
LOGITS = normal(2, 5, 4, seed=2)


def linear(w: Tensor, x: Tensor) -> Tensor:
    return x @ w


def tokens(w: Tensor, x: Tensor) -> Tensor:
    """Logits of shape (2, 5, 4), from x of shape (2, 5, 3)."""
    return x @ w


def small() -> nn.Module:
    return randomized(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))).eval()


IMAGE = normal(2, 1, 6, 6, seed=3)


def complaint(call: Callable[[], Any], error: type[Exception] = lrp.InputError) -> str:
    """The message of a call that fails, with a short traceback."""
    with pytest.raises(error, match=r"\w") as info:
        call()
    assert len("".join(traceback.format_exception(info.value)).splitlines()) < 60
    return str(info.value)


# -- how a relevance function is called


def test_swapped_parameters_and_input() -> None:
    model_fn, params = lrp.from_module(small())
    text = complaint(lambda: lrp.attribute(model_fn)(IMAGE, params, target=1))
    assert text.startswith("argument 0 is a tensor of shape (2, 1, 6, 6), and the parameters come after it")
    assert text.endswith("\n\n    relevance_fn(params, x)")
    by_hand = lrp.attribute(lambda params, x: x @ params["w"])
    assert "relevance_fn(params, x)" in complaint(lambda: by_hand(X, {"w": W}, target=1))
    assert "takes its parameters, a dictionary" in complaint(lambda: lrp.attribute(model_fn)(IMAGE, IMAGE))


def test_parameters_of_another_module() -> None:
    model_fn, params = lrp.from_module(nn.Sequential(small()))
    text = complaint(lambda: lrp.attribute(model_fn)({"3.weight": params["0.3.weight"]}, IMAGE, target=1))
    assert "the parameters have 3.weight, which Sequential has not: its own are 0.0.weight, 0.0.bias" in text


@pytest.mark.parametrize(("target", "shown"), [(3, "3"), (torch.tensor([3, 1]), "targets")])
def test_positional_targets(target: Any, shown: str) -> None:
    model_fn, params = lrp.from_module(small())
    text = complaint(lambda: lrp.attribute(model_fn)(params, IMAGE, target))
    assert text.startswith(f"the model function was given {shown} as argument 2, and raised TypeError")
    assert text.endswith(f"relevance_fn(params, x, target={shown})")


def test_arguments_that_the_model_does_not_take() -> None:
    text = complaint(lambda: lrp.attribute(linear)(W, X, scale=X))
    assert "takes (w: 'Tensor', x: 'Tensor') -> 'Tensor', and not what it was given: got an unexpected" in text
    text = complaint(lambda: lrp.attribute(small())({}, IMAGE, target=1))
    assert text.endswith("model_fn, params = lrpfunc.from_module(module)")


def test_a_function_that_fails_by_itself_is_heard() -> None:
    def model_fn(w: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
        raise AttributeError("no such thing")

    with pytest.raises(AttributeError, match="no such thing"):
        lrp.attribute(model_fn)(W, X)
    assert "raised AttributeError: no such thing" in complaint(lambda: lrp.attribute(model_fn)(W, X, 3))


def test_what_is_no_tensor() -> None:
    text = complaint(lambda: lrp.attribute(linear)(W, np.ones((200, 300))))
    assert "which is no tensor" in text
    assert "torch.as_tensor(x)" in text
    assert len(text) < 400


# -- what is explained, by position or name


def test_arguments_by_name() -> None:
    expected = lrp.attribute(linear)(W, X, target=1)
    assert torch.equal(lrp.attribute(linear)(W, x=X, target=1), expected)
    assert torch.equal(lrp.attribute(linear, argnames="x")(W, x=X, target=1), expected)
    assert torch.equal(lrp.attribute(linear, argnames="x")(W, X, target=1), expected)
    (only,) = lrp.attribute(linear, argnames=["x"])(W, x=X, target=1)
    assert torch.equal(only, expected)
    value, pullback = lrp.vjp(linear, None, W, x=X, argnames="x")
    assert torch.equal(value, X @ W)
    assert torch.allclose(pullback(1), expected)
    assert lrp.explain(linear, argnames="x")(W, x=X, target=1).relevance.shape == X.shape
    model_fn, params = lrp.from_module(small())
    by_position = lrp.attribute(model_fn)(params, IMAGE, target=1)
    assert torch.equal(lrp.attribute(model_fn)(params, input=IMAGE, target=1), by_position)
    bound = lrp.attribute(model_fn, argnames="input").bind(params)
    assert torch.allclose(bound(input=IMAGE, target=1), by_position)


def test_names_that_no_argument_has() -> None:
    assert "argnames='y' names no argument of the call, which has 'w', 'x'" in complaint(
        lambda: lrp.attribute(linear, argnames="y")(W, x=X)
    )
    both = lambda: lrp.attribute(linear, argnums=0, argnames="x")  # noqa: E731
    assert "argnums=0 and argnames='x' both say what is explained" in complaint(both)
    anything = lrp.attribute(lambda *args, **kwargs: kwargs["pixels"] @ args[0])
    assert complaint(lambda: anything(W, pixels=X)).endswith("write argnames='pixels'")


# -- targets


@pytest.mark.parametrize(
    "target",
    [
        *([1, 3], (1, 3), np.array([1, 3]), [np.int64(1), np.int32(3)]),
        *(lambda out: torch.tensor([1, 3]), lambda out: [1, 3], lambda out: np.array([1, 3])),
    ],
)
@pytest.mark.parametrize("lowered", [True, False])
def test_lists_arrays_and_functions_that_return_integers(target: Any, lowered: bool) -> None:
    expected = lrp.attribute(linear)(W, X, target=torch.tensor([1, 3]))
    assert torch.allclose(lrp.attribute(linear, lowered=lowered)(W, X, target=target), expected)
    assert torch.allclose(lrp.explain(linear)(W, X, target=target).relevance, expected)
    if not callable(target):
        assert torch.allclose(lrp.attribute(linear)(W, X, target=lrp.one_hot(target)), expected)


def test_starting_relevance_as_an_array() -> None:
    start = np.linspace(0, 1, 8).reshape(2, 4)
    expected = lrp.attribute(linear)(W, X, target=torch.from_numpy(start))
    assert torch.equal(lrp.attribute(linear)(W, X, target=start), expected)


def test_the_predicted_class() -> None:
    expected = lrp.attribute(linear)(W, X, target=(X @ W).argmax(-1))
    assert torch.allclose(lrp.attribute(linear)(W, X, target=lrp.predicted), expected)
    compiled = torch.compile(lrp.attribute(linear), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(W, X, target=lrp.predicted), expected)


def test_a_position_of_a_sequence() -> None:
    x = normal(2, 5, 3, seed=2)
    for lowered in (True, False):
        fn = lrp.attribute(tokens, lrp.epsilon(), lowered=lowered)
        last = lrp.attribute(lambda w, x: tokens(w, x)[:, -1], lrp.epsilon())
        assert torch.allclose(fn(W, x, target=lrp.at(position=-1, index=3)), last(W, x, target=3))
        contrast = lrp.contrast(1, 2)
        assert torch.allclose(fn(W, x, target=lrp.at(-1, contrast)), last(W, x, target=contrast))
        assert torch.allclose(fn(W, x, target=lrp.at(-1, lrp.predicted)), last(W, x, target=lrp.predicted))
        ones = lrp.one_hot([0, 2], value=1.0)
        assert torch.allclose(fn(W, x, target=lrp.at(4, ones)), last(W, x, target=ones))
        each = lrp.attribute(lambda w, x: tokens(w, x)[torch.arange(2), [1, 3]], lrp.epsilon())
        assert torch.allclose(fn(W, x, target=lrp.at([1, 3], [0, 2])), each(W, x, target=[0, 2]))
    compiled = torch.compile(lrp.attribute(tokens, lrp.epsilon()), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(W, x, target=lrp.at(position=-1, index=3)), last(W, x, target=3))
    assert torch.allclose(compiled(W, x, target=lrp.at(-1, contrast)), last(W, x, target=contrast))


def test_a_position_that_is_not_there() -> None:
    x = normal(2, 5, 3, seed=2)
    fn = lrp.attribute(tokens)
    with pytest.raises(lrp.TargetError, match=r"target=5 is out of range .* with 5 positions: use .* -5 to 4"):
        fn(W, x, target=lrp.at(5, 0))
    with pytest.raises(lrp.TargetError, match=r"target=4 is out of range .* with 4 classes"):
        fn(W, x, target=lrp.at(0, 4))
    with pytest.raises(lrp.TargetError, match=r"(?s)shape \(2, 5, 4\).*target=lrpfunc.at\(position=-1, index=3\)\n"):
        fn(W, x, target=3)
    with pytest.raises(lrp.TargetError, match=r"takes an output of .* \(N, positions, classes\), not of shape \(4,\)"):
        lrp.attribute(linear)(W, X[0], target=lrp.at(0, 1))


# -- vjp takes what attribute takes


def test_pullbacks_take_any_target() -> None:
    model_fn, params = lrp.from_module(small())
    for rules in (lrp.epsilon_plus(), lrp.gradient()):
        fn = lrp.attribute(model_fn, rules)
        output, pullback = lrp.vjp(model_fn, rules, params, IMAGE)
        for target in (2, [1, 3], torch.tensor([1, 3]), lrp.contrast(1, 2), lrp.predicted, None, torch.ones(2, 5)):
            start = target.to(output.dtype) if isinstance(target, Tensor) and target.is_floating_point() else target
            assert torch.allclose(pullback(start), fn(params, IMAGE, target=start))
        assert torch.allclose(torch.vmap(pullback)(torch.arange(5))[4], fn(params, IMAGE, target=4))


@pytest.mark.parametrize("options", [{}, {"segments": 2}, {"lowered": False}])
def test_vjp_at_layers_in_segments_and_op_by_op(options: Any) -> None:
    model_fn, params = lrp.from_module(small())
    expected = lrp.attribute(model_fn, layers=["0", "1"])(params, IMAGE, target=3)
    _, pullback = lrp.vjp(model_fn, None, params, IMAGE, layers=["0", "1"], **options)
    relevance, layers = pullback(3)
    assert torch.allclose(relevance, expected[0])
    assert layers.keys() == expected[1].keys()
    assert all(torch.allclose(layers[name], expected[1][name]) for name in layers)


# -- selectors and entries


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
        self.head = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        return self.head(self.head(x).relu())


def test_classes_and_globs_are_selectors() -> None:
    model_fn, params = lrp.from_module(randomized(Twice()))

    def served(*entries: Any) -> dict[str, lrp.Rule]:
        table = lrp.explain(model_fn, [*entries, *lrp.epsilon()])(params, IMAGE, target=1)
        return {row.layer.name: row.rule for row in table.rows if row.rule == lrp.Gamma(0.3)}

    gamma = lrp.Gamma(0.3)
    assert [*served((nn.Linear, gamma))] == ["head@1", "head"]
    assert [*served((nn.Conv2d, gamma))] == ["features.0"]
    assert [*served((lrp.Convolution & nn.Sequential, gamma))] == ["features.0"]
    assert [*served((nn.Linear | lrp.name("features.0"), gamma))] == ["head@1", "head", "features.0"]
    assert [*served((lrp.first(nn.Linear), gamma))] == ["head"]
    assert [*served((lrp.last("head"), gamma))] == ["head@1"]
    assert [*served(("head*", gamma))] == ["head@1", "head"]
    assert [*served(("head@1", gamma))] == ["head@1"]
    assert [*served((lrp.Convolution | lrp.Dense & "head@1", gamma))] == ["head@1", "features.0"]
    assert [*served((lrp.name(["features.0", "head"]), gamma))] == ["head@1", "head", "features.0"]
    assert [*served((lrp.Convolution & ~lrp.name("feat*"), gamma))] == []
    with pytest.raises(TypeError, match=r"pairs \(selector, rule\), not of \(3, Gamma"):
        lrp.Composite([(3, gamma)])  # type: ignore[list-item]


def test_entries_that_serve_no_layer() -> None:
    model_fn, params = lrp.from_module(randomized(Twice()))

    def heard(rules: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lrp.attribute(model_fn, rules)(params, IMAGE, target=1)
        assert all(warning.category is lrp.UnusedRuleWarning for warning in caught)
        assert all(warning.filename == __file__ for warning in caught)
        return [str(warning.message) for warning in caught]

    rule = lrp.Gamma(0.4)
    (text,) = heard([(lrp.name("haed*"), rule), *lrp.epsilon()])
    assert text == (
        "rules[0] serves no layer: its selector matches none of the layers features.0, features.1, head, Twice, head@1"
        "\n\n    (name('haed*'), Gamma(gamma=0.4, stabilizer=1e-06, zero_params=None))"
    ).replace("Twice", "relu")
    assert heard([(lrp.name("haed*"), rule), *lrp.epsilon()]) == []  # once
    for selector in ("haed", nn.Conv1d, lrp.operation("gelu"), lrp.Dense & "haed", lrp.first(nn.Bilinear)):
        assert "rules[0] serves no layer: its selector matches none" in heard([(selector, rule), *lrp.epsilon()])[0]
    (text,) = heard([*lrp.epsilon(), (lrp.Dense, rule)])
    assert "rules[6] serves no layer: rules[5] before it takes what it selects" in text
    assert "put yours in front" in text
    # for any net
    assert heard([(lrp.BatchNorm | lrp.Softmax, lrp.Pass()), *lrp.attn_lrp(), *lrp.epsilon_plus()]) == []
    assert heard(lrp.guided_backprop() + lrp.epsilon_plus_flat()) == []
    assert heard([(lrp.Dense & ~lrp.name("he*"), rule), *lrp.epsilon()]) == []
    assert heard([(lambda layer: False, rule), *lrp.epsilon()]) == []
    assert heard([(lrp.first(lrp.Convolution), rule), (lrp.Convolution, rule), *lrp.epsilon()]) == []


# -- layers=


def test_modules_as_layers() -> None:
    module = randomized(Twice())
    model_fn, params = lrp.from_module(module)
    expected = lrp.attribute(model_fn, layers="*")(params, IMAGE, target=1)[1]
    _, layers = lrp.attribute(model_fn, layers=module.features)(params, IMAGE, target=1)
    assert layers.keys() == {"features"}
    assert torch.equal(layers["features"], expected["features"])
    _, layers = lrp.attribute(model_fn, layers=[module.head, "features.0"])(params, IMAGE, target=1)
    assert layers.keys() == {"head", "head@1", "features.0"}
    assert lrp.explain(model_fn, layers=module.features)(params, IMAGE, target=1).relevance[1].keys() == {"features"}
    text = complaint(lambda: lrp.attribute(model_fn, layers=nn.ReLU())(params, IMAGE), lrp.LayerNotFoundError)
    assert "layers= was given a ReLU that is no submodule" in text


# -- how things print


def test_what_a_prompt_shows() -> None:
    module = small()
    model_fn, params = lrp.from_module(module)
    fn = lrp.attribute(model_fn, lrp.epsilon_plus(), layers="0")
    assert repr(fn) == "Attribution(ModelFunction(Sequential), <6 rules>, layers='0')"
    assert repr(fn.bind(params)) == f"{fn!r}.bind(<4 tensors>)"
    assert repr(lrp.attribute(linear)) == "Attribution(linear, <7 rules>)"
    assert repr(lrp.explain(linear)) == "Explainer(Attribution(linear, <7 rules>))"
    seen: list[str] = []

    class Looking(lrp.Rule):
        def propagate(self, layer: lrp.BoundLayer, message: Any) -> Any:
            seen.append(repr(layer))
            return lrp.Epsilon().propagate(layer, message)

        def absorbed(self, layer: lrp.BoundLayer, message: Any) -> Any:
            return {}

    lrp.attribute(model_fn, [(lrp.Dense, Looking()), *lrp.epsilon()], lowered=False)(params, IMAGE)
    assert seen == ["BoundLayer(3   linear   (2, 32) -> (2, 5))"]


def test_a_table_of_layers_for_a_prompt_and_a_notebook() -> None:
    model_fn, params = lrp.from_module(small())
    rules = [(lrp.Dense, lrp.Epsilon(torch.tensor(0.5))), *lrp.epsilon()]
    table = lrp.explain(model_fn, rules)(params, IMAGE, target=1)
    assert repr(table) == str(table)
    assert " ".join(repr(table).split()[:10]) == "layer operation rule in out R out R in absorbed"
    html = table._repr_html_()
    assert html.startswith("<table><thead><tr><th")
    assert html.count("<tr>") == 1 + sum(line.startswith(("0 ", "1 ", "3 ")) for line in repr(table).splitlines())
    assert "rules[0].epsilon = 0.5" in html
    assert "residual" in html


def test_a_table_of_complex_numbers() -> None:
    def model_fn(w: Tensor, x: Tensor) -> Tensor:
        return (torch.fft.fft(x @ w) * 1j).abs()

    forced = [(lrp.operation("*"), lrp.Gradient()), *lrp.epsilon()]
    table = lrp.explain(model_fn, forced)(W, X, target=1)
    assert "fft" in repr(table)
    assert table.absorbed["nonlinearity"] == pytest.approx(0, abs=1e-10)  # of degree 1
    assert abs(table.residual) < 1e-10
    assert all(abs(row.residual) < 1e-10 for row in table.rows)


# -- modules and tensors that cannot be taken as they are


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_modules_that_hold_their_parameters_elsewhere() -> None:
    module = small()
    line = r"(?s){}.*\n\n    model_fn, params = lrpfunc.from_module\({}\)$"
    with pytest.raises(lrp.InputError, match=line.format("module of TorchScript", "original")):
        lrp.from_module(torch.jit.trace(module.float(), IMAGE.float()))  # type: ignore[arg-type]
    with pytest.raises(lrp.InputError, match=line.format("DataParallel copies", "model.module")):
        lrp.from_module(nn.DataParallel(module))
    with pytest.raises(lrp.InputError, match=r"(?s)`1.weight` of Sequential has no shape yet.*\n\n    module\(x\)$"):
        lrp.from_module(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))
    hooked = nn.Sequential(nn.Linear(2, 2))
    vars(hooked[0])["_hf_hook"] = object()  # as accelerate leaves it
    with pytest.raises(lrp.InputError, match=r"(?s)`0` of Sequential has a hook .*_from_submodules\(model\)$"):
        lrp.from_module(hooked)


@pytest.fixture
def one_process() -> Any:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of torch.distributed, about itself
def test_distributed_modules_and_tensors(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(lrp.InputError, match=r"(?s)DistributedDataParallel copies.*from_module\(model.module\)$"):
        lrp.from_module(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))
    sharded: Any = fully_shard(nn.Sequential(nn.Linear(2, 2)), mesh=mesh)
    with pytest.raises(lrp.InputError, match=r"(?s)`0.weight` of FSDPSequential is a DTensor.*full_tensor\(\)"):
        lrp.from_module(sharded)
    whole = nn.Sequential(nn.Linear(2, 2))  # what the message says
    whole.load_state_dict({name: value.full_tensor() for name, value in sharded.state_dict().items()})
    model_fn, params = lrp.from_module(whole)
    x = distribute_tensor(torch.ones(1, 2), mesh, [Replicate()])
    assert "pass x.full_tensor()" in complaint(lambda: lrp.attribute(model_fn)(params, x))
    assert lrp.attribute(model_fn)(params, x.full_tensor()).shape == (1, 2)


@pytest.mark.filterwarnings("ignore")  # of prototypes, about themselves
def test_tensors_of_other_kinds() -> None:
    fn = lrp.attribute(linear)
    masked = torch.masked.masked_tensor(X, X > 0)
    assert "pass x.to_tensor(0.0)" in complaint(lambda: fn(W, masked))
    assert fn(W, masked.to_tensor(0.0)).shape == X.shape
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([normal(2, 3), normal(4, 3)], layout=layout)
        assert "torch.nested.to_padded_tensor(x, 0.0)" in complaint(lambda nested=nested: fn(W, nested))
        assert fn(W, torch.nested.to_padded_tensor(nested, 0.0)).shape == (2, 4, 3)
    assert "pass tensor.to_dense()" in complaint(lambda: fn(W, X.to_sparse()))


# -- frozen parameters


def test_frozen_parameters_make_relevance_without_a_history() -> None:
    module = small()
    model_fn, params = lrp.from_module(module, frozen=True)
    assert not any(param.requires_grad for param in params.values())
    assert params["0.weight"].data_ptr() == module[0].weight.data_ptr()  # type: ignore[index,union-attr]
    assert params.keys() == lrp.from_module(module)[1].keys()
    relevance = lrp.attribute(model_fn)(params, IMAGE, target=1)
    assert not relevance.requires_grad
    relevance.numpy()  # as matplotlib does
    assert torch.equal(relevance, lrp.attribute(model_fn)(lrp.from_module(module)[1], IMAGE, target=1))
    buffers = lrp.from_module(nn.BatchNorm1d(2), frozen=True, return_buffers=True)[1]
    assert buffers["num_batches_tracked"].dtype is torch.int64


def test_fractional_pooling_draws_once_for_value_and_relevance() -> None:
    net = randomized(nn.Sequential(nn.FractionalMaxPool2d(2, output_size=3), nn.Flatten(), nn.Linear(9, 3)))
    model_fn, params = lrp.from_module(net, frozen=True)
    values = []
    for _ in range(4):
        fn = lrp.attribute_and_value(model_fn, lrp.epsilon(0.0))
        relevance, value = fn(params, normal(1, 1, 11, 11), target=1)
        assert torch.allclose(relevance.sum() + params["2.bias"][1], value[0, 1])
        values.append(float(value[0, 1]))
    assert len(set(values)) > 1


@pytest.mark.parametrize(("layer", "name"), [(nn.Softmax(-1), "softmax"), (nn.LogSoftmax(-1), "log_softmax")])
def test_an_output_that_is_a_softmax(layer: nn.Module, name: str) -> None:
    model_fn, params = lrp.from_module(nn.Sequential(small(), layer))
    text = complaint(lambda: lrp.attribute(model_fn, lrp.epsilon())(params, IMAGE, target=1), lrp.UncoveredLayerError)
    assert text.endswith(f"\n\n    return logits  # not logits.{name}(-1)")
    inside = lambda _, x: torch.softmax(x @ W, -1) * 2  # noqa: E731
    text = complaint(lambda: lrp.attribute(inside, lrp.epsilon())(None, X), lrp.UncoveredLayerError)
    assert text.endswith("rules = lrp.attn_lrp() + rules")
