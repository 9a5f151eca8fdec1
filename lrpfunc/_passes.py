"""Passes over the joint graph: what is not needed, or computed twice, or known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lrpfunc._joint import Joint, Written, returns
from lrpfunc._kinds import finite, nonnegative
from lrpfunc._operations import SELECT, aten, is_random, operation_name


def simplify(joint: Joint) -> None:
    """Drops what is not needed, and computes once what is computed several times."""
    _drop_dead(joint)
    _merge_repeated(joint)
    _keep_what_is_computed(joint)
    _fold(joint)
    _drop_dead(joint)


def _drop_dead(joint: Joint) -> None:
    for node in reversed(joint.graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users and not is_random(node):
            joint.early.discard(node)
            joint.graph.erase_node(node)


def _merge_repeated(joint: Joint) -> None:
    """Common subexpressions; random numbers are never shared, and the forward pass stays as it was written."""
    seen: dict[Any, fx.Node] = {}
    for node in joint.graph.nodes:
        if node.op != "call_function" or isinstance(node.target, Written) or is_random(node):
            continue
        first = seen.setdefault((node.target, _hashable(node.args), _hashable(node.kwargs)), node)
        if first is not node and node not in joint.early:
            _replace(joint, node, first)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in value.items())
    return value if isinstance(value, fx.Node) else (type(value), repr(value))  # 1, 1.0 and True are not the same


def _replace(joint: Joint, old: fx.Node, new: fx.Node) -> None:
    """Puts `new` wherever `old` stands; what nobody uses any more drops out later."""
    old.replace_all_uses_with(new)
    joint.outputs = [new if node is old else node for node in joint.outputs]
    joint.relevance = [new if node is old else node for node in joint.relevance]
    joint.evaluated = [(node, new if value is old else value) for node, value in joint.evaluated]


def _keep_what_is_computed(joint: Joint) -> None:
    """Makes the forward pass keep what the walk would compute once more.

    An operation may compute more than its output, for example the indices of a maximum. Its VJP, as it was traced,
    computes all that anew.
    """
    for node, value in joint.evaluated:
        if value in joint.early:
            continue
        steps = _steps(joint, value)
        known = (operand for step in steps for operand in step.all_input_nodes if operand in joint.early)
        if any(node < n for n in known) or not any(_is_used_beyond(step, steps) for step in steps if step is not value):
            _replace(joint, value, node)
            continue
        for step in steps:
            node.prepend(step)
        joint.early.update(steps)
        joint.forward = {key: value if copy is node else copy for key, copy in joint.forward.items()}
        _replace(joint, node, value)
    returns(joint, (*joint.outputs, *joint.relevance))


def _is_used_beyond(step: fx.Node, steps: Sequence[fx.Node]) -> bool:
    views = operation_name(step) in SELECT
    return not views and any(user not in steps and user.op != "output" and user.users for user in step.users)


def _steps(joint: Joint, value: fx.Node) -> list[fx.Node]:
    """What computes `value` from the forward pass, in order."""
    found: set[fx.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if node not in joint.early and node not in found:
            if node.op != "call_function":
                return []
            found.add(node)
            pending.extend(node.all_input_nodes)
    return [node for node in joint.graph.nodes if node in found]


def _fold(joint: Joint) -> None:
    """Uses what is known of activations: that they are finite, not negative, or a ReLU's."""
    facts = _Facts(
        {joint.forward[node] for node in finite(joint.program)},
        {joint.forward[node] for node in nonnegative(joint.program)},
    )
    for node in joint.graph.nodes:
        if node.op == "call_function" and node not in joint.early:
            with joint.graph.inserting_before(node):
                simpler = _simpler(node, facts)
            if simpler is not None:
                _replace(joint, node, simpler)


@dataclass(frozen=True)
class _Facts:
    finite: set[fx.Node]
    nonnegative: set[fx.Node]


def _simpler(node: fx.Node, facts: _Facts) -> fx.Node | None:
    match node.target, node.args:
        case aten.where.self, (condition, _, fx.Node() as kept):
            never_infinite = kept in facts.finite and _is(condition, aten.isinf.default, kept)
            never_negative = kept in facts.nonnegative and _is(condition, aten.lt.Scalar, kept, 0)
            return kept if never_infinite or never_negative else None
        case aten.mul.Tensor, (fx.Node() as x, 1):
            return x
        case aten.mul.Tensor, (fx.Node() as x, fx.Node() as masked):
            for z, m in ((x, masked), (masked, x)):
                if m.target is not aten.threshold_backward.default:
                    continue
                if m.args[1] is z or _is(m.args[1], aten.relu.default, z):
                    return node.graph.call_function(aten.mul.Tensor, (m.args[1], m.args[0]))
    return None


def _is(node: Any, target: Any, *args: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target and node.args == args
