"""Rules for layers that act on each element by itself."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Kind, Layer
from lrpfunc._ops.call import named
from lrpfunc._ops.derivatives import vjp
from lrpfunc.rules._message import Form, Message, Multiplier, Relevance, divide
from lrpfunc.rules._rule import Rule, where_positive


def _needs_pointwise(rule: Rule, layer: Layer) -> str | None:
    pointwise = (Kind.ACTIVATION, Kind.BATCH_NORM, Kind.SELECT, Kind.SCALE, Kind.NON_LINEAR)
    if len(layer.inputs) == 1 and layer.input_shapes[0] == layer.output_shape and layer.kind in pointwise:
        return None
    return f"{type(rule).__name__} serves layers that act on each element of one input by itself"


@final
@dataclass(frozen=True, eq=False)
class Pass(Rule):
    r"""Passes relevance on as it is, :math:`R_i = R`.

    For activations and for batch norms that are not merged. A multiplier becomes :math:`m \, y / x`, and
    :math:`m f'(0)` at :math:`x = 0` where :math:`f(0) = 0`.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda _, x: torch.nn.functional.gelu(x), [(lrp.Activation, lrp.Pass())])
        >>> relevance_fn(None, torch.tensor([[1.0, 2.0]]), target=1)
        tensor([[0.0000, 1.9545]])

    References:
        S. Bach et al., "On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance
        propagation", PLOS ONE 10(7), 2015.
    """

    form: ClassVar[Form] = "either"

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        if isinstance(message, Relevance):
            return (message,)
        if named(layer.layer.operation).homogeneous:
            return (Multiplier(layer.vjp(message.value)[0]),)
        if not layer.layer.keeps_zero:
            return (Relevance(message.relevance(layer.output)),)
        x = layer.input
        return (Multiplier(message.value * torch.where(x == 0, self._at_zero(layer), divide(layer.output, x))),)

    @staticmethod
    def _at_zero(layer: BoundLayer) -> Tensor:
        """The limit of `f(x) / x` at 0, which is `f'(0)`, with its derivative, which is `f''(0) / 2`."""
        x = layer.input
        if layer.layer.operands > 1:  # parameters that may differ from element to element
            (slope,) = layer.vjp(torch.ones_like(x))
            return (slope + slope.detach()) / 2
        function, one = layer.function(layer.layer.inputs), x.new_ones(())
        slope, pull = vjp(lambda zero: vjp(function, zero)[1](one)[0], x.new_zeros(()))
        bend = pull(one)[0]
        # Of `x ** 1.5` it is infinite: as where torch chooses a slope, there is none.
        return slope + torch.where(bend.isfinite(), bend, 0) / 2 * x if layer.exact else slope

    def objection(self, layer: Layer) -> str | None:
        return _needs_pointwise(self, layer)


class _OfCotangent(Rule):
    """Rules that change a cotangent on its way through a layer; the balance is that of activation times cotangent."""

    form: ClassVar[Form] = "multiplier"

    @abc.abstractmethod
    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]: ...

    def absorbed(self, layer: BoundLayer, message: Message) -> dict[str, Tensor]:
        (passed,) = self.propagate(layer, message)
        return {"rule": (layer.output * message.value - layer.input * passed.value).sum()}

    def objection(self, layer: Layer) -> str | None:
        return _needs_pointwise(self, layer)


@final
@dataclass(frozen=True, eq=False)
class ReLUDeconvNet(_OfCotangent):
    r"""Passes the positive part of the cotangent on, :math:`R_i = R^+`, whatever the input.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda _, x: x.relu(), lrp.deconvnet())
        >>> relevance_fn(None, torch.tensor([[-1.0, 2.0]]), target=torch.tensor([[3.0, -3.0]]))
        tensor([[3., 0.]])

    References:
        M. D. Zeiler and R. Fergus, "Visualizing and understanding convolutional networks", ECCV, 2014.
    """

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        return (Multiplier(message.value.clamp(min=0)),)


@final
@dataclass(frozen=True, eq=False)
class ReLUGuidedBackprop(_OfCotangent):
    r"""Passes the positive part of the cotangent on where the unit is active, :math:`R_i = [R > 0] \, J^T(R)`.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda _, x: x.relu(), lrp.guided_backprop())
        >>> relevance_fn(None, torch.tensor([[-1.0, 2.0]]), target=torch.tensor([[3.0, 3.0]]))
        tensor([[0., 3.]])

    References:
        J. T. Springenberg et al., "Striving for simplicity: the all convolutional net", ICLR workshop, 2015.
    """

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        (cotangent,) = layer.vjp(message.value)
        return (Multiplier(where_positive(message.value, cotangent)),)


@final
@dataclass(frozen=True, eq=False)
class ReLUBetaSmooth(_OfCotangent):
    r"""Passes the cotangent as through a softplus, :math:`R_i = \sigma(\beta x_i) \, R`.

    Args:
        beta_smooth: The sharpness :math:`\beta`. A tensor may be vmapped over or differentiated.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda _, x: x.relu(), lrp.beta_smooth())
        >>> relevance_fn(None, torch.tensor([[0.0, 2.0]]), target=torch.tensor([[1.0, 1.0]]))
        tensor([[0.5000, 1.0000]])

    References:
        A.-K. Dombrowski et al., "Explanations can be manipulated and geometry is to blame", NeurIPS, 2019.
    """

    beta_smooth: float | Tensor = 10.0

    def propagate(self, layer: BoundLayer, message: Message) -> tuple[Message, ...]:
        return (Multiplier(torch.sigmoid(self.beta_smooth * layer.input) * message.value),)
