"""Composites: the recipes of the literature."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lrpfunc._layers.select import (
    Activation,
    Attention,
    AvgPool,
    BatchNorm,
    Convolution,
    Dense,
    Gate,
    Normalization,
    Product,
    Quotient,
    Recurrent,
    ReLU,
    Router,
    Scan,
    Selector,
    Softmax,
    Statistic,
    Sum,
    first,
)
from lrpfunc.rules._composite import Composite as Composite
from lrpfunc.rules._composite import Entry as Entry
from lrpfunc.rules._composite import composite_of, general
from lrpfunc.rules._message import Stabilizer
from lrpfunc.rules._rule import Rule, ZeroParams
from lrpfunc.rules.alpha_beta import AlphaBeta
from lrpfunc.rules.elementwise import Pass, ReLUBetaSmooth, ReLUDeconvNet, ReLUGuidedBackprop
from lrpfunc.rules.epsilon import Epsilon, Norm
from lrpfunc.rules.flat import Flat
from lrpfunc.rules.gamma import Gamma
from lrpfunc.rules.generic import Gradient, Stop, Uniform
from lrpfunc.rules.signal import SignalTakesAll
from lrpfunc.rules.softmax import TaylorSoftmax
from lrpfunc.rules.zbox import ZBox
from lrpfunc.rules.zplus import ZPlus

Stab = float | Tensor | Stabilizer


def as_composite(rules: Composite | Iterable[Entry] | None) -> Composite:
    """What users may give for `rules`, as a composite."""
    if rules is None:
        return general((*attn_lrp(), (Convolution, ZPlus()), (Dense, Epsilon())))
    return composite_of(rules)


def _base(stabilizer: Stab) -> tuple[Entry, ...]:
    norm = Norm(stabilizer)
    return ((Activation, Pass()), (Sum, norm), (AvgPool, norm), (BatchNorm, Pass()))


def _recipe(
    convolution: Rule, dense: Rule, stabilizer: Stab, first_layer: tuple[Selector, Rule] | None = None
) -> Composite:
    start: tuple[Entry, ...] = () if first_layer is None else ((first(first_layer[0]), first_layer[1]),)
    return general((*start, *_base(stabilizer), (Convolution, convolution), (Dense, dense)))


def epsilon(
    epsilon: float | Tensor | Stabilizer = 1e-6, *, stabilizer: Stab = 1e-6, zero_params: ZeroParams = None
) -> Composite:
    """`Epsilon` for convolutions and dense layers: close to input times gradient on a ReLU net.

    Args:
        epsilon: Of the `Epsilon` rule.
        stabilizer: Of sums and average pooling.
        zero_params: Names of parameters that are taken to be zero.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, lrp.epsilon())
        >>> relevance_fn(torch.ones(2, 1), torch.tensor([[1.0, 3.0]]), target=0)
        tensor([[1.0000, 3.0000]])

    References:
        S. Bach et al., "On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance
        propagation", PLOS ONE 10(7), 2015.
    """
    rule = Epsilon(epsilon, zero_params)
    return _recipe(rule, rule, stabilizer)


def epsilon_gamma_box(
    low: float | Tensor,
    high: float | Tensor,
    epsilon: float | Tensor | Stabilizer = 1e-6,
    gamma: float | Tensor = 0.25,
    *,
    stabilizer: Stab = 1e-6,
    zero_params: ZeroParams = None,
) -> Composite:
    """`ZBox` for the first convolution, `Gamma` for the others, `Epsilon` for dense layers.

    Args:
        low: The lower bound of the input, a number or a tensor of shape `(channels, 1, 1)`, say.
        high: The upper bound.
        epsilon: Of the dense layers.
        gamma: Of the convolutions.
        stabilizer: Of all other divisions.
        zero_params: Names of parameters that are taken to be zero.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> model_fn, params = lrp.from_module(net)
        >>> lrp.attribute(model_fn, lrp.epsilon_gamma_box(0.0, 1.0))(params, torch.rand(1, 1, 5, 5), target=0).shape
        torch.Size([1, 1, 5, 5])

    References:
        G. Montavon et al., "Layer-wise relevance propagation: an overview", in Explainable AI, Springer, 2019.
    """
    box = (Convolution, ZBox(low, high, stabilizer, zero_params))
    return _recipe(Gamma(gamma, stabilizer, zero_params), Epsilon(epsilon, zero_params), stabilizer, box)


def epsilon_plus(
    epsilon: float | Tensor | Stabilizer = 1e-6, *, stabilizer: Stab = 1e-6, zero_params: ZeroParams = None
) -> Composite:
    """`ZPlus` for convolutions, `Epsilon` for dense layers.

    Args:
        epsilon: Of the dense layers.
        stabilizer: Of all other divisions.
        zero_params: Names of parameters that are taken to be zero.

    Example:
        >>> import lrpfunc as lrp
        >>> lrp.epsilon_plus().entries[-1]
        (Dense, Epsilon(epsilon=1e-06, zero_params=None))

    References:
        M. Kohlbrenner et al., "Towards best practice in explaining neural network decisions with LRP", IJCNN, 2020.
    """
    return _recipe(ZPlus(stabilizer, zero_params), Epsilon(epsilon, zero_params), stabilizer)


def epsilon_plus_flat(
    epsilon: float | Tensor | Stabilizer = 1e-6, *, stabilizer: Stab = 1e-6, zero_params: ZeroParams = None
) -> Composite:
    """`epsilon_plus`, with `Flat` for the first convolution or dense layer.

    Args:
        epsilon: Of the dense layers.
        stabilizer: Of all other divisions.
        zero_params: Names of parameters that are taken to be zero.

    Example:
        >>> import lrpfunc as lrp
        >>> lrp.epsilon_plus_flat().entries[0]
        (first((Convolution | Dense)), Flat(stabilizer=1e-06, zero_params=None))

    References:
        M. Kohlbrenner et al., "Towards best practice in explaining neural network decisions with LRP", IJCNN, 2020.
    """
    flat = (Convolution | Dense, Flat(stabilizer, zero_params))
    return _recipe(ZPlus(stabilizer, zero_params), Epsilon(epsilon, zero_params), stabilizer, flat)


def epsilon_alpha2_beta1(
    epsilon: float | Tensor | Stabilizer = 1e-6, *, stabilizer: Stab = 1e-6, zero_params: ZeroParams = None
) -> Composite:
    """`AlphaBeta(2, 1)` for convolutions, `Epsilon` for dense layers.

    Args:
        epsilon: Of the dense layers.
        stabilizer: Of all other divisions.
        zero_params: Names of parameters that are taken to be zero.

    Example:
        >>> import lrpfunc as lrp
        >>> lrp.epsilon_alpha2_beta1() == lrp.epsilon_alpha2_beta1(1e-6)
        True

    References:
        S. Lapuschkin et al., "Understanding and comparing deep neural networks for age and gender classification",
        ICCV workshops, 2017.
    """
    return _recipe(AlphaBeta(2.0, 1.0, stabilizer, zero_params), Epsilon(epsilon, zero_params), stabilizer)


def epsilon_alpha2_beta1_flat(
    epsilon: float | Tensor | Stabilizer = 1e-6, *, stabilizer: Stab = 1e-6, zero_params: ZeroParams = None
) -> Composite:
    """`epsilon_alpha2_beta1`, with `Flat` for the first convolution or dense layer.

    Args:
        epsilon: Of the dense layers.
        stabilizer: Of all other divisions.
        zero_params: Names of parameters that are taken to be zero.

    Example:
        >>> import lrpfunc as lrp
        >>> lrp.epsilon_alpha2_beta1_flat().entries[0][0]
        first((Convolution | Dense))

    References:
        S. Lapuschkin et al., "Unmasking Clever Hans predictors and assessing what machines really learn", Nature
        Communications 10, 2019.
    """
    flat = (Convolution | Dense, Flat(stabilizer, zero_params))
    return _recipe(AlphaBeta(2.0, 1.0, stabilizer, zero_params), Epsilon(epsilon, zero_params), stabilizer, flat)


def attn_lrp() -> Composite:
    """AttnLRP: for transformers, state space models, recurrent and gated networks.

    The softmax by its Taylor expansion, products in equal shares, activations and normalizations by the identity.
    Recurrent gates, the weights of routed experts and the coefficients of a selective scan are held constant. Dense
    layers, convolutions and sums have no entry and take LRP-0; add a composite for them behind, as in
    `attn_lrp() + epsilon_plus()`.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> model_fn, params = lrp.from_module(torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval())
        >>> lrp.attribute(model_fn, lrp.attn_lrp())(params, torch.randn(1, 3, 4)).shape
        torch.Size([1, 3, 4])

    References:
        R. Achtibat et al., "AttnLRP: attention-aware layer-wise relevance propagation for transformers", ICML, 2024.
    """
    return general(
        (
            (Activation, Pass()),
            (Softmax, TaylorSoftmax()),
            (Recurrent | Router | Scan, SignalTakesAll()),
            (Product | Quotient | Statistic | Attention, Uniform()),
            (Normalization | BatchNorm, SignalTakesAll()),
        )
    )


def cp_lrp() -> Composite:
    """CP-LRP: as `attn_lrp`, but attention weights and gates are held constant, so that relevance is conserved.

    Relevance goes through the values of attention and what gates let through. A product of which neither operand is a
    gate is shared out.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda _, x: x[:, :1] * x[:, 1:].sigmoid(), lrp.cp_lrp())
        >>> relevance_fn(None, torch.tensor([[4.0, 0.0]]), target=0)
        tensor([[2., 0.]])

    References:
        A. Ali et al., "XAI for transformers: better explanations through conservative propagation", ICML, 2022.
    """
    return general(
        (
            (Activation, Pass()),
            (Softmax, Stop()),
            (Gate | Recurrent | Router | Scan, SignalTakesAll()),
            (Attention | Normalization | BatchNorm, SignalTakesAll()),
            (Product | Quotient | Statistic, Uniform()),
        )
    )


def mamba_lrp() -> Composite:
    """MambaLRP: for state space models, with their selective scans, gates and normalizations.

    Relevance goes through the input of a selective scan; its discretised coefficients are held constant. Gates share.

    Example:
        >>> import lrpfunc as lrp
        >>> lrp.mamba_lrp().entries[1]
        (Scan, SignalTakesAll())

    References:
        F. Rezaei Jafari et al., "MambaLRP: explaining selective state space sequence models", NeurIPS, 2024.
    """
    return general(
        (
            (Activation, Pass()),
            (Scan, SignalTakesAll()),
            (Product, Uniform()),
            (Normalization, SignalTakesAll()),
        )
    )


def excitation_backprop(*, stabilizer: Stab = 1e-6, zero_params: ZeroParams = None) -> Composite:
    """`ZPlus` everywhere; the relevance itself goes through the plain VJP of activations and batch norms.

    Args:
        stabilizer: Of all divisions.
        zero_params: Names of parameters that are taken to be zero.

    Example:
        >>> import lrpfunc as lrp
        >>> lrp.excitation_backprop().entries[0]
        (Activation, Gradient(of='relevance'))

    References:
        J. Zhang et al., "Top-down neural attention by excitation backprop", IJCV 126, 2018.
    """
    norm, plain = Norm(stabilizer), Gradient("relevance")
    rule = ZPlus(stabilizer, zero_params)
    return general(((Activation, plain), (BatchNorm, plain), (Sum, norm), (AvgPool, norm), (Convolution | Dense, rule)))


def gradient() -> Composite:
    """No rule at all: the plain gradient, a cotangent composite.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> lrp.attribute(lambda w, x: (x @ w).tanh(), lrp.gradient())(torch.ones(2, 1), torch.zeros(1, 2), target=0)
        tensor([[1., 1.]])
    """
    return general((), cotangent=True)


def deconvnet() -> Composite:
    """`ReLUDeconvNet` for ReLUs, the plain VJP elsewhere: a cotangent composite.

    Example:
        >>> import lrpfunc as lrp
        >>> lrp.deconvnet().cotangent
        True

    References:
        M. D. Zeiler and R. Fergus, "Visualizing and understanding convolutional networks", ECCV, 2014.
    """
    return general(((ReLU, ReLUDeconvNet()),), cotangent=True)


def guided_backprop() -> Composite:
    """`ReLUGuidedBackprop` for ReLUs, the plain VJP elsewhere: a cotangent composite.

    Example:
        >>> import lrpfunc as lrp
        >>> lrp.guided_backprop().entries
        ((operation('relu'), ReLUGuidedBackprop()),)

    References:
        J. T. Springenberg et al., "Striving for simplicity: the all convolutional net", ICLR workshop, 2015.
    """
    return general(((ReLU, ReLUGuidedBackprop()),), cotangent=True)


def beta_smooth(beta_smooth: float | Tensor = 10.0) -> Composite:
    """`ReLUBetaSmooth` for ReLUs, the plain VJP elsewhere: a cotangent composite.

    Args:
        beta_smooth: The sharpness of the softplus whose derivative stands in for the ReLU's.

    Example:
        >>> import lrpfunc as lrp
        >>> lrp.beta_smooth(5.0).entries
        ((operation('relu'), ReLUBetaSmooth(beta_smooth=5.0)),)

    References:
        A.-K. Dombrowski et al., "Explanations can be manipulated and geometry is to blame", NeurIPS, 2019.
    """
    return general(((ReLU, ReLUBetaSmooth(beta_smooth)),), cotangent=True)
