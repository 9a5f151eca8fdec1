"""Batch norm, dropout, attention and what a trace after dispatch has in their place: handlers of their own."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from lrpfunc._capture.default import apart, default
from lrpfunc._capture.state import Handler, State
from lrpfunc._ops.call import operation_name
from lrpfunc._ops.functions import (
    batch_norm_eval,
    batch_norm_train,
    batch_statistics,
    dropout_mask,
    instance_statistics,
    scaled_dot_product_attention,
)
from lrpfunc._torch import aten, schema

# -- dropout


def _dropout(state: State, node: fx.Node) -> None:
    """A product with a mask of random numbers, which is one draw whatever becomes of it."""
    x, p, training = state.operands(node)[0]
    name = operation_name(node)
    old: Any = node.args[0]
    if not (p and training):
        # The result is the operand itself, and a write to one is a write to both.
        return state.define_view(node, x, old)
    if "alpha" in name:
        return default(state, node)
    like = node.meta["val"]
    mask = state.emit(dropout_mask, (x, p, name.removesuffix("_")), None, like)
    new = state.emit(aten.mul.Tensor, (x, mask), None, like)
    if name.endswith("_"):
        state.write(old, new)
        state.define_view(node, state.read(old), old)
    else:
        state.define(node, new)


def _native_dropout(state: State, node: fx.Node) -> None:
    x, p, training = state.operands(node)[0]
    if training is False:
        return default(state, node)
    like, kept = node.meta["val"]
    mask = state.emit(dropout_mask, (x, p, "dropout"), None, like)
    new = state.emit(aten.mul.Tensor, (x, mask), None, like)
    state.define(node, (new, state.emit(aten.ne.Scalar, (mask, 0), None, kept)))


# -- normalizations


def _batch_norm(state: State, node: fx.Node) -> None:
    """Apart for training and evaluation, with the update of the statistics as a write to them."""
    state.define(node, _normalized(state, node, state.operands(node)[0], node.meta["val"]))


def _batch_norm_kernel(kernel: Any) -> Handler:
    """The same in a trace after dispatch; `kernel` is what returns the statistics too and writes to nothing."""

    def handler(state: State, node: fx.Node) -> None:
        args = state.operands(node)[0]
        if node.target is aten._native_batch_norm_legit.no_stats:
            args = (*args[:3], None, None, *args[3:])
        x, weight, bias, mean, var, training, momentum, eps, *_ = args
        new = _normalized(state, node, args, node.meta["val"][0])
        statistics = (None, None) if training else (mean, var)  # a kernel would write to them
        _define_results(state, node, new, kernel, (x, weight, bias, *statistics, training, momentum, eps))

    return handler


def _batch_norm_eval(state: State, node: fx.Node) -> None:
    """That of exported programs."""
    args = state.operands(node)[0]
    x, weight, bias, mean, var, _, eps = args
    new = state.emit(batch_norm_eval, (x, weight, bias, mean, var, eps), None, node.meta["val"][0])
    _define_results(state, node, new, node.target, args)


def _normalized(state: State, node: fx.Node, args: Any, like: Any) -> fx.Node:
    x, weight, bias, mean, var, training, momentum, eps, *_ = args
    if not training:
        return state.emit(batch_norm_eval, (x, weight, bias, mean, var, eps), None, like)
    new = state.emit(batch_norm_train, (x, weight, bias, eps), None, like)
    _update(state, node, batch_statistics, (x, mean, var, momentum))
    return new


def _instance_norm(state: State, node: fx.Node) -> None:
    x, weight, bias, mean, var, training, momentum, *rest = state.operands(node)[0]
    if not training:
        return default(state, node)
    target: Any = node.target
    state.define(node, state.emit(target, (x, weight, bias, None, None, True, momentum, *rest), None, node.meta["val"]))
    _update(state, node, instance_statistics, (x, mean, var, momentum))


def _update(state: State, node: fx.Node, statistics: Any, args: Any) -> None:
    """The update of running statistics as a write to them, which the schemas do not say."""
    if not any(isinstance(old, fx.Node) for old in node.args[3:5]):
        return
    new = state.emit(statistics, args, None, None)
    for index, old in enumerate(node.args[3:5]):
        if isinstance(old, fx.Node):
            state.write(old, state.emit(operator.getitem, (new, index), None, old.meta["val"]))


# -- kernels of several results


def _fused(whole: Any) -> Handler:
    """A kernel that also returns what its backward reads, as the operation that it is of."""

    def handler(state: State, node: fx.Node) -> None:
        args, kwargs = state.operands(node)
        new = state.emit(whole, args, kwargs, node.meta["val"][0])
        _define_results(state, node, new, node.target, args, kwargs)

    return handler


def _attention(state: State, node: fx.Node) -> None:
    """A fused kernel as the operation that chose it."""
    args, kwargs = state.operands(node)
    call = dict(zip((a.name for a in schema(node.target).arguments), args, strict=False)) | kwargs
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults = {"attn_mask": call.get("attn_bias"), "dropout_p": 0.0, "is_causal": False}
    operands = [call.get(name, defaults.get(name)) for name in names]
    heads = [call[name].meta["val"].shape[-3] for name in ("query", "key")]
    new = state.emit(
        scaled_dot_product_attention,
        apart(state, tuple(operands)),
        {"scale": call.get("scale"), "enable_gqa": heads[0] != heads[1]},
        node.meta["val"][0],
    )
    _define_results(state, node, new, node.target, args, kwargs)


def _define_results(
    state: State, node: fx.Node, first: fx.Node, kernel: Any, args: Any, kwargs: dict[str, Any] | None = None
) -> None:
    """Says that the first result of a kernel is `first`.

    The others are read by the kernels of derivatives inside the model function. Those have, as derivatives of
    their own with respect to the input, all of what depends on it.
    """
    whole = state.emit(kernel, args, kwargs, node.meta["val"])
    results = [first]
    for index, like in enumerate(node.meta["val"][1:], 1):
        result = state.emit(operator.getitem, (whole, index), None, like)
        results.append(state.emit(aten.detach.default, (result,), None, like))
    state.define(node, tuple(results))


_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")

KERNELS: dict[str, Handler] = {
    **dict.fromkeys(_DROPOUTS, _dropout),
    **dict.fromkeys((f"{name}_" for name in _DROPOUTS), _dropout),
    "native_dropout": _native_dropout,
    "batch_norm": _batch_norm,
    "native_batch_norm": _batch_norm_kernel(aten.native_batch_norm.default),
    "_native_batch_norm_legit": _batch_norm_kernel(aten.native_batch_norm.default),
    "_native_batch_norm_legit_no_training": _batch_norm_eval,
    "cudnn_batch_norm": _batch_norm_kernel(aten.cudnn_batch_norm.default),
    "instance_norm": _instance_norm,
    "native_layer_norm": _fused(aten.layer_norm.default),
    "log_sigmoid_forward": _fused(aten.log_sigmoid.default),
}
"""By the name of the operation."""

ATTENTION_KERNELS: dict[str, Handler] = {
    f"_scaled_dot_product_{name}": _attention
    for name in (
        *("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"),
        *("fused_attention_overrideable", "attention_math", "attention_math_for_mps"),
    )
}
"""Those of a trace after dispatch. Before it, a model that calls one means that one and no other."""
