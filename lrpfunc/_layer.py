"""One step from the input to the output: what selectors and rules see of it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from lrpfunc import _operations as ops
from lrpfunc._normalized import HELD
from lrpfunc._simplify import Affine
from lrpfunc._torch import jvp, map_arg, vjp


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
    def operands(self) -> int:
        """How many tensors the operation reads, parameters included."""
        return len({node for inner in self.nodes for node in inner.all_input_nodes} - set(self.nodes))

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
        exact: Whether the VJPs may be differentiated, or vmapped over: without, they may run fused kernels.
        rectified: The output after the ReLU that alone follows, if it let a multiplier pass: where the ReLU is off, the
            multiplier is 0.
    """

    layer: Layer
    values: Mapping[fx.Node, Any]
    exact: bool = True
    rectified: Tensor | None = None

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
        _, pullback = vjp(lambda x: self.affine(x, weight, None), self.input)
        return pullback(s.to(self.output.dtype))[0]

    def shift(self, bias: Tensor | None) -> Tensor:
        """What the bias adds to each element of the output."""
        x = torch.zeros_like(self.input)
        return self.affine(x, torch.zeros_like(self.parameters[0]), bias)

    def function(self, wrt: Sequence[fx.Node]) -> Callable[..., Any]:
        """The layer as a function of some of its operands."""

        def evaluate(*tensors: Tensor) -> Any:
            inner: dict[fx.Node, Any] = dict(zip(wrt, tensors, strict=True))

            def read(node: fx.Node) -> Any:
                return inner[node] if node in inner else self.values[node]

            for node in self.layer.nodes:
                args, kwargs = map_arg((node.args, node.kwargs), read)
                inner[node] = ops.call(node, args, kwargs, exact=self.exact)
            return self._outputs(inner[self.layer.nodes[-1]])

        return evaluate

    def signal_function(self) -> Callable[..., Any]:
        """The layer as an affine function of its signals: statistics, gates and attention weights are held constant."""
        node = self.layer.nodes[-1]
        held = HELD.get(ops.operation_name(node))
        if held is None or len(self.layer.nodes) > 1:
            return self.function(self.layer.signals)
        args, kwargs = map_arg((node.args, node.kwargs), self.values.__getitem__)
        return lambda x: self._outputs(held(x, *args, **kwargs))

    def _outputs(self, result: Any) -> Any:
        if isinstance(result, Tensor):
            return result
        outputs = tuple(result[i] for i, node in enumerate(self.layer.outputs) if node is not None)
        return outputs[0] if len(self.layer.outputs) == 1 else outputs

    def vjp(self, *cotangents: Tensor, wrt: Sequence[fx.Node] | None = None) -> tuple[Tensor, ...]:
        """The plain VJP, with respect to the inputs unless told otherwise."""
        wrt = self.layer.inputs if wrt is None else wrt
        return self._pull(self.function(wrt), wrt, cotangents)

    def signal_vjp(self, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The VJP of `signal_function`, one an input; `None` for inputs that are no signal."""
        signals = self.layer.signals
        if not signals:
            return (None,) * len(self.layer.inputs)
        pulled = self._pull(self.signal_function(), signals, cotangents)
        found = dict(zip(signals, pulled, strict=True))
        return tuple(found.get(node) for node in self.layer.inputs)

    def _pull(
        self, function: Callable[..., Any], wrt: Sequence[fx.Node], cotangents: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        output, pullback = vjp(function, *(self.values[node] for node in wrt))
        return pullback(cotangents[0] if isinstance(output, Tensor) else tuple(cotangents))

    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The derivative in a direction, one tensor an output."""
        tangent = jvp(replace(self, exact=True).function(self.layer.inputs), self.inputs, tuple(tangents))
        return (tangent,) if isinstance(tangent, Tensor) else tangent

    def at_zero(self) -> Tensor:
        """The output for inputs of zero: the constants of an affine layer."""
        return self.function(self.layer.inputs)(*map(torch.zeros_like, self.inputs))
