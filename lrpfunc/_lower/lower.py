"""The forward pass and the walk back as one flat program of plain operations, cut where relevance starts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._capture.isolation import is_capturing
from lrpfunc._capture.numbers import has_numbers
from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.graph import Graph
from lrpfunc._layers.layer import Layer
from lrpfunc._lower.bound import Bound
from lrpfunc._lower.cut import Programs, cut, recompute
from lrpfunc._lower.joint import Joint, join
from lrpfunc._lower.narrow import narrowed
from lrpfunc._lower.passes import simplify
from lrpfunc._lower.pieces import Elsewhere, pieced, repeats
from lrpfunc._lower.retrace import Traced, retrace
from lrpfunc._ops.call import of
from lrpfunc._ops.derivatives import vjp
from lrpfunc._ops.functions import scaled_dot_product_attention
from lrpfunc._torch import constant, is_differentiated, mapped_over, unseen
from lrpfunc._walk.assign import Assignment
from lrpfunc._walk.forward import Forward, on_numbers, relevance, walk
from lrpfunc._walk.rows import is_apart, within_all
from lrpfunc.rules._message import Message


def lower(
    graph: Graph,
    rules: Assignment,
    tensors: Sequence[Tensor],
    form: type[Message],
    given: Sequence[Tensor] = (),
    *,
    bound: Bound | None = None,
    segments: int = 1,
    reuse: bool = False,
    exact: bool = False,
) -> Forward:
    """The forward pass and the walk as flat programs, made at the first call for a signature; the first is run.

    Args:
        graph: The layers.
        rules: Their rules.
        tensors: What the program is run on.
        form: The form of the messages that relevance will start with.
        given: The tensors, if they are known, that those are made of.
        bound: The first of the tensors, if they are bound.
        segments: In how many parts the walk computes the forward pass anew; with 1 it does not.
        reuse: Whether the walk will be taken several times: what it always computes is then computed once.
        exact: Whether the walk must have all derivatives, though no tensor known so far is differentiated.
    """
    program = graph.program
    count = 0 if bound is None else bound.count
    inputs: list[Any] = [*tensors[count:], *constant(rules.tensors)]
    exact = exact or reuse or any(map(is_differentiated, (*tensors[:count], *inputs, *given)))
    programs = _fitting_programs(graph, rules, tensors, (form, count, segments, exact, reuse))
    prepared = [] if bound is None else bound.prepared(programs, list(tensors[:count]))
    results = programs.forward([*prepared, *inputs, *program.sizes(tensors)])
    ends = len(program.outputs), len(program.outputs) + len(program.aux)
    output, aux = program.output(results[: ends[0]]), program.aux_output(results[ends[0] : ends[1]])
    saved = list(results[ends[1] :])
    del results

    def pull(start: Sequence[Message]) -> Any:
        if not exact and any(is_differentiated(message.value) for message in start):
            again = lower(graph, rules, tensors, form, bound=bound, segments=segments, exact=True)
            return again.pull(start)
        values = [message.value for message in start]
        walk = programs.frugal if _may_write(saved, values) else programs.walk
        needed = [*saved, *values]
        if not reuse:
            saved.clear()  # so that the walk can free each tensor that it is past
        return graph.answer(walk(needed))

    def narrow(start: Sequence[Message], picked: Tensor) -> Any:
        part = _part(programs, graph, tensors, saved, picked)
        if part is None:
            return None
        values = [message.value for message in start]
        walk = programs.frugal if _may_write(part, values) else programs.walk
        return graph.answer(walk([*part, *values]))

    def rows(start: Sequence[Message], picked: Tensor) -> Any:
        whole = partial(within_all, graph, pull, output)
        if reuse and graph.apart.get(rules.key) is None and has_numbers(saved):
            graph.apart.put(rules.key, is_apart(narrow, whole, form, output))
        answer = narrow(start, picked) if reuse and graph.apart.get(rules.key) else None
        return whole(start, picked) if answer is None else answer

    return Forward(output, aux, pull, rows, program.is_random)


def _part(
    programs: Programs, graph: Graph, tensors: Sequence[Tensor], saved: Sequence[Any], rows: Tensor
) -> list[Any] | None:
    """What the walk needs for some samples alone, if it can be told apart."""
    shapes = graph.program.shapes
    batch = None if shapes is None else shapes.batch(graph.program.outputs[0].meta["val"])
    if shapes is None or batch is None or not len(rows):
        return None
    sizes = dict(zip(shapes.symbols, shapes.sizes(tensors), strict=True))
    return narrowed(saved, programs.saved, batch, sizes, rows)


class Unfit(Exception):
    """A program that leaves sizes open turned out not to serve these."""


def fitting(forward: Forward, again: Callable[[], Forward]) -> Forward:
    """The same, but `again()` is pulled if what a derivative needs turns out not to serve these sizes."""

    def pull(start: Sequence[Message]) -> Any:
        try:
            return forward.pull(start)
        except Unfit:
            return again().pull(start)

    def rows(start: Sequence[Message], picked: Tensor) -> Any:
        try:
            return forward.rows(start, picked)
        except Unfit:
            return again().rows(start, picked)

    return replace(forward, pull=pull, rows=rows)


def _fitting_programs(
    graph: Graph, rules: Assignment, tensors: Sequence[Tensor], signature: tuple[Any, ...]
) -> Programs:
    """The programs, if they are right for the sizes of these tensors: some step may have taken sizes for numbers.

    Raises:
        Unfit: If not. The recording is then of no use for these sizes, and another is to be made.
    """
    shapes = graph.program.shapes
    try:
        with unseen(shapes is not None):
            programs = _programs(graph, rules, *signature)
    except Exception as error:  # of whatever kind: it comes again without open sizes, if it is about something else
        if shapes is None:
            raise
        shapes.give_up(error)
        raise Unfit from None
    if not graph.program.fits(tensors):
        raise Unfit
    return programs


def _programs(
    graph: Graph, rules: Assignment, form: type[Message], count: int, segments: int, exact: bool, reuse: bool
) -> Programs:
    """The programs for a signature, from the graph's cache if they have been made."""
    key = (rules.key, form, count, segments, exact, reuse)
    programs = graph.programs.get(key)
    if programs is None and is_capturing():  # where none can be made, one that can do more will do
        programs = graph.programs.get((*key[:-2], True, reuse))
    if programs is None:
        joint, stable = _joint(graph, rules, form, exact)
        if segments > 1:
            recompute(joint, segments)
        programs = cut(joint, count, reuse=reuse, exact=exact)
        if stable and rules.stable:
            graph.programs.put(key, programs)
    return programs


def _may_write(saved: Sequence[Any], start: Sequence[Tensor]) -> bool:
    """Whether the walk may write into its tensors: nobody takes derivatives, and all or none of it is mapped over."""
    if torch.compiler.is_compiling() or len(levels := set(map(mapped_over, start))) > 1:
        return False
    return None not in levels and all(mapped_over(t) == frozenset() for t in saved if isinstance(t, Tensor))


def _joint(graph: Graph, rules: Assignment, form: type[Message], exact: bool) -> tuple[Joint, bool]:
    shared = [layer for layer in graph.layers if _can_share(layer, exact) and _goes_through(layer, rules)]
    traced = None
    if repeats(graph):
        with contextlib.suppress(Elsewhere):
            traced = pieced(graph, rules, form, _evaluated, shared, exact)
    if traced is None:
        traced = _whole(graph, rules, form, shared, exact)
    joint = join(graph.program, list(_leaves(graph.program.nodes)), traced, [layer.output for layer in shared])
    simplify(joint, exact)
    return joint, traced.stable


def _whole(graph: Graph, rules: Assignment, form: type[Message], shared: Sequence[Layer], exact: bool) -> Traced:
    """The walk as operations, traced in one go: relevance, and then how it would compute the `shared` layers."""
    nodes = graph.program.nodes
    values, spec = tree.flatten([node.meta["val"] for node in nodes])
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]

    def traced(tensors: list[Tensor], start: list[Tensor]) -> list[Tensor]:
        given = dict(zip(places, tensors, strict=True))
        filled = tree.unflatten([given.get(i, value) for i, value in enumerate(values)], spec)
        known = dict(zip(nodes, filled, strict=True))
        messages = [form(m) for m in start]  # type: ignore[call-arg]
        arrived = walk(graph, rules, messages, on_numbers(known, exact=exact))
        results = [relevance(graph, node, rules, known, arrived) for node in graph.requested]
        return [*results, *(_evaluated(BoundLayer(layer, known, exact)) for layer in shared)]

    starts = [node.meta["val"] for node in graph.program.outputs]
    return retrace(traced, [values[place] for place in places], starts, rules.composite)


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
    return of(node).in_walk is None


def _goes_through(layer: Layer, rules: Assignment) -> bool:
    """Whether relevance does: what stops it may have no VJP."""
    return layer in rules.rules and bool(rules.rules[layer].receivers(layer))


def _evaluated(layer: BoundLayer) -> Tensor:
    output, _ = vjp(layer.function(layer.layer.inputs), *layer.inputs)
    return output if isinstance(output, Tensor) else output[0]
