"""The walk as plain operations.

The walk is Python: rules, messages and `torch.func.vjp`. Run on fake tensors, it leaves the operations that it comes
to. For `torch.relu(x @ w)`, explained by `gradient()`, the values of the program's nodes and the start go in,

    w, x, product, output, start

and what remains of two layers and two VJPs is

    relu = aten.relu.default(product)                                       # the VJP of the ReLU runs it once more
    threshold_backward = aten.threshold_backward.default(start, relu, 0)
    mm = aten.mm.default(x, w)                                              # and that of the product too
    t = aten.t.default(w)
    mm_1 = aten.mm.default(threshold_backward, t)
    return mm_1

A VJP runs its function, whose values the forward pass has already. That is left for `passes` to see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrpfunc._capture.environment import Environment
from lrpfunc._capture.isolation import alone, isolated
from lrpfunc._capture.shapes import inlined
from lrpfunc._capture.trace import VALUE_DEPENDENT, is_fake
from lrpfunc._capture.watch import Watch
from lrpfunc._errors import RuleError, opaque
from lrpfunc._ops.symbols import environment_of, is_unknown
from lrpfunc._torch import FakeTensorMode, aten, fake_mode, keeping_symbols, make_fx, schema

_OF_NUMBERS = (
    "a rule depends on the numbers inside a tensor (`if z.sum() > 0:`, `float(z)`, `x[int(i)]`), which are not known "
    "when the walk is traced. Write it with torch.where, or with a tensor for an index, or walk operation by "
    "operation:\n\n"
    "    lrpfunc.attribute(model_fn, rules, lowered=False)"
)


@dataclass(frozen=True)
class Traced:
    """What a walk comes to.

    Attributes:
        graph: Its operations.
        constants: The tensors that the graph reads by name.
        stable: Whether it may be used again: not if a number inside a tensor became part of it.
    """

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    stable: bool


def retrace(
    walk: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    tensors: Sequence[Tensor],
    start: Sequence[Tensor],
    rules: Any,
) -> Traced:
    """A function of tensors as plain operations, which have all the derivatives that it has.

    It may use torch.func and read the tensors in `rules`, which are the last inputs of the result. Operations are
    recorded after dispatch: a trace before it does not see the levels of transforms.
    """
    watches: list[Watch] = []
    environment = Environment(rules, transformed=True, remember=True)

    def trace() -> fx.GraphModule:
        shapes = environment_of([*tensors, *start])
        mode = fake_mode(shapes)
        # Each is a tensor of its own: a trace takes what is the same object for the same value.
        fakes = [[_fake(tensor, mode) for tensor in group] for group in (tensors, start, environment.tensors)]

        def watched(tensors: list[Tensor], start: list[Tensor], lifted: list[Tensor]) -> list[Tensor]:
            watch = Watch({id(real): fake for real, fake in zip(environment.tensors, lifted, strict=True)})
            watches.append(watch)
            with watch:
                return walk(tensors, start)

        functional: Any = torch.func.functionalize(watched, remove="mutations")
        with mode, keeping_symbols(None, shapes is not None):
            return make_fx(functional, _allow_non_fake_inputs=True, decomposition_table={})(*fakes)

    try:
        with alone():
            module = isolated(trace)
    except Exception as error:
        if type(error).__name__ in VALUE_DEPENDENT:
            raise RuleError(_OF_NUMBERS) from error
        if isinstance(error, RuntimeError) and ("custom_function_call" in str(error) or "autograd.F" in str(error)):
            raise opaque() from error
        raise
    finally:
        environment.forget(is_fake)
    if watches[-1].no_grad:
        raise RuleError(
            "a rule computes under torch.no_grad(), which a trace does not keep: the derivatives of relevance would "
            "not stop there. Write x.detach(), or walk operation by operation:\n\n"
            "    lrpfunc.attribute(model_fn, rules, lowered=False)"
        )
    if any(is_unknown(node.meta.get("val")) for node in module.graph.nodes):
        raise RuleError(_OF_NUMBERS)
    inlined(module.graph)
    for node in module.graph.nodes:
        # A product with a vector ends in this: no new numbers, and what is changed is the trace's own.
        if node.target is aten.squeeze_.dim:
            node.target = aten.squeeze.dim
    if written := [node.name for node in module.graph.nodes if _writes(node)]:
        raise RuleError(
            f"a rule changes in place a tensor that it was given ({written[0]}), such as the weights of the model. A "
            "function that is transformed must leave its arguments alone: for `weight.clamp_(min=0)`, write "
            "`weight = weight.clamp(min=0)`"
        )
    constants = {n.target: getattr(module, n.target) for n in module.graph.nodes if n.op == "get_attr"}
    return Traced(module.graph, constants, stable=not watches[-1].reads)


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        if tensor.layout is not torch.strided:
            return torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, device=tensor.device)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _writes(node: fx.Node) -> bool:
    declared = schema(node.target)
    return declared is not None and declared.is_mutable
