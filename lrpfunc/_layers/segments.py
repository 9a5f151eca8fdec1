"""Sums and maxima over segments: over all elements that an index puts into one place."""

from __future__ import annotations

from typing import Any

from torch import fx

from lrpfunc._layers.tile import shape
from lrpfunc._ops.call import argument, of, operation_name

ADDED = {"scatter_add": 3, "scatter_reduce": 3, "index_add": 3, "index_put": 2}
"""Operators that can sum over segments, and where what they add stands."""

MAXIMA = {"scatter_reduce": 3, "index_reduce": 3}
"""Those that can take the maximum."""

Segments = tuple[int, Any]
"""The dimension along which an index chooses, and the index."""


def segments_of(node: fx.Node) -> Segments | None:
    """Into which segments a node sums, if it does."""
    sums = {"scatter_reduce": argument(node, "reduce") == "sum", "index_put": bool(argument(node, "accumulate"))}
    name = operation_name(node)
    return _places(node) if name in ADDED and sums.get(name, True) else None


def places_of(node: fx.Node) -> Segments | None:
    """From which places a node takes its elements, if it chooses them along one dimension."""
    return _places(node) if of(node).chooses else None


def same_segments(one: Segments, other: Segments) -> bool:
    return one[0] == other[0] and _same(one[1], other[1])


def _places(node: fx.Node) -> Segments | None:
    indices: Any = argument(node, "indices")
    if isinstance(indices, (list, tuple)):
        given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
        return given[0] if len(given) == 1 else None
    dim, index = argument(node, "dim"), indices if isinstance(indices, fx.Node) else argument(node, "index")
    return None if dim is None or index is None else (int(dim) % len(shape(node)), index)


def _same(one: Any, other: Any) -> bool:
    """Whether two indices are one, up to the shape they are spread to."""
    one, other = _spread(one), _spread(other)
    if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
        return one == other
    if one is other:
        return True
    computed = one.op == other.op == "call_function" and one.target is other.target
    return computed and len(one.args) == len(other.args) and all(map(_same, one.args, other.args))


def _spread(index: Any) -> Any:
    """What an index is before it is given another shape, or repeated along other dimensions."""
    while isinstance(index, fx.Node) and (of(index).reshapes or of(index).name in ("expand", "alias", "clone")):
        index = index.args[0]
    return index
