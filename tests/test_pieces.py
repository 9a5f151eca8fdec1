"""A walk that is laid together from pieces is the walk that is traced in one go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lrpfunc as lrp
from lrpfunc._lower import lower, pieces
from lrpfunc._lower.joint import Joint, Written
from lrpfunc._ops.symbols import hashable
from lrpfunc._torch import map_arg
from lrpfunc.rules._message import Multiplier
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
from tests.oracles import finite_difference_error, largest_difference

EACH = [
    *((MODELS, model, rules) for rules in COMPOSITES.values() for model in MODELS),
    *((ATTENTION_MODELS, model, ATTENTION_COMPOSITES[name][0]) for model, name in ATTENTION_CASES),
    *((MODELS, "residual", with_rule(rule)) for rule in LINEAR_RULES.values()),
    (MODELS, "residual", with_rule(lrp.Gamma(torch.tensor(0.5).double(), torch.tensor(0.1).double()))),
]


def joint(case: Case, rules: Any, exact: bool, layers: str) -> Joint:
    graph, assignment, _ = lrp.attribute(case.model_fn, rules, layers=layers).assigned((case.params, case.x), {})
    made, _ = lower._joint(graph, assignment, Multiplier, exact)
    return made


def called(target: Any) -> Any:
    """A function, or an operation with the arguments that code cannot spell."""
    if not isinstance(target, Written):
        return target
    node = target.node
    places = {operand: place for place, operand in enumerate(node.all_input_nodes)}
    return node.target, map_arg(hashable((node.args, node.kwargs)), places.__getitem__)


def numbered(joint: Joint, seen: dict[Any, int]) -> list[int]:
    """A number for each result, the same for the same operations on the same inputs in any order."""
    numbers: dict[fx.Node, int] = {}
    inputs = iter(range(len(joint.graph.nodes)))
    for node in joint.graph.nodes:
        if node.op == "placeholder":
            what: Any = ("input", next(inputs))
        elif node.op == "get_attr":
            what = ("constant", repr(joint.constants[node.target].tolist()))
        elif node.op == "call_function":
            what = (called(node.target), map_arg(hashable((node.args, node.kwargs)), numbers.__getitem__))
        else:
            continue
        numbers[node] = seen.setdefault(what, len(seen))
    return [numbers[node] for node in (*joint.outputs, *joint.relevance)]


@pytest.mark.parametrize(
    "place", [pytest.param(i, marks=[pytest.mark.slow] if i % 4 else []) for i in range(len(EACH))]
)
def test_it_is_the_walk_traced_in_one_go(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    models, model, rules = EACH[place]
    case, exact = models[model](), place % 2 == 0
    seen: dict[Any, int] = {}
    results = []
    for laid in (False, True):
        monkeypatch.setattr(lower, "repeats", lambda _, laid=laid: laid)
        made = joint(case, rules, exact, "*")
        results.append((numbered(made, seen), len(made.graph.nodes)))
    assert results[0] == results[1]


def deep(ws: list[Tensor], x: Tensor) -> Tensor:
    for w in ws:
        x = torch.relu(x @ w)
    return x


DEEP = [torch.eye(4).double() + 0.2 * normal(4, 4, seed=seed) for seed in range(25)]
X = normal(2, 4).abs()


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is traced, one a trace."""
    made: list[Any] = []
    retrace = pieces.retrace
    monkeypatch.setattr(pieces, "retrace", lambda *args: made.append(args) or retrace(*args))
    return made


def test_what_repeats_is_traced_once(traces: list[Any]) -> None:
    relevance_fn = lrp.attribute(deep, lrp.epsilon(0.1))
    walked = lrp.attribute(deep, lrp.epsilon(0.1), lowered=False)
    assert largest_difference(relevance_fn(DEEP, X), walked(DEEP, X)) < 1e-12
    assert relevance_fn(DEEP, X).abs().min() > 1e-6
    # A ReLU and a product; the first and the last that are visited differ in what they are told of their surroundings.
    assert len(traces) <= 6
    assert finite_difference_error(lambda x: relevance_fn(DEEP, x).square().sum(), X) < 1e-6


@dataclass(frozen=True, eq=False)
class Deepening(lrp.Rule):
    """A rule that looks at where in the net its layer stands."""

    def propagate(self, layer: lrp.BoundLayer, message: Any) -> tuple[Any, ...]:
        return ((1 + layer.layer.depth) * lrp.Epsilon(0.1)).propagate(layer, message)


@dataclass(frozen=True, eq=False)
class FromAfar(lrp.Rule):
    """A rule that looks at another layer's values."""

    def propagate(self, layer: lrp.BoundLayer, message: Any) -> tuple[Any, ...]:
        first = layer.values[layer.layer.siblings[-1].output]
        return (first.mean() * lrp.Epsilon(0.1)).propagate(layer, message)


@pytest.mark.parametrize("rule", [Deepening(), FromAfar(), 0.5 * Deepening() + 0.5 * lrp.Epsilon(0.1)])
def test_a_rule_that_looks_around(rule: lrp.Rule, traces: list[Any]) -> None:
    rules = [(lrp.Dense, rule), *lrp.epsilon(0.1)]
    expected = lrp.attribute(deep, rules, lowered=False)(DEEP, X)
    assert largest_difference(lrp.attribute(deep, rules)(DEEP, X), expected) < 1e-10 * float(expected.abs().max())
    assert traces


class Deep(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def test_a_deeper_net_takes_no_more_pieces(traces: list[Any]) -> None:
    counts = []
    for blocks in (4, 8):
        traces.clear()
        model_fn, params = lrp.from_module(randomized(Deep(blocks)))
        x = normal(2, 3, 4)
        fn = lrp.attribute(model_fn, lrp.attn_lrp(), layers="blocks.*.linear1")
        relevance, layers = fn(params, x, target=1)
        expected, others = lrp.attribute(model_fn, lrp.attn_lrp(), layers="blocks.*.linear1", lowered=False)(
            params, x, target=1
        )
        assert largest_difference(relevance, expected) < 1e-10
        assert len(layers) == blocks
        assert layers.keys() == others.keys()
        assert all(largest_difference(layers[name], others[name]) < 1e-10 for name in layers)
        counts.append(len(traces))
    assert 0 < counts[0] == counts[1]
