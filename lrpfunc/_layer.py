"""One step from the input to the output: what selectors and rules see of it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from lrpfunc import _operations as ops
from lrpfunc._normalized import HELD
from lrpfunc._simplify import Affine
from lrpfunc._torch import is_differentiated, jvp, map_arg, vjp
from lrpfunc._transpose import transpose_of


class Kind(enum.StrEnum):
    """What a layer is, for the choice of its rule."""

    DENSE = "Dense"
    CONVOLUTION = "Convolution"
    SUM = "Sum"
    AVERAGE = "AvgPool"
    LINEAR = "Linear"
    SCALE = "Scale"
    SELECT = "Select"
    WINNER = "Winner"
    BATCH_NORM = "BatchNorm"
    ACTIVATION = "Activation"
    SOFTMAX = "Softmax"
    PRODUCT = "Product"
    QUOTIENT = "Quotient"
    ATTENTION = "Attention"
    NORMALIZATION = "Normalization"
    STATISTIC = "Statistic"
    NON_LINEAR = "Non-linear"


class Role(enum.StrEnum):
    """What a product is for, told by where its operands come from."""

    NONE = ""
    GATE = "Gate"
    ROUTER = "Router"
    RECURRENT = "Recurrent"
    SCAN = "Scan"


STRUCTURAL = frozenset({Kind.SELECT, Kind.WINNER, Kind.SCALE})
"""Kinds that only move or scale what they are given; composites do not see them."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One step from the explained input to the output: an operation, or several that are explained as one.

    Selectors and rules see these attributes; the nodes are the walk's.

    Attributes:
        kind: What the layer is.
        name: The module's path, with `@k` for its call `k > 0`; in a function without modules the path of the
            layer's parameter, or the operation's name, likewise numbered.
        operation: The name of the torch operation, such as `"conv2d"`.
        modules: The paths of all modules around the operation, from the outside in.
        depth: The share of the way through the dense layers and convolutions, from 0 to 1.
        linear: Whether the layer is affine in its inputs, so that it needs no rule.
        nonnegative: Whether the input is known to be non-negative.
        siblings: All layers on a path from the explained input to the output, in order of execution.
        role: What a product is for.
        signals: The inputs that carry the signal, where others modulate it: the value beside attention weights, what
            a gate lets through. Empty where that cannot be told.
        shares: What each input of a product, quotient, statistic or attention counts for when all operands share.
        axes: The axes that a softmax sums over.
        keeps_zero: Whether an activation is 0 at 0, and has a derivative there.
    """

    kind: Kind
    name: str
    operation: str
    modules: tuple[str, ...]
    depth: float
    linear: bool
    nonnegative: bool
    siblings: Sequence[Layer]
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    taps: tuple[fx.Node, ...]
    outputs: tuple[fx.Node | None, ...]
    affine: Affine | None
    role: Role = Role.NONE
    signals: tuple[fx.Node, ...] = ()
    shares: tuple[float, ...] = ()
    axes: tuple[int, ...] = ()
    keeps_zero: bool = False
    is_tap: bool = False

    @property
    def output(self) -> fx.Node:
        """The one output of a layer that has one."""
        (output,) = (node for node in self.outputs if node is not None)
        return output

    @property
    def places(self) -> int:
        """How many operands the inputs are: more than there are inputs in `x * x`."""
        operands = pytree.tree_leaves([(node.args, node.kwargs) for node in self.nodes])
        return sum(operands.count(node) for node in self.inputs)

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(node.meta["val"].shape) for node in self.inputs)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return next(tuple(node.meta["val"].shape) for node in self.outputs if node is not None)

    def __repr__(self) -> str:
        shapes = ", ".join(map(str, self.input_shapes))
        return f"{self.name}   {self.operation}   {shapes} -> {self.output_shape}"


@dataclass(frozen=True)
class BoundLayer:
    """A layer with the values of one forward pass: what a rule computes with.

    Attributes:
        layer: The layer.
        values: The value of every node.
    """

    layer: Layer
    values: Mapping[fx.Node, Any]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The activations that depend on the explained input."""
        return tuple(self.values[node] for node in self.layer.inputs)

    @property
    def input(self) -> Tensor:
        (x,) = self.inputs
        return x

    @property
    def output(self) -> Tensor:
        return self.values[self.layer.output]

    @cached_property
    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """The effective weight and bias of a dense layer or convolution, a merged batch norm included."""
        assert self.layer.affine is not None
        return self.layer.affine.parameters(self.values)

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        r""":math:`f(x; W, b)` of a dense layer or convolution, shaped like the output."""
        assert self.layer.affine is not None
        return self.layer.affine(self.values, x, weight, bias)

    def transpose(self, s: Tensor, weight: Tensor) -> Tensor:
        r""":math:`J_W^T(s)`, shaped like the input."""
        found = self.layer.affine
        assert found is not None
        if len(self.layer.nodes) == 1 and not found.node.meta["autocast"]:
            operands = (self.input, weight) if found.input < found.weight else (weight, self.input)
            pull = transpose_of(ops.operation_name(found.node), operands, int(found.input > found.weight))
            if pull is not None:
                return pull(s.to(self.output.dtype))
        _, pullback = vjp(lambda x: self.affine(x, weight, None), self.input)
        return pullback(s.to(self.output.dtype))[0]

    def shift(self, bias: Tensor | None) -> Tensor:
        """What the bias adds to each element of the output."""
        x = torch.zeros_like(self.input)
        return self.affine(x, torch.zeros_like(self.parameters[0]), bias)

    def function(self, wrt: Sequence[fx.Node], *, exact: bool = False) -> Callable[..., Any]:
        """The layer as a function of some of its operands, `exact` if its VJP has derivatives of its own."""

        def evaluate(*tensors: Tensor) -> Any:
            inner: dict[fx.Node, Any] = dict(zip(wrt, tensors, strict=True))

            def read(node: fx.Node) -> Any:
                return inner[node] if node in inner else self.values[node]

            for node in self.layer.nodes:
                args, kwargs = map_arg((node.args, node.kwargs), read)
                inner[node] = ops.call(node, args, kwargs, walking=True, exact=exact)
            return self._outputs(inner[self.layer.nodes[-1]])

        return evaluate

    def signal_function(self, *, exact: bool = False) -> Callable[..., Any]:
        """The layer as an affine function of its signals: statistics, gates and attention weights are held constant."""
        node = self.layer.nodes[-1]
        held = HELD.get(ops.operation_name(node))
        if held is None or len(self.layer.nodes) > 1:
            return self.function(self.layer.signals, exact=exact)
        args, kwargs = map_arg((node.args, node.kwargs), self.values.__getitem__)
        return lambda x: self._outputs(held(x, *args, **kwargs))

    def _outputs(self, result: Any) -> Any:
        if isinstance(result, Tensor):
            return result
        return tuple(result[i] for i, node in enumerate(self.layer.outputs) if node is not None)

    def vjp(self, *cotangents: Tensor, wrt: Sequence[fx.Node] | None = None) -> tuple[Tensor, ...]:
        """The plain VJP, with respect to the inputs unless told otherwise."""
        wrt = self.layer.inputs if wrt is None else wrt
        if pulled := self._without_forward(wrt, cotangents):
            return pulled
        return self._pull(self.function(wrt, exact=any(map(is_differentiated, cotangents))), wrt, cotangents)

    def signal_vjp(self, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The VJP of `signal_function`, one an input; `None` for inputs that are no signal."""
        signals = self.layer.signals
        if not signals:
            return (None,) * len(self.layer.inputs)
        if pulled := self._without_forward(signals, cotangents):
            return tuple(dict(zip(signals, pulled, strict=True)).get(node) for node in self.layer.inputs)
        function = self.signal_function(exact=any(map(is_differentiated, cotangents)))
        pulled = dict(zip(signals, self._pull(function, signals, cotangents), strict=True))
        return tuple(pulled.get(node) for node in self.layer.inputs)

    def _without_forward(self, wrt: Sequence[fx.Node], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The plain VJP, where it is known from the forward pass or by a formula."""
        recorded: Any = self.values.get((self.layer.nodes[-1], "pullback"))  # type: ignore[call-overload]
        if recorded is None or any(map(is_differentiated, cotangents)):
            return self._transposed(wrt, cotangents)
        pulled = dict(zip(self.layer.inputs, recorded(*cotangents), strict=True))
        return tuple(pulled[node] for node in wrt) if pulled.keys() >= set(wrt) else None

    def _transposed(self, wrt: Sequence[fx.Node], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The plain VJP of a matrix product, which needs no forward pass."""
        node = self.layer.nodes[0]
        if len(self.layer.nodes) > 1 or node.kwargs or node.meta["no_grad"] or node.meta["autocast"]:
            return None
        places = [[i for i, a in enumerate(node.args) if a is n] for n in wrt]
        if any(len(p) != 1 for p in places):
            return None
        args, _ = map_arg((node.args, {}), self.values.__getitem__)
        found = [transpose_of(ops.operation_name(node), args, place) for (place,) in places]
        return tuple(pull(cotangents[0]) for pull in found if pull is not None) if all(found) else None

    def _pull(
        self, function: Callable[..., Any], wrt: Sequence[fx.Node], cotangents: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        output, pullback = vjp(function, *(self.values[node] for node in wrt))
        return pullback(cotangents[0] if isinstance(output, Tensor) else tuple(cotangents))

    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The derivative in a direction, one tensor an output."""
        tangent = jvp(self.function(self.layer.inputs, exact=True), self.inputs, tuple(tangents))
        return (tangent,) if isinstance(tangent, Tensor) else tangent

    def at_zero(self) -> Tensor:
        """The output for inputs of zero: the constants of an affine layer."""
        return self.function(self.layer.inputs)(*map(torch.zeros_like, self.inputs))
