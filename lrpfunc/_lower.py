"""The forward pass and the walk back as one flat program of plain operations, cut where relevance starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from lrpfunc._call import Call
from lrpfunc._capture import is_capturing, isolated, retrace, surroundings
from lrpfunc._cut import Programs, cut, recompute
from lrpfunc._environment import Environment
from lrpfunc._forward import Forward, relevance, walk
from lrpfunc._joint import Joint, Written, join
from lrpfunc._layer import BoundLayer, Layer
from lrpfunc._message import Message
from lrpfunc._operations import EXACT, IN_WALK, scaled_dot_product_attention
from lrpfunc._passes import simplify
from lrpfunc._propagate import assign
from lrpfunc._torch import constant, hashable, is_differentiated, map_arg, mapped_over, vjp


class _Expression:
    """What a tensor is made of: one object for each expression."""


class Bound:
    """What the programs of a relevance function made of the arguments that are bound.

    Programs for several shapes, or kinds of target, make much the same of them, such as clamped weights: what is one
    expression of the bound arguments is kept once, for as long as one of the programs is.

    Args:
        count: How many tensors are bound, the first of the arguments.
    """

    def __init__(self, count: int):
        self.count = count
        self._prepared: WeakKeyDictionary[Programs, tuple[Tensor, ...]] = WeakKeyDictionary()
        self._expressions: WeakValueDictionary[Any, _Expression] = WeakValueDictionary()
        self._made: WeakValueDictionary[_Expression, Tensor] = WeakValueDictionary()

    def prepared(self, programs: Programs, tensors: list[Tensor]) -> list[Tensor]:
        if programs not in self._prepared:
            wanted = self._wanted(programs.prepare.graph)
            found = [self._made.get(expression) for expression in wanted]
            if any(tensor is None for tensor in found):
                made = isolated(lambda: programs.prepare.forward(tensors))
                found = [new if old is None else old for new, old in zip(made, found, strict=True)]
            self._made.update(zip(wanted, found, strict=True))
            self._prepared[programs] = tuple(found)
        return constant(self._prepared[programs])

    def _wanted(self, graph: fx.Graph) -> list[_Expression]:
        """What each output of `graph` is made of."""
        around = tuple(surroundings())
        expressions: dict[fx.Node, Any] = {}
        for index, node in enumerate(graph.nodes):
            if node.op in ("placeholder", "call_function"):
                target = node.target.key if isinstance(node.target, Written) else node.target
                operands = map_arg(hashable((node.args, node.kwargs)), expressions.__getitem__)
                key = index if node.op == "placeholder" else (target, operands, around)
                expressions[node] = self._expressions.setdefault(key, _Expression())
            elif node.op == "get_attr":
                expressions[node] = _Expression()
        return [expressions[node] for node in graph.output_node().args[0]]  # type: ignore[union-attr]


def lowered(
    call: Call,
    form: type[Message],
    given: Sequence[Tensor] = (),
    *,
    bound: Bound | None = None,
    segments: int = 1,
    reuse: bool = False,
    exact: bool = False,
) -> Forward:
    """The forward pass and the walk as flat programs, built at the first call for a signature.

    Args:
        call: What to run.
        form: The form of the messages that relevance will start with.
        given: The tensors, if they are known, that those are made of.
        bound: The first arguments, if they are bound.
        segments: In how many parts the walk computes the forward pass anew; with 1 it does not.
        reuse: Whether the walk will be taken several times: what it always computes is then computed once.
        exact: Whether the walk must have all derivatives, though no tensor known so far is differentiated.
    """
    environment = Environment(call.composite, transformed=True)
    count = 0 if bound is None else bound.count
    inputs = [*call.arguments[count:], *call.program.enclosed(call.closed), *constant(environment.tensors)]
    exact = exact or reuse or any(map(is_differentiated, (*call.arguments[:count], *inputs, *given)))
    key = (environment.key, form, call.requested, count, segments, exact, reuse)
    programs = call.graph.lowered.get(key)
    if programs is None and is_capturing():  # where none can be made, one that can do more will do
        programs = call.graph.lowered.get((*key[:-2], True, reuse))
    if programs is None:
        joint, stable = _joint(call, form, exact)
        if segments > 1:
            recompute(joint, segments)
        programs = cut(joint, count, reuse=reuse, exact=exact)
        if stable:
            call.graph.lowered.put(key, programs)
    prepared = [] if bound is None else bound.prepared(programs, call.arguments[:count])
    results = programs.forward([*prepared, *inputs])
    ends = len(call.program.outputs), len(call.program.outputs) + len(call.program.aux)
    outputs, aux, saved = list(results[: ends[0]]), list(results[ends[0] : ends[1]]), list(results[ends[1] :])
    del results

    def pull(start: Sequence[Message]) -> list[Tensor]:
        if not exact and any(is_differentiated(message.value) for message in start):
            return lowered(call, form, bound=bound, segments=segments, exact=True).pull(start)
        values = [message.value for message in start]
        program = programs.frugal if _may_write(saved, values) else programs.walk
        needed = [*saved, *values]
        if not reuse:
            saved.clear()  # so that the walk can free each tensor that it is past
        return list(program(needed))

    return Forward(outputs, aux, pull)


def _may_write(saved: Sequence[Any], start: Sequence[Tensor]) -> bool:
    """Whether the walk may write into its tensors: nobody takes derivatives, and all or none of it is mapped over."""
    if torch.compiler.is_compiling() or len(levels := set(map(mapped_over, start))) > 1:
        return False
    return None not in levels and all(mapped_over(t) == frozenset() for t in saved if isinstance(t, Tensor))


def _joint(call: Call, form: type[Message], exact: bool) -> tuple[Joint, bool]:
    program, graph = call.program, call.graph
    nodes = program.nodes
    values, spec = pytree.tree_flatten([node.meta["val"] for node in nodes])
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    shared = [layer for layer in graph.layers if _can_share(layer, exact)]

    def traced(tensors: list[Tensor], start: list[Tensor]) -> list[Tensor]:
        given = dict(zip(places, tensors, strict=True))
        filled = pytree.tree_unflatten([given.get(i, value) for i, value in enumerate(values)], spec)
        known = dict(zip(nodes, filled, strict=True))
        messages = [form(m) for m in start]  # type: ignore[call-arg]
        arrived = walk(call, assign(graph, call.composite), known, messages, exact=exact)
        return [*relevance(call, arrived, known), *(_evaluated(layer, known, exact) for layer in shared)]

    starts = [node.meta["val"] for node in program.outputs]
    module, stable = retrace(traced, [values[place] for place in places], starts, call.composite)
    joint = join(program, list(_leaves(nodes)), module, [layer.output for layer in shared])
    simplify(joint, exact)
    return joint, stable


def _leaves(nodes: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, int | None]]:
    """The tensors among the values of `nodes`: the node, and the place in its result if that has several."""
    for node in nodes:
        if isinstance(node.meta["val"], Tensor):
            yield node, None
        elif isinstance(node.meta["val"], (list, tuple)):
            yield from ((node, place) for place, value in enumerate(node.meta["val"]) if isinstance(value, Tensor))


# An operation may compute more than its output, such as the indices of a maximum, which its VJP computes anew. If the
# forward pass is made to keep that, the walk need not.


def _can_share(layer: Layer, exact: bool) -> bool:
    node = layer.nodes[0]
    if len(layer.nodes) > 1 or len(layer.outputs) > 1 or layer.affine is not None or node.meta["autocast"]:
        return False
    if node.target is scaled_dot_product_attention:
        return not exact
    return node.target not in IN_WALK and node.target not in EXACT


def _evaluated(layer: Layer, values: Any, exact: bool) -> Tensor:
    bound = BoundLayer(layer, values, exact)
    output, _ = vjp(bound.function(layer.inputs), *bound.inputs)
    return output if isinstance(output, Tensor) else output[0]
