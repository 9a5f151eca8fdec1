"""Numbers that a model function reads out of tensors: known while it is recorded if only constants are behind them.

A function may turn a tensor into a number, and branch on it or compute with it outside of torch. For

    steps = torch.arange(3)
    for _ in range(int(steps.sum() * scale)):   # `scale` is closed over
        x = x.relu()

the number is computed from what was recorded so far,

    arange = aten.arange.default(3)
    sum_1 = aten.sum.default(arange)
    mul = aten.mul.Tensor(sum_1, scale)

on the real `scale`. It is part of the program, which is used again only where the same operations give the same number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._ops.call import is_random, operation_name
from lrpfunc._torch import (
    FakeTensor,
    disable_current_modes,
    dispatch_modes,
    innermost,
    is_mapped,
    is_wrapped,
    origin,
    outside_transforms,
    schema,
    storage_of,
)

_WRITES_UNDECLARED = ("batch_norm", "instance_norm")


def has_numbers(tensors: Iterable[Any]) -> bool:
    """Whether Python can read what is in the tensors: nothing transforms, traces or compiles."""
    if torch.compiler.is_compiling() or dispatch_modes():
        return False
    given = [t for t in tensors if isinstance(t, Tensor)]
    return all(type(t) in (Tensor, torch.nn.Parameter) and not (is_wrapped(t) or t.is_meta) for t in given)


@dataclass(frozen=True, eq=False)
class Number:
    """A tensor that a number was read from.

    Attributes:
        program: How it is computed.
        places: From which of the tensors that the trace was given.
        value: What it was while the program was recorded.
    """

    program: fx.GraphModule
    places: tuple[int, ...]
    value: Tensor

    def holds(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether it is still the same."""
        given = [_known(tensors[place]) for place in self.places]
        with _on_real_numbers():
            return all(tensor is not None for tensor in given) and torch.equal(self.program(*given), self.value)


def all_hold(numbers: Sequence[Number], tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are still the same."""
    return all(number.holds(tensors) for number in numbers)


def number(tensor: Tensor, tensors: Sequence[Tensor | None]) -> Number | None:
    """The numbers in a tensor of the trace, if they follow from `tensors`, which its placeholders stand for."""
    found = origin(tensor)
    if found is None:
        return None
    end, root = found
    needed = _needed(end)
    inputs = [node for node in needed if node.op == "placeholder"]
    order = {node: place for place, node in enumerate(n for n in end.graph.nodes if n.op == "placeholder")}
    places = tuple(order[node] for node in inputs)
    given = [_known(tensors[place]) for place in places]
    if any(tensor is None for tensor in given) or any(
        node.op == "call_function" and is_random(node) for node in needed
    ):
        return None
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in [*inputs, *(node for node in needed if node.op != "placeholder")]:
        new[node] = graph.node_copy(node, new.__getitem__)
        if node.op == "placeholder" and any(map(_written, needed)):
            new[node] = graph.call_function(torch.clone, (new[node],))
    graph.output(new[end])
    program = fx.GraphModule(root, graph)
    with _on_real_numbers():
        return Number(program, places, program(*given).clone())


def _known(tensor: Tensor | None) -> Tensor | None:
    """The tensor that has the numbers, if there is one: none that `vmap` maps over, or that a compiler traces."""
    if tensor is None or is_mapped(tensor):
        return None
    tensor = innermost(tensor)
    return None if isinstance(tensor, FakeTensor) else tensor


@contextlib.contextmanager
def _on_real_numbers() -> Iterator[None]:
    """Runs operations for real, whatever records or transforms those around."""
    with disable_current_modes(), outside_transforms(), torch.no_grad():
        yield


def _needed(end: fx.Node) -> list[fx.Node]:
    """What the numbers in `end` depend on, and what has written to the memory that any of it is in."""
    needed, memory = {end}, set(_storages(end))
    for node in reversed(end.graph.nodes):
        if node in needed or any(not memory.isdisjoint(_storages(written)) for written in _written(node)):
            needed |= {node, *node.all_input_nodes}
            memory.update(*map(_storages, (node, *node.all_input_nodes)))
    return [node for node in end.graph.nodes if node in needed]


def _storages(node: fx.Node) -> Iterator[int]:
    return (storage_of(leaf) for leaf in tree.leaves(node.meta.get("val")) if isinstance(leaf, Tensor))


def _written(node: fx.Node) -> list[fx.Node]:
    """The operands that a traced operation writes to."""
    if node.op != "call_function":
        return []
    if operation_name(node) in _WRITES_UNDECLARED:
        return node.all_input_nodes
    declared = schema(node.target)
    written = [
        (i, a) for i, a in enumerate(getattr(declared, "arguments", ())) if a.alias_info and a.alias_info.is_write
    ]
    operands = [node.args[i] if i < len(node.args) else node.kwargs.get(a.name) for i, a in written]
    return [leaf for leaf in tree.leaves(operands) if isinstance(leaf, fx.Node)]
