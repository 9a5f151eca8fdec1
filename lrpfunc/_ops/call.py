"""Calls of operators: by which name, in which place of one another, and under which modes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from lrpfunc._ops.functions import (
    as_computed,
    attention_written_out,
    batch_norm_affine,
    batch_norm_eval,
    hardsigmoid,
    index_copy_winners,
    index_put_winners,
    scaled_dot_product_attention,
    scatter_winners,
    written_out,
)
from lrpfunc._torch import aten, schema


def operation_name(node: fx.Node) -> str:
    """`"conv2d"` for a call of `aten.conv2d.default`; the function's name for a function of ours."""
    return operation_name_of(node.target)


def operation_name_of(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", str(target))


REWRITTEN: dict[Any, Any] = {
    aten.hardsigmoid.default: hardsigmoid,
    aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
}

IN_WALK: dict[Any, Any] = {
    as_computed: written_out,
    scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    batch_norm_eval: batch_norm_affine,
    aten.index_put.default: index_put_winners,
    aten.scatter.src: scatter_winners,
    aten.index_copy.default: index_copy_winners,
}
"""What the walk backwards evaluates in place of an operation of the forward pass."""

EXACT: dict[Any, Any] = {scaled_dot_product_attention: attention_written_out}
"""What it evaluates if the VJP will be differentiated with respect to its cotangent, or vmapped over it."""


@contextlib.contextmanager
def _surroundings(node: fx.Node) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if node.meta.get("no_grad"):
            stack.enter_context(torch.no_grad())
        for device, dtype, enabled, cache in node.meta.get("autocast", ()):
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield


def call(node: fx.Node, args: Any, kwargs: Any, *, exact: bool | None = None) -> Any:
    """Calls a node's operation, under the grad mode and autocast it was written under.

    The walk says whether it must be `exact`, that is, have derivatives of its VJP too.
    """
    target: Any = node.target
    if exact is not None:
        target = EXACT[target] if exact and target in EXACT else IN_WALK.get(target, target)
    if node.meta.get("no_grad") or node.meta.get("autocast"):
        with _surroundings(node):
            return target(*args, **kwargs)
    return target(*args, **kwargs)


def _argument(node: fx.Node, name: str) -> Any:
    """The argument of that name, `None` if it is left to its default."""
    return argument_of(node.target, node.args, node.kwargs, name)


def argument_of(target: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    declared = schema(target)
    order = [a.name for a in declared.arguments] if declared else list(inspect.signature(target).parameters)
    position = order.index(name) if name in order else len(args)
    return args[position] if position < len(args) else kwargs.get(name)


def is_random(node: fx.Node) -> bool:
    """Whether calling the node again gives another result."""
    node = getattr(node.target, "node", node)  # of an operation that runs under a mode
    name = operation_name(node)
    if name.endswith("backward"):
        return False
    if "scaled_dot_product" in name:
        return bool(_argument(node, "dropout_p"))
    if name in ("alpha_dropout", "feature_alpha_dropout"):
        return bool(node.args[1] and node.args[2])
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        dropout, training = node.args[5:7]
        return bool(dropout) and bool(training)
    if name == "rrelu":
        return True in node.args[3:4]
    tags = getattr(node.target, "tags", ())
    return name == "dropout_mask" or (torch.Tag.nondeterministic_seeded in tags and name != "dropout")
