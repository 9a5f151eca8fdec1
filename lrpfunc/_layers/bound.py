"""A layer with the values of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from lrpfunc._errors import RuleError
from lrpfunc._layers.layer import Kind, Layer
from lrpfunc._ops.call import call, of
from lrpfunc._ops.derivatives import jvp, vjp
from lrpfunc._torch import map_arg


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

    def __repr__(self) -> str:
        return f"BoundLayer({self.layer!r})"

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The activations that depend on the explained input."""
        return tuple(self.values[node] for node in self.layer.inputs)

    @property
    def input(self) -> Tensor:
        (x,) = self.inputs
        return x

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The outputs that relevance can come from: one, of most operations."""
        return tuple(self.values[node] for node in self.layer.outputs if node is not None)

    @property
    def output(self) -> Tensor:
        (y,) = self.outputs
        return y

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
            return self._outputs(self._run(self.layer.nodes, dict(zip(wrt, tensors, strict=True))))

        return evaluate

    def _run(self, nodes: Sequence[fx.Node], inner: dict[fx.Node, Any]) -> Any:
        """What the last of some nodes gives, with other values than those of the forward pass for `inner`."""

        def read(node: fx.Node) -> Any:
            return inner[node] if node in inner else self.values[node]

        for node in nodes:
            args, kwargs = map_arg((node.args, node.kwargs), read)
            inner[node] = call(node, args, kwargs, exact=self.exact)
        return inner[nodes[-1]]

    def summed(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like a softmax, summed as the softmax sums: along its axes, or over its segments."""
        if not self.layer.sums:
            return tensor.sum(list(self.layer.axes), keepdim=True)
        return self._total(tensor) - self._total(torch.zeros_like(tensor))

    def _total(self, tensor: Tensor) -> Tensor:
        added, *nodes = self.layer.sums
        inner: dict[fx.Node, Any] = {added: tensor}
        for node in nodes:
            if of(node).epsilon:  # which keeps the sum away from zero, and is none of it
                inner[node] = next(inner[operand] for operand in node.all_input_nodes if operand in inner)
            else:
                self._run([node], inner)
        return inner[nodes[-1]]

    def signal_function(self) -> Callable[..., Any]:
        """The layer as an affine function of its signals: statistics, gates and attention weights are held constant."""
        node = self.layer.nodes[-1]
        held = of(node).held
        if held is None or len(self.layer.nodes) > 1:
            return self.function(self.layer.signals)
        args, kwargs = map_arg((node.args, node.kwargs), self.values.__getitem__)
        return lambda x: self._outputs(held(x, *args, **kwargs))

    def _outputs(self, result: Any) -> Any:
        if isinstance(result, Tensor):
            return result
        outputs = tuple(result[i] for i, node in enumerate(self.layer.outputs) if node is not None)
        return outputs[0] if len(outputs) == 1 else outputs

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
        if any(of(node).underived for node in self.layer.nodes):
            raise self._underived()
        try:
            output, pullback = vjp(function, *(self.values[node] for node in wrt))
            return pullback(cotangents[0] if isinstance(output, Tensor) else tuple(cotangents))
        except (RuntimeError, KeyError) as error:
            # Of an operation that has none, of a kernel with a backward in C++, of one that takes functions.
            if any(words in str(error) for words in ("derivative for", "autograd.Function with", "TransformType")):
                raise self._underived() from error
            raise

    def _underived(self) -> RuleError:
        operation = self.layer.operation
        what, rule = (
            ("Pass relevance on", "Pass") if self.layer.kind is Kind.ACTIVATION else ("Hold it constant", "Stop")
        )
        return RuleError(
            f"torch has no derivative of `{operation}` that can be taken here, and the rule needs one for the layer\n\n"
            f"    {self.layer}\n\n{what} there, for example\n\n"
            f"    rules = [(lrp.operation({operation!r}), lrp.{rule}())] + rules"
        )

    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The derivative in a direction, one tensor an output."""
        return _tuple(jvp(replace(self, exact=True).function(self.layer.inputs), self.inputs, tuple(tangents)))

    def at_zero(self) -> tuple[Tensor, ...]:
        """The outputs for inputs of zero: the constants of an affine layer."""
        return _tuple(self.function(self.layer.inputs)(*map(torch.zeros_like, self.inputs)))

    def signal_at_zero(self) -> tuple[Tensor, ...]:
        """The outputs for signals of zero: the constants of `signal_function`."""
        signals = (self.values[node] for node in self.layer.signals)
        return _tuple(self.signal_function()(*map(torch.zeros_like, signals)))


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
