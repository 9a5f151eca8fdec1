"""A warning where relevance explodes on its way to the input, or is nearly all lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from lrpfunc import _tree as tree
from lrpfunc._capture.numbers import has_numbers
from lrpfunc._capture.warned import times
from lrpfunc._errors import RelevanceWarning, warn
from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.graph import Graph
from lrpfunc._layers.layer import Layer
from lrpfunc._walk.assign import Assignment
from lrpfunc._walk.forward import Forward, on_numbers, walk
from lrpfunc.rules._message import Message
from lrpfunc.rules._rule import Rule

LIMIT = 1000
"""How much more, or less, relevance may arrive than started, in sums of magnitudes."""


def watched(
    forward: Forward,
    graph: Graph,
    rules: Assignment,
    tensors: Sequence[Tensor],
    model_fn: Callable[..., Any],
    concrete: Callable[[], tuple[Graph, Assignment, Sequence[Tensor]]] | None = None,
) -> Forward:
    """The same, but the first walk on numbers warns if relevance explodes, or is nearly all lost.

    Args:
        forward: The forward pass.
        graph: The layers.
        rules: Their rules.
        tensors: What the forward pass was run on.
        model_fn: The model function.
        concrete: Where sizes may be open: all that for a program without, to look for the layer where it happens.
    """
    if rules.composite.cotangent or graph.balanced.get(rules.key) or not set(graph.starts) <= set(graph.requested):
        return forward
    outputs = [leaf for leaf in tree.leaves(forward.output) if isinstance(leaf, Tensor)]
    inputs = list(tensors)

    def pull(start: Sequence[Message]) -> Any:
        answer = forward.pull(start)
        relevances = [leaf for leaf in tree.leaves(answer) if isinstance(leaf, Tensor)]
        found = dict(zip(graph.requested, relevances, strict=True))
        arrived = [found[node] for node in graph.starts]
        values = [message.value for message in start]
        if has_numbers([*inputs, *outputs, *arrived, *values]) and not graph.balanced.get(rules.key):
            graph.balanced.put(rules.key, True)
            with torch.no_grad():
                begun = _magnitude([m.relevance(y) for m, y in zip(start, outputs, strict=True)])
                if 0 < begun < torch.inf and not begun / LIMIT <= (ends := _magnitude(arrived)) <= begun * LIMIT:
                    found_in = concrete() if concrete else (graph, rules, inputs)
                    _warn(begun, ends, _culprit(*found_in, start, not ends < begun), model_fn)
        return answer

    return replace(forward, pull=pull)


def _magnitude(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.abs().double().sum()) for tensor in tensors)


@dataclass(frozen=True, eq=False)
class _Step:
    layer: Layer
    rule: Rule
    came: float
    went: float


def _culprit(
    graph: Graph, rules: Assignment, tensors: Sequence[Tensor], start: Sequence[Message], explodes: bool
) -> _Step:
    """The layer that adds most to the magnitudes, or takes most from them."""
    steps: list[_Step] = []

    def observe(
        layer: BoundLayer, rule: Rule, messages: Sequence[Message | None], results: Sequence[Message | None]
    ) -> None:
        came = [m.relevance(y) for m, y in zip(messages, layer.outputs, strict=True) if m is not None]
        went = [m.relevance(x) for m, x in zip(results, layer.inputs, strict=True) if m is not None]
        steps.append(_Step(layer.layer, rule, _magnitude(came), _magnitude(went)))

    values = graph.program.run([tensor.detach() for tensor in tensors])
    walk(graph, rules, start, on_numbers(values, observe=observe))
    if explodes:
        overflows = (step for step in steps if isfinite(step.came) and not isfinite(step.went))
        least = max(step.came for step in steps) / LIMIT
        grown = lambda step: step.went / max(step.came, least) if step.came else 0.0  # noqa: E731
        return next(overflows, None) or max(steps, key=grown)
    return max(steps, key=lambda step: step.came - step.went)


def _warn(begun: float, ends: float, step: _Step, model_fn: Callable[..., Any]) -> None:
    if times(model_fn, (step.layer.name, repr(step.rule))) > 1:
        return
    if ends < begun:
        happens = f"is nearly all lost: of magnitudes that sum to {begun:.3g} at the output, {ends:.3g} arrive"
        why = "Its bias or its stabilizer outweighs its input, or the rule gives to nobody what it takes"
    else:
        happens = f"explodes: magnitudes that sum to {begun:.3g} at the output sum to {ends:.3g} at the input"
        why = (
            "Its contributions cancel, and are divided by the small rest: a larger stabilizer helps, or a rule that "
            "favours one sign, such as lrpfunc.Gamma()"
        )
    warn(
        f"relevance {happens}. Most of that happens at\n\n    {step.layer}\n        {step.rule!r}\n\n"
        f"which is given {step.came:.3g} and passes on {step.went:.3g}. {why}. The balance of all layers:\n\n"
        "    print(lrpfunc.explain(model_fn, rules)(params, x, target=target))",
        RelevanceWarning,
    )
