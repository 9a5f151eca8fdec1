"""Lets the walk write into tensors that nothing else needs.

In the walk of `cut`'s example,

    mul = aten.mul.Tensor(output, start)                   mul = aten.mul.Tensor(output, start)
    mm = aten.mm.default(relu, positive)                   mm = aten.mm.default(relu, positive)
    clamp_min = aten.clamp_min.default(mm, 0)              clamp_min = aten.clamp_min.default(mm, 0)
    add = aten.add.Tensor(clamp_min, 1e-06)         ->     add = aten.add_.Tensor(clamp_min, 1e-06)
    div = aten.div.Tensor(mul, add)                        div = aten.div_.Tensor(mul, add)

`mul` itself is new, since `output` is a value of the forward pass, which the caller has.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from lrpfunc._lower.joint import Joint
from lrpfunc._torch import aten

_IN_PLACE: dict[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.sign.default: aten.sign_.default,
    aten.neg.default: aten.neg_.default,
}

_COMMUTES = (aten.add.Tensor, aten.mul.Tensor)

_ELEMENTWISE = (aten.clamp_min.default, aten.relu.default, aten.threshold_backward.default, aten.where.self)

_OF_ITS_OWN = {*_IN_PLACE, *_IN_PLACE.values(), *_ELEMENTWISE, aten.convolution.default}

_MAKES_NO_VIEW = _OF_ITS_OWN | {
    aten.convolution_backward.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.mm.default,
    aten.isinf.default,
    aten.lt.Scalar,
    aten.eq.Scalar,
}


def reuse_memory(joint: Joint, kept: set[fx.Node]) -> None:
    """Lets arithmetic of the walk write into an operand that nothing else needs, if no derivative is taken.

    Large tensors are slow to allocate. What is written to is never an input, nor a value of the forward pass; nor is
    it written to by what depends on the start if it does not itself, since the start may be mapped over.

    Args:
        joint: The graph.
        kept: What is kept from call to call, and must not be written to.
    """
    order = {node: index for index, node in enumerate(joint.graph.nodes)}
    started = set(joint.start)
    for node in joint.graph.nodes:
        if not started.isdisjoint(node.all_input_nodes):
            started.add(node)
        if node in joint.early or node.target not in _IN_PLACE:
            continue
        operands = node.args if node.target in _COMMUTES and not node.kwargs else node.args[:1]
        nodes = [x for x in operands if isinstance(x, fx.Node) and x not in kept]
        if node in started:
            nodes = [x for x in nodes if x in started]
        written = next((x for x in nodes if _is_free(x, node, joint, order)), None)
        if written is not None:
            others = [x for x in node.args if x is not written]
            node.args = (written, *others)
            node.target = _IN_PLACE[node.target]


def _is_free(x: fx.Node, node: fx.Node, joint: Joint, order: dict[fx.Node, int]) -> bool:
    """Whether `x` is a tensor of its own, like the result of `node`, which is the last to use it."""
    made_by = x.args[0].target if x.target is operator.getitem else x.target  # type: ignore[union-attr]
    own = made_by in _OF_ITS_OWN or (x.target is operator.getitem and made_by is aten.convolution_backward.default)
    if not own or x in joint.early or x in joint.relevance or node.args.count(x) != 1:
        return False
    like, value = node.meta.get("val"), x.meta.get("val")
    if like is None or value is None or (like.shape, like.dtype) != (value.shape, value.dtype):
        return False
    return all(user.target in _MAKES_NO_VIEW and order[user] <= order[node] for user in x.users)
