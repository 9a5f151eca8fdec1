"""Selectors and recipes, from the tables of the literature: what the text of a composite means to the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.oracle import rules
from tests.oracle.layers import Layer
from tests.oracle.rules import Rule


@dataclass(frozen=True)
class Selector:
    """A predicate on layers."""

    test: Callable[[Layer], bool]

    def __or__(self, other: Selector) -> Selector:
        return Selector(lambda layer: self.test(layer) or other.test(layer))

    def __and__(self, other: Selector) -> Selector:
        return Selector(lambda layer: self.test(layer) and other.test(layer))


def _kind(*kinds: str) -> Selector:
    return Selector(lambda layer: layer.kind in kinds)


Dense, Convolution, Activation = _kind("dense"), _kind("convolution"), _kind("activation")
Sum, AvgPool, BatchNorm = _kind("sum", "total"), _kind("average"), _kind("batch_norm")
Softmax, Attention, Product = _kind("softmax"), _kind("attention"), _kind("product")
Quotient, Normalization = _kind("quotient"), _kind("normalization")
Gate, Recurrent = (Selector(lambda layer, role=role: layer.role == role) for role in ("gate", "recurrent"))
ReLU = Selector(lambda layer: layer.operation == "relu")


def first(selector: Selector) -> Selector:
    return Selector(lambda layer: next((other for other in layer.layers if selector.test(other)), None) is layer)


@dataclass(frozen=True)
class Weighed:
    """A rule, or several with weights."""

    terms: tuple[tuple[float, Rule], ...]

    def __rmul__(self, factor: float) -> Weighed:
        return Weighed(tuple((factor * weight, rule) for weight, rule in self.terms))

    def __add__(self, other: Weighed) -> Weighed:
        return Weighed(self.terms + other.terms)

    def __sub__(self, other: Weighed) -> Weighed:
        return self + -1 * other

    @property
    def rule(self) -> Rule:
        alone = len(self.terms) == 1 and self.terms[0][0] == 1
        return self.terms[0][1] if alone else rules.combination(list(self.terms))


@dataclass(frozen=True)
class Composite:
    """Selectors and rules; the first that matches decides."""

    entries: tuple[tuple[Selector, Weighed], ...]
    cotangent: bool = False

    def __add__(self, other: Composite) -> Composite:
        return Composite(self.entries + other.entries, self.cotangent or other.cotangent)

    def __radd__(self, other: list[tuple[Selector, Weighed]]) -> Composite:
        return Composite(tuple(other) + self.entries, self.cotangent)

    def rule_for(self, layer: Layer) -> Rule | None:
        return next((weighed.rule for selector, weighed in self.entries if selector.test(layer)), None)


def _named(make: Callable[..., Rule]) -> Callable[..., Weighed]:
    return lambda *args, **kwargs: Weighed(((1, make(*args, **kwargs)),))


RULES = {
    make.__name__: _named(make)
    for make in (
        *(rules.Epsilon, rules.Norm, rules.ZPlus, rules.AlphaBeta, rules.Gamma, rules.ZBox, rules.WSquare, rules.Flat),
        *(rules.Gradient, rules.Stop, rules.Uniform, rules.SignalTakesAll, rules.Pass, rules.ReLUDeconvNet),
        *(rules.ReLUGuidedBackprop, rules.ReLUBetaSmooth, rules.TaylorSoftmax),
    )
}
Epsilon, Norm, ZPlus, AlphaBeta = (RULES[name] for name in ("Epsilon", "Norm", "ZPlus", "AlphaBeta"))
Gamma, ZBox, Flat, Pass = (RULES[name] for name in ("Gamma", "ZBox", "Flat", "Pass"))
Gradient, Stop, Uniform, Signal = (RULES[name] for name in ("Gradient", "Stop", "Uniform", "SignalTakesAll"))
TaylorSoftmax = RULES["TaylorSoftmax"]

Stab = float | rules.Stabilizer


def _recipe(start: list[Any], convolution: Weighed, dense: Weighed, stabilizer: Stab) -> Composite:
    norm = Norm(stabilizer)
    base = [(Activation, Pass()), (Sum, norm), (AvgPool, norm), (BatchNorm, Pass())]
    return Composite((*start, *base, (Convolution, convolution), (Dense, dense)))


def epsilon(epsilon: Stab = 1e-6, stabilizer: Stab = 1e-6) -> Composite:
    return _recipe([], Epsilon(epsilon), Epsilon(epsilon), stabilizer)


def epsilon_plus(epsilon: Stab = 1e-6, stabilizer: Stab = 1e-6) -> Composite:
    return _recipe([], ZPlus(stabilizer), Epsilon(epsilon), stabilizer)


def epsilon_plus_flat(epsilon: Stab = 1e-6, stabilizer: Stab = 1e-6) -> Composite:
    return _recipe([(first(Convolution | Dense), Flat(stabilizer))], ZPlus(stabilizer), Epsilon(epsilon), stabilizer)


def epsilon_alpha2_beta1(epsilon: Stab = 1e-6, stabilizer: Stab = 1e-6) -> Composite:
    return _recipe([], AlphaBeta(2.0, 1.0, stabilizer), Epsilon(epsilon), stabilizer)


def epsilon_alpha2_beta1_flat(epsilon: Stab = 1e-6, stabilizer: Stab = 1e-6) -> Composite:
    flat = [(first(Convolution | Dense), Flat(stabilizer))]
    return _recipe(flat, AlphaBeta(2.0, 1.0, stabilizer), Epsilon(epsilon), stabilizer)


def epsilon_gamma_box(
    low: float, high: float, epsilon: Stab = 1e-6, gamma: float = 0.25, stabilizer: Stab = 1e-6
) -> Composite:
    box = [(first(Convolution), ZBox(low, high, stabilizer))]
    return _recipe(box, Gamma(gamma, stabilizer), Epsilon(epsilon), stabilizer)


def excitation_backprop(stabilizer: Stab = 1e-6) -> Composite:
    plain, norm = Gradient("relevance"), Norm(stabilizer)
    base = ((Activation, plain), (BatchNorm, plain), (Sum, norm), (AvgPool, norm))
    return Composite((*base, (Convolution | Dense, ZPlus(stabilizer))))


def attn_lrp() -> Composite:
    return Composite(
        (
            (Activation, Pass()),
            (Softmax, TaylorSoftmax()),
            (Recurrent, Signal()),
            (Product | Quotient | Attention, Uniform()),
            (Normalization | BatchNorm, Signal()),
        )
    )


def cp_lrp() -> Composite:
    return Composite(
        (
            (Activation, Pass()),
            (Softmax, Stop()),
            (Gate | Recurrent | Attention | Normalization | BatchNorm, Signal()),
            (Product | Quotient, Uniform()),
        )
    )


def mamba_lrp() -> Composite:
    return Composite(((Activation, Pass()), (Product, Uniform()), (Normalization, Signal())))


def gradient() -> Composite:
    return Composite((), cotangent=True)


def deconvnet() -> Composite:
    return Composite(((ReLU, RULES["ReLUDeconvNet"]()),), cotangent=True)


def guided_backprop() -> Composite:
    return Composite(((ReLU, RULES["ReLUGuidedBackprop"]()),), cotangent=True)


def beta_smooth(sharpness: float = 10.0) -> Composite:
    return Composite(((ReLU, RULES["ReLUBetaSmooth"](sharpness)),), cotangent=True)


def read(text: str) -> Composite | None:
    """What a text such as `[(Dense, Flat())] + epsilon()` says."""
    found = eval(text, {**globals(), **RULES, "Stabilizer": rules.Stabilizer})
    if found is None:  # the default
        return attn_lrp() + Composite(((Convolution, ZPlus()), (Dense, Epsilon())))
    return found
