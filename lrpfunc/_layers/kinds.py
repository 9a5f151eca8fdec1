"""What an operation is, told by its record and by which of its operands depend on the explained input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any

from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._layers.layer import Kind
from lrpfunc._layers.tile import axes_of, shape
from lrpfunc._ops.call import argument, degree_of, of
from lrpfunc._ops.operator import Operator


@dataclass(frozen=True)
class Nature:
    """What an operation is: its kind, whether it is affine in its inputs, and what `Layer` says of some kinds."""

    kind: Kind
    linear: bool = False
    shares: tuple[float, ...] = ()
    axes: tuple[int, ...] = ()


def nature_of(node: fx.Node, inputs: tuple[fx.Node, ...]) -> Nature:
    """What a single operation is that is neither a dense layer nor a convolution."""
    operator = of(node)
    places = list(_places(node, inputs))
    if any(_is_complex(n) for n in (node, *inputs)):
        return Nature(Kind.NON_LINEAR)  # relevance of a complex number is not defined
    match operator.kind:
        case Kind.SELECT if operator.name == "index_put" and argument(node, "accumulate"):
            return Nature(Kind.LINEAR, linear=True)
        case Kind.SELECT:
            return Nature(Kind.SELECT, linear=True)
        case Kind.LINEAR if operator.name == "embedding_bag" and argument(node, "mode") == 2:
            return Nature(Kind.WINNER, linear=True)
        case Kind.WINNER if _against_itself(node, operator, inputs):
            return Nature(Kind.WINNER, linear=True)
        case Kind.WINNER if operator.pointwise and shape(inputs[0]) == shape(node):
            return Nature(Kind.ACTIVATION)  # `maximum(x, 0)` is no choice among inputs
        case Kind.WINNER if set(places) <= {*operator.operands}:
            return Nature(Kind.WINNER, linear=True)
        case Kind.SUM | Kind.AVERAGE | Kind.LINEAR | Kind.SCALE if set(places) <= {*operator.operands}:
            adds_constants = operator.kind is Kind.SUM and len(places) < len(operator.operands)
            return Nature(Kind.LINEAR if adds_constants else operator.kind, linear=True)
        case Kind.PRODUCT if operator.operands == (0,):  # of its own elements
            degree = degree_of(node)
            return Nature(Kind.PRODUCT, shares=(1 / degree,)) if degree else Nature(Kind.NON_LINEAR)
        case Kind.PRODUCT | Kind.DENSE | Kind.CONVOLUTION:
            return _product(node, operator, inputs, places)
        case Kind.QUOTIENT:
            return _quotient(node, inputs, places)
        case Kind.ACTIVATION if _is_pointwise(node, operator, inputs, places):
            return Nature(Kind.ACTIVATION)
        case Kind.ACTIVATION if places == [*operator.operands] and isinstance(operator.degree, (int, float)):
            return Nature(Kind.STATISTIC, shares=(1 / operator.degree,) * len(inputs))
        case Kind.SOFTMAX:
            return Nature(Kind.SOFTMAX, axes=axes_of(node))
        case Kind.STATISTIC if len(inputs) == 1 and (degree := degree_of(node)):
            return Nature(Kind.STATISTIC, shares=(1 / degree,))
        case Kind.NORMALIZATION | Kind.BATCH_NORM if inputs == node.args[:1] and not _has_statistics(node):
            is_affine = operator.held is None or argument(node, "use_input_stats") is False
            return Nature(Kind.BATCH_NORM, linear=True) if is_affine else Nature(operator.kind)
        case Kind.ATTENTION:
            return _attention(node, inputs)
    return Nature(Kind.NON_LINEAR)


def _places(node: fx.Node, inputs: tuple[fx.Node, ...]) -> Iterator[int | None]:
    """The places of the inputs among the arguments; `None` for one that is given by name."""
    for place, value in enumerate(node.args):
        yield from (place for leaf in tree.leaves(value) if leaf in inputs)
    yield from (None for leaf in tree.leaves(node.kwargs) if leaf in inputs)


def _has_statistics(node: fx.Node) -> bool:
    """Whether somebody uses what a kernel returns beside its result."""
    return any(user.target is getitem and user.args[1] != 0 for user in node.users)


def _is_complex(node: fx.Node) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in tree.leaves(node.meta.get("val")))


def _against_itself(node: fx.Node, operator: Operator, inputs: tuple[fx.Node, ...]) -> bool:
    """Whether only activations compete."""
    competing = (value for place, value in enumerate(node.args) if place in operator.operands)
    return all(value in inputs for value in competing if isinstance(value, fx.Node))


def _is_pointwise(node: fx.Node, operator: Operator, inputs: tuple[fx.Node, ...], places: list[int | None]) -> bool:
    """Whether it is a function of each element of one tensor alone."""
    if len(places) != 1 or places[0] not in operator.operands or not isinstance(node.meta["val"], Tensor):
        return False
    return shape(inputs[0]) == shape(node)


def _product(node: fx.Node, operator: Operator, inputs: tuple[fx.Node, ...], places: list[int | None]) -> Nature:
    """With one factor that depends on the input it is linear, a scaling if nothing is added or summed."""
    count = sum(place != operator.addend for place in places)
    if count <= 1:
        scales = operator.kind is Kind.PRODUCT and operator.addend is None
        return Nature(Kind.SCALE if scales else Kind.LINEAR, linear=True)
    added = next((value for place, value in enumerate(node.args) if place == operator.addend), None)
    if added in tree.leaves([value for place, value in enumerate(node.args) if place != operator.addend]):
        return Nature(Kind.NON_LINEAR)  # one tensor is a factor and added, too
    return Nature(Kind.PRODUCT, shares=tuple(1.0 if n is added else 1 / count for n in inputs))


def _quotient(node: fx.Node, inputs: tuple[fx.Node, ...], places: list[int | None]) -> Nature:
    if places == [0]:
        return Nature(Kind.SCALE, linear=True)
    if places == [1] and shape(inputs[0]) == shape(node):
        return Nature(Kind.ACTIVATION)
    # The two factors are the numerator and the reciprocal of the divisor, whose VJP has the opposite sign.
    share = 1 / len(inputs)
    return Nature(Kind.QUOTIENT, shares=tuple(-share if n is node.args[1] else share for n in inputs))


def _attention(node: fx.Node, inputs: tuple[fx.Node, ...]) -> Nature:
    """Values and weights share; the weights' share is that of the mask, and query and key share it as well."""
    query, key, value, mask, *_ = (*node.args, None)
    factors = [n for n in (query, key) if n in inputs]
    weights = 0.5 if value in inputs else 1.0
    share: dict[Any, float] = dict.fromkeys(factors, weights / max(len(factors), 1))
    share[mask] = weights
    share[value] = 0.5 if factors or mask in inputs else 1.0
    return Nature(Kind.ATTENTION, shares=tuple(share[n] for n in inputs))
