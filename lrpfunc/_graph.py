"""A functional program as a list of layers, before any number is known."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from lrpfunc import _operations as ops
from lrpfunc._kinds import is_float, kind_of, nonnegative
from lrpfunc._layer import Layer
from lrpfunc._simplify import Affine, Program, merge
from lrpfunc._simplify.merge import affine


@dataclass(eq=False)
class Graph:
    """The layers between what is explained and the output.

    Attributes:
        program: The whole forward pass.
        sources: The nodes of the explained leaves, `None` for an integer leaf.
        on_path: The nodes from which relevance may come to what is explained.
        starts: The nodes at which relevance ends its way: those leaves, or the layers explained in their place.
        layers: In order of execution.
        entries: Where `layers=` may ask for relevance: name, leaves (`None`: no relevance there) and spec.
    """

    program: Program
    sources: list[fx.Node | None]
    on_path: set[fx.Node]
    starts: list[fx.Node]
    layers: list[Layer]
    entries: list[tuple[str, list[fx.Node | None], Any]]


def _reached(program: Program, seeds: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend, differentiably, on the seeds."""
    reached = set(seeds)
    for node in program.graph.nodes:
        if node.op != "call_function" or node.meta["no_grad"] or not is_float(node):
            continue
        if ops.operation_name(node) not in ops.UNDIFFERENTIABLE and any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return reached


def _leading_to(outputs: Iterable[fx.Node], reached: set[fx.Node]) -> set[fx.Node]:
    """The nodes among `reached` from which a path through such nodes leads to an output."""
    leading: set[fx.Node] = set()
    pending = [node for node in outputs if node in reached]
    while pending:
        node = pending.pop()
        if node not in leading:
            leading.add(node)
            pending.extend(n for n in node.all_input_nodes if n in reached)
    return leading


def build_graph(
    program: Program, data: Sequence[fx.Node], taps: Sequence[fx.Node], sources: list[fx.Node | None]
) -> Graph:
    """The layers that depend on `data`, or on parameters that are explained themselves, the `taps`."""
    active = _reached(program, data)
    tapped = _reached(program, taps) - active
    on_path = _leading_to(program.outputs, active | tapped)
    kept = set(program.outputs)
    layers: list[Layer] = []
    merged: dict[fx.Node, Layer] = {}
    heads = _affines(program, active, on_path, kept)
    tails = {found.nodes[-1]: found for found in heads}
    inner = {node for found in heads for node in found.nodes[:-1]}
    known = nonnegative(program)
    sources_set = set(data) | set(taps)
    passed = 0
    counts: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node not in on_path or node in sources_set or node in inner or node.op != "call_function":
            continue
        if node.target is operator.getitem and node.args[0] in on_path:
            continue
        found = tails.get(node)
        layer = _layer(node, found, active, tapped, layers, known, passed / max(len(heads), 1), counts)
        passed += found is not None
        layers.append(layer)
        merged.update(dict.fromkeys(layer.nodes, layer))
    return Graph(
        program,
        sources,
        on_path,
        list(dict.fromkeys(data)),
        layers,
        _entries(program, layers, merged, active & on_path),
    )


def _affines(program: Program, active: set[fx.Node], on_path: set[fx.Node], kept: set[fx.Node]) -> list[Affine]:
    found = (affine(node, active) for node in program.graph.nodes if node in active & on_path)
    return [merge(a, active, kept) for a in found if a is not None]


def _layer(
    node: fx.Node,
    found: Affine | None,
    active: set[fx.Node],
    tapped: set[fx.Node],
    siblings: list[Layer],
    known: set[fx.Node],
    depth: float,
    counts: Counter[str],
) -> Layer:
    nodes = (node,) if found is None else found.nodes
    operands = dict.fromkeys(operand for n in nodes for operand in n.all_input_nodes if operand not in nodes)
    is_tap = node in tapped
    inputs = tuple(n for n in operands if n in (tapped if is_tap else active) and is_float(n))
    taps = () if is_tap else tuple(n for n in operands if n in tapped and is_float(n))
    kind, linear = kind_of(node, found, inputs)
    first = nodes[0]
    scopes = first.meta["scopes"]
    operation = ops.operation_name(first)
    name = scopes[-1] if scopes else _parameter_name(found) or operation
    if not scopes:
        counts[name] += 1
        name = f"{name}@{counts[name] - 1}" if counts[name] > 1 else name
    return Layer(
        kind=kind,
        name=name,
        operation=operation,
        modules=tuple(scopes),
        depth=depth,
        linear=linear,
        nonnegative=all(n in known for n in inputs),
        siblings=siblings,
        nodes=nodes,
        inputs=inputs,
        taps=taps,
        outputs=_outputs(node),
        affine=found,
        is_tap=is_tap,
    )


def _outputs(node: fx.Node) -> tuple[fx.Node | None, ...]:
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return (node,)
    outputs: list[fx.Node | None] = [None] * len(value)
    for user in node.users:
        if user.target is operator.getitem and is_float(user):
            outputs[user.args[1]] = user  # type: ignore[call-overload]
    return tuple(outputs)


def _parameter_name(found: Affine | None) -> str | None:
    if found is None:
        return None
    node = found.weight_node
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.meta.get("path")


# --------------------------------------------------------------------------------------------------------------
# Where relevance may be asked for


def _entries(
    program: Program, layers: list[Layer], merged: dict[fx.Node, Layer], active: set[fx.Node]
) -> list[tuple[str, list[fx.Node | None], Any]]:
    def place(node: fx.Node | None) -> fx.Node | None:
        if node is None or node not in active:
            return None
        # Inside a merged layer there is no relevance but at its end.
        return merged[node].outputs[0] if node in merged and len(merged[node].nodes) > 1 else node

    if program.modules:
        return [(name, [place(leaf) for leaf in leaves], spec) for name, leaves, spec in program.modules]
    leaf_spec = pytree.tree_structure(0)
    return [(layer.name, [layer.output], leaf_spec) for layer in layers if len(layer.outputs) == 1 and not layer.is_tap]
