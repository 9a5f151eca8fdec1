"""Passes over the joint graph: what is not needed, or computed twice, or known beforehand.

The graph of `joint`, for `torch.relu(x @ w)` and `gradient()`, is left with

    matmul = aten.matmul.default(x, w)
    relu_0 = aten.relu.default(matmul)
    threshold_backward = aten.threshold_backward.default(start, relu_0, 0)
    t = aten.t.default(w)
    mm_1 = aten.mm.default(threshold_backward, t)
    return relu_0, mm_1

since `mm` is dead, `relu` is `relu_1`, and that is `relu_0`. Three things are less plain:

* Where an operation of the walk computes more than the one of the forward pass, the forward pass takes it over. A
  `max_pool2d` has no indices, which its VJP needs and computes anew:

      max_pool2d = aten.max_pool2d.default(relu, [2, 2])
      ...
      max_pool2d_with_indices = aten.max_pool2d_with_indices.default(relu, [2, 2])
      getitem_1 = max_pool2d_with_indices[1]

  After `_keep_what_is_computed` the second runs in place of the first, and the walk reads its indices.
* Rules are written for any activation. What is known of this one makes them cheaper: for `Epsilon(0.25)` after a ReLU,

      where = aten.where.self(aten.isinf.default(relu_0), 0, relu_0)        # a ReLU of finite numbers is finite
      threshold_backward = aten.threshold_backward.default(start, relu_0, 0)
      mul = aten.mul.Tensor(where, threshold_backward)

  is `aten.mul.Tensor(relu_0, start)`: where the ReLU is off, the activation is 0 already.
* The forward pass itself is never merged or folded: its value is the model's to the bit.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lrpfunc._layers.facts import finite, nonnegative
from lrpfunc._lower.joint import Joint, Written, returns
from lrpfunc._ops.call import is_random, of
from lrpfunc._ops.operator import Kind
from lrpfunc._ops.symbols import hashable
from lrpfunc._torch import aten


def simplify(joint: Joint, exact: bool) -> None:
    """Drops what is not needed, and computes once what is computed several times; `exact` keeps every derivative."""
    _drop_dead(joint)
    _merge_repeated(joint)
    _keep_what_is_computed(joint)
    _fold(joint, exact)
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
        first = seen.setdefault((node.target, hashable(node.args), hashable(node.kwargs)), node)
        if first is not node and node not in joint.early:
            _replace(joint, node, first)


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
    views = of(step).kind is Kind.SELECT
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


def _fold(joint: Joint, exact: bool) -> None:
    """Uses what is known of activations: that they are finite, not negative, or a ReLU's."""
    facts = _Facts(
        exact,
        {joint.forward[node] for node in finite(joint.program)},
        {joint.forward[node] for node in nonnegative(joint.program)},
    )
    for node in joint.graph.nodes:
        if node.op == "call_function" and node not in joint.early:
            with joint.graph.inserting_before(node):
                simpler = _simpler(node, facts)
            if simpler is not None and _alike(simpler, node):
                _replace(joint, node, simpler)


def _alike(first: fx.Node, second: fx.Node) -> bool:
    """Whether both have one shape and dtype: an operation that changes no number may still promote or broadcast."""
    a, b = first.meta.get("val"), second.meta.get("val")
    return a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype)


@dataclass(frozen=True)
class _Facts:
    exact: bool
    finite: set[fx.Node]
    nonnegative: set[fx.Node]


def _simpler(node: fx.Node, facts: _Facts) -> fx.Node | None:
    match node.target, node.args:
        case aten.where.self, (condition, _, fx.Node() as kept):
            return kept if kept in facts.finite and _is(condition, aten.isinf.default, kept) else None
        case aten.threshold_backward.default, (fx.Node() as kept, decides, 0):  # the positive part
            return kept if kept in facts.nonnegative and _is_sign(decides, kept) else None
        case aten.mul.Tensor, (fx.Node() as x, 1):
            return x
        case aten.detach.default, (fx.Node() as x,):
            return None if facts.exact else x
        case operator.getitem, (fx.Node(target=aten.convolution_backward.default) as backward, 0):
            return _transposed(backward, node)
        case aten.mul.Tensor, (fx.Node() as x, fx.Node() as masked):
            for z, m in ((x, masked), (masked, x)):
                if m.target is not aten.threshold_backward.default or m.args[2] != 0:
                    continue
                after: Any = m.args[1]
                if after.target is aten.relu.default and (after is z or after.args == (z,)):
                    folded = node.graph.call_function(aten.mul.Tensor, (m.args[1], m.args[0]))
                    folded.meta = dict(node.meta)
                    return folded
    return None


def _is_sign(node: Any, x: fx.Node) -> bool:
    """Whether `node` is `x.detach().sign() + 0.5`, as in the positive part of `x`."""
    match node:
        case fx.Node(target=aten.add.Tensor, args=(fx.Node(target=aten.sign.default, args=(of,)), 0.5)):
            return of is x or _is(of, aten.detach.default, x)
    return False


def _transposed(backward: fx.Node, result: fx.Node) -> fx.Node | None:
    """The VJP of a convolution as the transposed convolution that it is: `vmap` need not make up an input for it."""
    grad, x, weight, _, stride, padding, dilation, transposed, _, groups, wanted = backward.args
    if wanted != [True, False, False] or any(n.meta.get("val") is None for n in (grad, x, weight)):  # type: ignore[union-attr]
        return None
    sizes, kernel, given = (n.meta["val"].shape[2:] for n in (x, weight, grad))  # type: ignore[union-attr]
    over = zip(sizes, kernel, given, stride, padding, dilation, strict=False)  # type: ignore[arg-type]
    extra = [size - ((g - 1) * s - 2 * p + d * (k - 1) + 1) for size, k, g, s, p, d in over]
    if len(extra) != len(sizes) or not all(isinstance(size, int) for size in extra):  # open sizes may leave it open
        return None
    left = [0] * len(extra) if transposed else extra
    args = (grad, weight, None, stride, padding, dilation, not transposed, left, groups)
    node = result.graph.call_function(aten.convolution.default, args)
    node.meta = dict(result.meta)
    return node


def _is(node: Any, target: Any, *args: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target and node.args == args
