"""Open sizes, as operations on numbers that the programs are given.

An argument `2*s0 + 1` of an operation becomes

    s0 = placeholder
    mul = s0 * 2
    add = 1 + mul
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from lrpfunc._capture.state import with_sizes
from lrpfunc._torch import proxied


class Sizes:
    """The numbers that operations of a graph take for open sizes.

    Args:
        graph: The graph, to which they are added.
        symbols: One for each open size.

    Attributes:
        inputs: A placeholder for each symbol.
        nodes: Those, and what is computed of them.
    """

    def __init__(self, graph: fx.Graph, symbols: Sequence[Any]):
        self.inputs = [graph.placeholder(str(symbol)) for symbol in symbols]
        self.nodes = list(self.inputs)
        tracer = _Tracer(graph, self.nodes)
        self._known: dict[Any, Any] = {
            symbol: fx.Proxy(node, tracer) for symbol, node in zip(symbols, self.inputs, strict=True)
        }

    @property
    def expressions(self) -> dict[fx.Node, Any]:
        """What each node computes."""
        return {proxy.node: expression for expression, proxy in self._known.items() if isinstance(proxy, fx.Proxy)}

    def spelled(self, value: Any) -> Any:
        """The arguments of an operation, with a node in place of each open size."""
        if not self.inputs:
            return value
        return with_sizes(value, self.spelled_size)

    def spelled_size(self, size: torch.SymInt) -> Any:
        """A node for an open size, or a number if it is fixed by now."""
        computed = self._computed(size.node.expr)
        return computed.node if isinstance(computed, fx.Proxy) else computed

    def _computed(self, expression: Any) -> Any:
        if expression not in self._known:
            for argument in expression.args:
                self._computed(argument)
            self._known[expression] = proxied(expression, self._known)
        return self._known[expression]


class _Tracer(GraphAppendingTracer):
    """Adds what is done with proxies to a graph, and to a list."""

    def __init__(self, graph: fx.Graph, nodes: list[fx.Node]):
        super().__init__(graph)
        self._nodes = nodes

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self._nodes.append(super().create_node(*args, **kwargs))
        return self._nodes[-1]
