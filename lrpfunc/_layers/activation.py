"""Pointwise non-linearities that are written as several operations."""

from __future__ import annotations

from torch import Tensor, fx

from lrpfunc._layers.layer import Kind
from lrpfunc._layers.tile import Reached, Tile, shape
from lrpfunc._ops.call import of


def activation(node: fx.Node, reached: Reached) -> Tile | None:
    """The operations that end at `node` as one function of each element of one tensor.

    Such as `x * sigmoid(x)`, `x * x`, a GELU written out or `1 / (1 + exp(-x))`. A single operation of one operand is
    a layer anyway; so is a sum of linear functions.
    """
    found = _joined(node, reached)
    if found is None and _nonlinear_alone(node, reached):
        found = Tile(Kind.ACTIVATION, "pointwise", (node,), (reached.operands(node)[0],))
    if found is not None:
        found = _extended(found, reached)
    single = found is not None and len(found.nodes) == 1 and len(reached.operands(node)) == 1
    return None if single else found


def _joined(node: fx.Node, reached: Reached) -> Tile | None:
    """The paths that meet at `node` and come from one tensor."""
    if len(reached.operands(node)) < 2 or not _pointwise(node) or _is_residual(node, reached):
        return None
    for inside, root in reached.dominators(node, _pointwise):
        if any(shape(n) != shape(node) for n in (*inside, root)) or not _same_precision(inside, root):
            return None
        if any(not reached.is_linear(n) for n in inside):
            nodes = tuple(sorted(inside, key=reached.order.__getitem__))
            return Tile(Kind.ACTIVATION, "pointwise", nodes, (root,))
    return None


def _is_residual(node: fx.Node, reached: Reached) -> bool:
    """`x + f(x)`: a connection around an activation, which is a layer with rules and a name of its own."""
    if of(node).name != "add":
        return False
    operands = reached.operands(node)
    return any(_nonlinear_alone(f, reached) and reached.operands(f) == [x] for x, f in (operands, operands[::-1]))


def _extended(tile: Tile, reached: Reached) -> Tile:
    """With the non-linear function before it, if a number is added in between, as in `log(1 + exp(x))`.

    Without, two functions after one another take the same relevance as their composition.
    """
    (node,) = tile.inputs
    between: list[fx.Node] = []
    adds = False
    while reached.is_step(node) and shape(node) == shape(tile.nodes[-1]):
        operands = reached.operands(node)
        if adds and (earlier := _function(node, reached)) is not None:
            return Tile(tile.kind, tile.operation, (*earlier.nodes, *between[::-1], *tile.nodes), earlier.inputs)
        if len(operands) != 1 or not _pointwise(node) or not reached.is_linear(node) or len(node.all_input_nodes) > 1:
            break
        adds |= of(node).kind is Kind.SUM
        between.append(node)
        (node,) = operands
    return tile


def _function(node: fx.Node, reached: Reached) -> Tile | None:
    if found := activation(node, reached):
        return found
    alone = _nonlinear_alone(node, reached)
    return Tile(Kind.ACTIVATION, "pointwise", (node,), (reached.operands(node)[0],)) if alone else None


def _nonlinear_alone(node: fx.Node, reached: Reached) -> bool:
    if not reached.is_step(node) or len(reached.operands(node)) != 1:
        return False
    if not _pointwise(node) or reached.is_linear(node):
        return False
    (x,) = reached.operands(node)
    return shape(x) == shape(node) and x.meta["val"].is_floating_point()


def _pointwise(node: fx.Node) -> bool:
    return of(node).pointwise and isinstance(node.meta.get("val"), Tensor)


def _same_precision(inside: frozenset[fx.Node], root: fx.Node) -> bool:
    return all(n.meta["val"].is_floating_point() for n in (*inside, root))
