"""What programs make of the arguments that are bound."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor, fx

from lrpfunc._capture.isolation import isolated, surroundings
from lrpfunc._lower.cut import Programs
from lrpfunc._lower.joint import Written
from lrpfunc._ops.symbols import hashable
from lrpfunc._torch import constant, map_arg


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
