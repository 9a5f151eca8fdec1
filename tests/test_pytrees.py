"""Rules, stabilizers and composites as pytrees: tensors are leaves, everything else is structure."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import re
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import optree as optree_typed
import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap
from torch.utils import _pytree as torch_pytree

import lrpfunc as lrp
from lrpfunc import _tree as tree
from tests.cases import COMPOSITES, LINEAR_RULES, MODELS, SUM_RULES, normal, with_rule
from tests.oracles import finite_difference_error, largest_difference

optree: Any = optree_typed  # whose types know no pytrees of ours

T = TypeVar("T")


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def composite() -> lrp.Composite:
    """Tensors in a rule, in a stabilizer inside a rule, in the weights of a combination and in its rules."""
    gamma = lrp.Gamma(number(0.25), lrp.Stabilizer(number(0.01)))
    mixture = number(0.5) * lrp.Epsilon(number(0.1)) + 0.5 * lrp.ZPlus(0.1)
    return (
        lrp.Composite([(lrp.Convolution, gamma), (lrp.Dense, mixture), (lrp.Sum, lrp.Norm(0.1))]) + lrp.epsilon_plus()
    )


NAMES = [
    "rules[0].gamma",
    "rules[0].stabilizer.epsilon",
    "rules[1].terms[0][0]",
    "rules[1].terms[0][1].epsilon",
]


CASE = MODELS["residual"]()


def relevance(rules: lrp.Composite) -> Tensor:
    return lrp.attribute(CASE.model_fn, rules)(CASE.params, CASE.x, target=1)


def loss(rules: lrp.Composite) -> Tensor:
    return relevance(rules).square().sum()


# --------------------------------------------------------------------------------------------------------------
# Structure


def test_tensors_are_leaves_and_have_names() -> None:
    rules = composite()
    leaves, spec = tree.flatten(rules)
    assert [float(leaf) for leaf in leaves] == [0.25, 0.01, 0.5, 0.1]
    assert tree.names(rules, "rules") == NAMES
    assert [name for name, _ in tree.named_leaves({"rules": rules})] == NAMES
    assert all(eval(name, {"rules": rules}) is leaf for name, leaf in zip(NAMES, leaves, strict=True))
    for accessor, (path, leaf) in zip(
        optree.tree_accessors(rules, namespace=tree.NAMESPACE), tree.flatten_with_path(rules)[0], strict=True
    ):
        assert accessor(rules) is leaf
        assert torch_pytree.key_get(rules, path) is leaf
    again = tree.unflatten(leaves, spec)
    assert again == rules
    assert hash(again) == hash(rules)
    assert repr(tree.named(rules[0], "rule")) == (
        "Gamma(gamma=rule.gamma, stabilizer=Stabilizer(epsilon=rule.stabilizer.epsilon, clip=False, norm_scale=False), "
        "zero_params=None)"
    )


@pytest.mark.parametrize("name", [*LINEAR_RULES, *SUM_RULES])
def test_rules_of_numbers_have_no_leaves(name: str) -> None:
    rule = {**LINEAR_RULES, **SUM_RULES}[name]
    leaves, spec = tree.flatten(rule)
    assert leaves == []
    again = tree.unflatten(leaves, spec)
    assert again == rule
    assert again is not rule
    assert spec == tree.structure(copy.deepcopy(rule))
    assert spec == tree.structure(pickle.loads(pickle.dumps(rule)))


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_come_back(name: str) -> None:
    rules = COMPOSITES[name]
    for flat, unflat in (
        (tree.flatten, tree.unflatten),
        (lambda t: optree.tree_flatten(t, namespace="torch", none_is_leaf=True), lambda leaves, s: s.unflatten(leaves)),
        (optree.tree_flatten, lambda leaves, spec: spec.unflatten(leaves)),
    ):
        leaves, spec = flat(rules)
        assert unflat(leaves, spec) == rules
        assert spec == flat(unflat(leaves, spec))[1]


def test_structure_tells_rules_apart() -> None:
    spec = tree.structure(lrp.Epsilon(number(0.1)))
    assert spec == tree.structure(lrp.Epsilon(number(0.2)))
    assert hash(spec) == hash(tree.structure(lrp.Epsilon(number(0.2))))
    for other in (lrp.Epsilon(0.1), lrp.Epsilon(number(0.1), "bias"), lrp.Norm(number(0.1))):
        assert spec != tree.structure(other)
    one, other = (lrp.Composite([(s, lrp.Epsilon(number(0.1)))]) for s in (lrp.Dense, lrp.Convolution))
    assert tree.structure(one) != tree.structure(other)
    assert tree.structure(one) != tree.structure(lrp.Composite(one.entries, cotangent=True))
    assert optree.tree_structure(one) != optree.tree_structure(other)


@pytest.mark.parametrize("placeholder", [object(), None, 3, "x", 0.5], ids=["object", "None", "int", "str", "float"])
def test_whatever_stands_at_a_leaf_is_a_leaf(placeholder: Any) -> None:
    """As the axes of a `vmap` do, the gradient of what is not used, or what a tracer puts there; no check is made."""
    rules = composite() + lrp.Composite([(lrp.Activation, lrp.AlphaBeta(number(2.0), number(1.0)))])
    filled = tree.map(lambda _: placeholder, rules)
    assert filled[0].gamma is placeholder
    leaves, spec = tree.flatten(filled)
    assert leaves == 6 * [placeholder]
    assert spec == tree.structure(rules)
    assert optree.tree_leaves(filled, none_is_leaf=True) == leaves
    back = tree.map(lambda _, tensor: tensor, filled, rules)
    assert back == rules
    assert vars(back[0]) == vars(rules[0])


def test_selectors_are_structure() -> None:
    threshold = number(0.5)
    rules = lrp.Composite([(lambda layer: bool(layer.depth > threshold), lrp.Epsilon())])
    assert tree.leaves(rules) == []


# --------------------------------------------------------------------------------------------------------------
# Rules of one's own


class Plain(lrp.Rule):
    """No dataclass, with a tensor it derives and one it remembers."""

    scale: Any

    def __init__(self, scale: Any) -> None:
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "many", {"b": [scale, 2.0], "a": (scale + 1, None)})

    @functools.cached_property
    def doubled(self) -> Any:
        return 2 * self.scale

    def propagate(self, layer: lrp.BoundLayer, message: Any) -> tuple[Any, ...]:
        return (lrp.Relevance(self.doubled * message.value * layer.input),)


@dataclass(frozen=True, eq=False, slots=True)
class Slotted(lrp.Rule):
    form: ClassVar[Any] = "relevance"
    scale: Any
    derived: Any = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.scale, float | Tensor):
            raise TypeError("checked")
        object.__setattr__(self, "derived", self.scale + 1)

    def propagate(self, layer: lrp.BoundLayer, message: Any) -> tuple[Any, ...]:
        return (lrp.Relevance(self.scale * message.value * layer.input),)


@dataclass(frozen=True)
class Typed(lrp.Rule, Generic[T]):
    scale: T

    def propagate(self, layer: lrp.BoundLayer, message: Any) -> tuple[Any, ...]:
        return (lrp.Relevance(self.scale * message.value * layer.input),)


OWN: dict[str, tuple[Callable[[Any], lrp.Rule], list[str]]] = {
    "plain": (Plain, [".scale", ".many['b'][0]", ".many['a'][0]"]),
    "slots": (Slotted, [".scale", ".derived"]),
    "generic": (Typed[Tensor], [".scale"]),
}


@pytest.mark.parametrize("name", OWN)
def test_rules_of_ones_own(name: str) -> None:
    make, places = OWN[name]
    rule = make(number(0.5))
    assert tree.names(rule, "") == places
    assert tree.leaves(make(0.5)) == []
    assert tree.structure(tree.map(lambda _: None, rule)) == tree.structure(rule)

    def total(rule: lrp.Rule) -> Tensor:
        fn = lrp.attribute(lambda _, x: x.relu(), [(lrp.Activation, rule)])
        return fn(None, torch.ones(1, 2).double()).sum()

    assert float(total(rule)) == (2 if name == "plain" else 1)
    gradient: Any = grad(total)(rule)
    assert float(gradient.scale) == (4 if name == "plain" else 2)
    assert float(total(tree.map(lambda t: 2 * t, rule))) == (4 if name == "plain" else 2)  # nothing stale is kept


def test_a_class_made_twice() -> None:
    def make() -> Any:
        @dataclass(frozen=True, eq=False)
        class Mine(lrp.Rule):
            scale: Any

            def propagate(self, layer: Any, message: Any) -> tuple[Any, ...]:
                return (message,)

        return Mine

    one, other = make(), make()
    assert len(tree.leaves((one(number(1.0)), other(number(1.0))))) == 2
    assert tree.structure(one(number(1.0))) != tree.structure(other(number(1.0)))


def test_a_rule_that_is_used_after_pickling() -> None:
    rules = pickle.loads(pickle.dumps(composite()))
    assert largest_difference(grad(loss)(rules), grad(loss)(composite())) < 1e-12


# --------------------------------------------------------------------------------------------------------------
# Transforms


def test_the_gradient_is_a_composite() -> None:
    gradient = grad(loss)(composite())
    assert isinstance(gradient, lrp.Composite)
    assert all(leaf.detach().item() != 0 for leaf in tree.leaves(gradient))
    leaves, spec = tree.flatten(composite())
    assert finite_difference_error(lambda at: loss(tree.unflatten(at, spec)), leaves) < 1e-6


def test_jacobians_are_composites() -> None:
    rules = composite()
    leaves, spec = tree.flatten(rules)
    apart = jacrev(lambda at: relevance(tree.unflatten(at, spec)))(leaves)
    for jacobian in (jacrev, jacfwd):
        assert largest_difference(tree.leaves(jacobian(relevance)(rules)), apart) < 1e-12


def test_vmap_sweeps_a_composite_of_stacked_tensors() -> None:
    rules = composite()
    stacked = tree.map(lambda t: torch.stack([t, 0.5 * t, 2 * t]), rules)
    looped = [tree.map(lambda t, i=i: t[i], stacked) for i in range(3)]
    assert largest_difference(vmap(relevance)(stacked), torch.stack([relevance(r) for r in looped])) < 1e-12
    gradients = vmap(grad(loss))(stacked)
    for i, one in enumerate(looped):
        assert (
            largest_difference(tree.leaves(tree.map(lambda t, i=i: t[i], gradients)), tree.leaves(grad(loss)(one)))
            < 1e-9
        )


def test_vmap_over_some_of_the_tensors() -> None:
    rules = composite()
    axes = tree.map(lambda _: None, rules)
    leaves, spec = tree.flatten(rules)
    leaves[0] = torch.stack([leaves[0], 2 * leaves[0]])
    axes = tree.unflatten([0, None, None, None], tree.structure(axes))
    swept = vmap(relevance, in_dims=(axes,))(tree.unflatten(leaves, spec))
    looped = [relevance(tree.unflatten([gamma, *leaves[1:]], spec)) for gamma in leaves[0]]
    assert largest_difference(swept, torch.stack(looped)) < 1e-12


def test_rules_and_stabilizers_are_arguments_too() -> None:
    def of_rule(rule: lrp.Rule) -> Tensor:
        return loss(with_rule(rule))

    def of_stabilizer(stabilizer: lrp.Stabilizer) -> Tensor:
        return of_rule(lrp.Epsilon(stabilizer))

    at = number(0.3)
    expected = grad(lambda t: of_rule(lrp.Epsilon(lrp.Stabilizer(t))))(at)
    assert largest_difference(grad(of_stabilizer)(lrp.Stabilizer(at)).epsilon, expected) < 1e-12
    assert largest_difference(grad(of_rule)(lrp.Epsilon(at)).epsilon, expected) < 1e-12
    assert finite_difference_error(lambda t: of_rule(lrp.Epsilon(t)), at) < 1e-6
    clipped = grad(of_stabilizer)(lrp.Stabilizer(at, clip=True))
    assert clipped.clip is True
    combination = number(0.5) * lrp.Epsilon(0.1) - lrp.ZPlus(number(0.2))
    gradient: Any = grad(of_rule)(combination)
    weight = grad(lambda w: of_rule(w * lrp.Epsilon(0.1) - lrp.ZPlus(0.2)))(number(0.5))
    assert largest_difference(gradient.terms[0][0], weight) < 1e-12
    assert finite_difference_error(lambda w: of_rule(w * lrp.Epsilon(0.1) - lrp.ZPlus(0.2)), number(0.5)) < 1e-6


def test_a_mapped_composite_runs_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from lrpfunc._lower import lower

    made, cut = [], lower.cut
    monkeypatch.setattr(lower, "cut", lambda *args, **kwargs: made.append(1) or cut(*args, **kwargs))
    case, rules = MODELS["mlp"](), lrp.epsilon(number(0.1), stabilizer=0.1)
    apart = lrp.Composite([(s, copy.copy(r)) for s, r in rules])  # the recipe gives two selectors the same rule
    fn = lambda rules: lrp.attribute(case.model_fn, rules)(case.params, case.x, target=0)  # noqa: E731
    for composite in (apart, tree.map(torch.clone, tree.map(torch.clone, apart)), tree.map(lambda t: 2 * t, apart)):
        fn(composite)
    assert len(made) <= 2


# --------------------------------------------------------------------------------------------------------------
# Compilers


def test_compiled_functions_of_a_composite() -> None:
    case = MODELS["mlp"]()
    rules = lrp.Composite([(lrp.Activation, lrp.Pass()), (lrp.Dense, lrp.Epsilon(number(0.1)))])

    def fn(rules: lrp.Composite, x: Tensor) -> Tensor:
        return lrp.attribute(case.model_fn, rules)(case.params, x, target=0)

    compiled = torch.compile(fn, backend="eager")
    for factor in (1, 3):
        scaled = tree.map(lambda t, f=factor: f * t, rules)
        assert largest_difference(compiled(scaled, case.x), fn(scaled, case.x)) < 1e-12


def test_exported_programs_take_a_composite() -> None:
    w, x = normal(3, 2), normal(2, 3)
    rules = lrp.Composite([(lrp.Dense, lrp.Epsilon(number(0.1)))])

    class Explained(torch.nn.Module):
        def forward(self, rules: lrp.Composite, x: Tensor) -> Tensor:
            return lrp.attribute(lambda w, x: x @ w, rules)(w, x, target=0)

    program = torch.export.export(Explained(), (rules, x), strict=False).module()
    for factor in (1, 3):
        scaled = tree.map(lambda t, f=factor: f * t, rules)
        assert largest_difference(program(scaled, x), Explained()(scaled, x)) < 1e-12


# --------------------------------------------------------------------------------------------------------------
# Both registries

Pair = namedtuple("Pair", ["b", "a"])

SERVED = {
    "tuple": (1, (2, [3])),
    "dict": {"b": 1, "a": {"d": 2, "c": 3}},
    "ordered dict": OrderedDict(b=1, a=2),
    "named tuple": Pair(1, {"b": 2, "a": 3}),
    "none": [1, None, {"a": None}],
    "rule": lrp.Epsilon(number(0.1)),
    "stabilizer": lrp.Stabilizer(number(0.1)),
    "composite": composite(),
    "composites": {"b": [composite()], "a": lrp.epsilon(number(0.2))},
    "rule with a dict": Plain(number(1.0)),
}


@pytest.mark.parametrize("name", SERVED)
def test_both_registries_agree(name: str) -> None:
    """In optree's namespace of lrpfunc, and in torch's own, where `None` is told to be a leaf."""
    importlib.import_module("torch.utils._cxx_pytree")  # from then on dictionaries keep their order in torch's
    value = SERVED[name]
    leaves = tree.leaves(value)
    assert leaves  # by identity: tensors do not compare
    for namespace in (tree.NAMESPACE, "torch"):
        theirs = optree.tree_leaves(value, none_is_leaf=True, namespace=namespace)
        assert [id(leaf) for leaf in theirs] == [id(leaf) for leaf in leaves]
    names = [name for name, _ in tree.named_leaves({"value": value})]
    if "named tuple" not in name:
        assert tree.names(value, "value") == names


def test_where_the_registries_differ() -> None:
    """Why arguments and outputs stay in torch's."""
    unsorted = {"b": 1, "a": 2}
    assert tree.leaves(unsorted) == optree.tree_leaves(unsorted, namespace=tree.NAMESPACE) == [1, 2]
    assert optree.tree_leaves(unsorted) == [2, 1]  # sorted in any other namespace but torch's
    assert tree.leaves([None]) == [None]
    assert optree.tree_leaves([None], namespace=tree.NAMESPACE) == []  # a node without children, unless told otherwise

    @dataclass
    class Output:
        logits: Tensor

    torch_pytree.register_dataclass(Output)
    output = Output(torch.ones(2))
    assert tree.leaves(output)[0] is output.logits
    assert optree.tree_leaves(output, namespace=tree.NAMESPACE)[0] is output  # a leaf: optree was told nothing of it


def test_optree_finds_rules_in_every_namespace() -> None:
    for namespace in ("", "somebody else's", tree.NAMESPACE):
        assert [a.codify("rules") for a in optree.tree_accessors(composite(), namespace=namespace)] == NAMES


# --------------------------------------------------------------------------------------------------------------
# TorchOpt


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_torchopt_learns_gammas(name: str) -> None:
    import torchopt

    case = MODELS["residual"]()
    x, y = case.x, relevance(lrp.Composite([(lrp.Convolution, lrp.Gamma(0.7, 0.1))]) + lrp.epsilon(0.1, stabilizer=0.1))
    unused = (lrp.BatchNorm, lrp.Epsilon(number(0.1)))
    rules = lrp.Composite([(lrp.Convolution, lrp.Gamma(number(0.2), 0.1)), unused]) + lrp.epsilon(0.1, stabilizer=0.1)

    def distance(rules: lrp.Composite) -> Tensor:
        return (lrp.attribute(case.model_fn, rules)(case.params, x, target=1) - y).square().sum()

    optimizer = (
        torchopt.adam(lr=0.05)
        if name == "adam"
        else torchopt.sgd(lr=0.05 / float(grad(distance)(rules)[0].gamma.abs().detach()))
    )
    state, learned, before = optimizer.init(rules), rules, float(distance(rules).detach())
    for _ in range(40):
        updates, state = optimizer.update(grad(distance)(learned), state, params=learned, inplace=False)
        learned = torchopt.apply_updates(learned, updates, inplace=False)
    assert isinstance(learned, lrp.Composite)
    assert learned[0].stabilizer == 0.1
    assert float(rules[0].gamma) == 0.2
    assert float(distance(learned).detach()) < 0.05 * before
    assert float(learned[0].gamma.detach()) == pytest.approx(0.7, abs=0.15)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchopt_and_a_tensor_that_serves_nothing() -> None:
    """Autograd's gradient of it is None, which stays a leaf."""
    import torchopt

    rules = tree.map(
        lambda t: t.requires_grad_(),
        lrp.Composite([(lrp.Dense, lrp.Epsilon(number(0.1))), (lrp.Softmax, lrp.Epsilon(number(0.1)))]),
    )
    leaves, spec = tree.flatten(rules)
    value = lrp.attribute(lambda w, x: x @ w, rules)(normal(3, 2), normal(2, 3), target=0).square().sum()
    gradients = tree.unflatten(torch.autograd.grad(value, leaves, allow_unused=True), spec)
    assert gradients[1].epsilon is None
    optimizer = torchopt.adam(lr=0.1)
    updates, _ = optimizer.update(gradients, optimizer.init(rules), params=rules, inplace=False)
    learned = torchopt.apply_updates(rules, updates, inplace=False)
    moved, unmoved = (entry[1].epsilon.detach() for entry in learned.entries)
    assert abs(moved.item() - 0.1) == pytest.approx(0.1, abs=1e-4)
    assert unmoved.item() == pytest.approx(0.1)


# --------------------------------------------------------------------------------------------------------------
# Names in what is printed


def test_errors_name_the_tensor() -> None:
    rules = lrp.Composite([(lrp.Dense, lrp.Gamma(torch.ones(2)))])
    with pytest.raises(lrp.RuleError, match=r"Gamma\(gamma=rules\[0\]\.gamma, .*: gamma has shape \(2,\)"):
        lrp.attribute(lambda w, x: x @ w, rules)(normal(3, 2), normal(2, 3))
    rules = lrp.Composite([(lrp.Dense, lrp.Epsilon(number(0.1)))])
    w, x = normal(3, 2), normal(2, 3)
    with pytest.raises(lrp.CaptureError, match=r"rules\[0\]\.epsilon is transformed"):
        grad(lambda rules: torch.tensor(lrp.explain(lambda w, x: x @ w, rules)(w, x).start))(rules)
    with pytest.raises(lrp.CaptureError, match=r"args\[1\] is transformed"):
        grad(lambda x: torch.tensor(lrp.explain(lambda w, x: x @ w, rules)(w, x).start))(x)


def test_explain_shows_the_tensor() -> None:
    box = lrp.ZBox(-torch.ones(3).double(), number(2.0))
    rules = lrp.Composite([(lrp.Dense, 0.5 * lrp.Epsilon(number(0.125)) + number(0.5) * box)])
    explanation = lrp.explain(lambda w, x: x @ w, rules)(normal(3, 2), normal(2, 3), target=0)
    assert list(explanation.tensors) == tree.names(rules, "rules")
    text = str(explanation)
    assert (
        "(0.5 * Epsilon(epsilon=rules[0].terms[0][1].epsilon, zero_params=None) + rules[0].terms[1][0] * ZBox(" in text
    )
    assert "rules[0].terms[0][1].epsilon = 0.125\n" in text
    assert "rules[0].terms[1][1].low = shape 3, from -1 to -1\n" in text
    assert "tensor" not in text


def test_one_module_imports_pytree_libraries() -> None:
    package = Path(lrp.__file__).parent
    importing = re.compile(
        r"^\s*(import optree|from optree|from torch\.utils\._pytree|import torch\.utils\._pytree)", re.M
    )
    assert {p.name for p in package.rglob("*.py") if importing.search(p.read_text())} == {"_tree.py"}
