"""What is asked of a program: which layers it has between what is explained and the output."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from lrpfunc._api.arguments import Explained
from lrpfunc._api.selected import selected
from lrpfunc._capture.program import Program, is_float
from lrpfunc._errors import CaptureError, InputError, NoPathError
from lrpfunc._layers.graph import Graph, build_graph
from lrpfunc._layers.layer import Layer
from lrpfunc._ops.call import is_random


def recognise(program: Program, explained: Explained, layers: tuple[str, ...]) -> Graph:
    """The layers of a program between what is explained and the output."""
    key = (explained.key, layers)
    graph = program.graphs.get(key)
    if graph is None:
        graph = _recognised(program, explained, layers)
        program.graphs.put(key, graph)
    return graph


def _recognised(program: Program, explained: Explained, globs: tuple[str, ...]) -> Graph:
    _check_output(program)
    sources = [None if place is None else program.inputs[place] for place in explained.positions]
    taps = [n for n, is_tap in zip([s for s in sources if s], explained.parameters, strict=True) if is_tap]
    data = [n for n in sources if n is not None and n not in taps]
    if taps and not data:
        data = [program.inputs[place] for place in explained.others]
    if explained.integers:
        data += _first_numbers(program, {program.inputs[place] for place in explained.integers})
    graph = build_graph(program, data, taps, sources, explained.spec)
    if misread := [layer for layer in graph.layers if _takes_as_input(layer)]:
        raise InputError(
            "argument 0 is taken to be parameters, because another argument has floating-point tensors, but the layer"
            f"\n\n    {misread[0]}\n\ntakes it as its input. Parameters come first: for a function of several inputs "
            "without parameters write\n\n"
            "    lrpfunc.attribute(lambda _, x, y: f(x, y), rules, argnums=(1, 2))(None, x, y)"
        )
    if random := [layer for layer in graph.layers if any(map(is_random, layer.nodes))]:
        raise CaptureError(
            f"the layer\n\n    {random[0]}\n\ndraws random numbers inside, so that relevance would belong to another "
            "draw than the output. Call module.eval(), or write its dropout with torch.nn.functional.dropout"
        )
    if graph.on_path.isdisjoint({*graph.starts, *graph.sources}):
        raise NoPathError(
            "the output does not depend on what should be explained, or only through operations that stop "
            "derivatives (detach, no_grad, comparisons, rounding). Check argnums, and that the model function does not "
            "detach its input"
        )
    return replace(graph, selected=selected(graph, globs))


def _first_numbers(program: Program, integers: set[fx.Node]) -> list[fx.Node]:
    """The first floating-point activations that depend on integers, such as the embeddings of tokens.

    A mask that is made of them, by a comparison with the number for padding, carries nothing of what they say; nor does
    an index into activations that depend on them already, such as that of the next token in log-probabilities.
    """
    found: list[fx.Node] = []
    behind, beyond = set(integers), set[fx.Node]()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if not beyond.isdisjoint(node.all_input_nodes):
            beyond.add(node)
        elif not behind.isdisjoint(node.all_input_nodes):
            if is_float(node):
                found.append(node)
                beyond.add(node)
            elif not _is_boolean(node):
                behind.add(node)
    return found


def _is_boolean(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor) and node.meta["val"].dtype is torch.bool


def _takes_as_input(layer: Layer) -> bool:
    """Whether explained parameters stand where a layer expects data, beside a weight of its own."""
    node = layer.nodes[0]
    has_weight = layer.operation == "linear" or layer.operation.startswith("conv")
    return layer.is_tap and has_weight and node.args[0] in layer.inputs


def _check_output(program: Program) -> None:
    for leaf in program.output_spec[0]:
        if leaf is not None and leaf[0] is not None:
            raise InputError(
                f"the output is {type(leaf[0]).__name__}, or has one, where relevance cannot start: it starts at "
                "tensors, in containers that torch's pytree knows. Pick them, for example\n\n"
                "    model_fn, params = lrpfunc.from_module(module, output=lambda out: out.logits)"
            )
    for node in program.outputs:
        value = node.meta["val"]
        if not value.is_floating_point():
            raise InputError(
                f"the output has a tensor of {value.dtype} and shape {tuple(value.shape)}, where relevance, a "
                "floating-point number, cannot start. Return the scores before argmax or a comparison, and other "
                "results as aux, with has_aux=True"
            )
