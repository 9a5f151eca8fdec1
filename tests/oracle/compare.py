"""Draws cases, and compares what the library says with what the oracle says."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor

import lrpfunc as lrp
from lrpfunc.testing import Net, models
from tests.oracle.composites import read
from tests.oracle.programs import program
from tests.oracle.rules import Sent
from tests.oracle.tape import UnknownOperationError
from tests.oracle.walk import Recording, Result, UncoveredError

ROUNDING = 1e-8
"""What the two may differ by, relative to the largest relevance anywhere."""

SLOPES = 1e-5
"""What derivatives may differ by from finite differences, relative to the largest relevance anywhere."""

EVERY_CHECK: Any = list(HealthCheck)

CASES_A_MODEL = 8
"""Recording a model takes most of the time."""

LINEAR = [
    *(
        "Epsilon(0.1)",
        "Epsilon(Stabilizer(0.1, clip=True))",
        "Epsilon(Stabilizer(0.5, norm_scale=True))",
        "Epsilon(0.0)",
    ),
    *("Epsilon(0.1, zero_params='bias')", "ZPlus(0.01)", "ZPlus(0.1, zero_params='bias')", "AlphaBeta(2.0, 1.0, 0.1)"),
    *(
        "AlphaBeta(1.0, 0.0, 0.1)",
        "AlphaBeta(1.5, 0.5, Stabilizer(0.1, clip=True))",
        "Gamma(0.25, 0.1)",
        "Gamma(0.0, 0.1)",
    ),
    *("Gamma(1.0, Stabilizer(0.1, norm_scale=True), zero_params='bias')", "ZBox(-4.0, 4.0, 0.1)", "WSquare(0.1)"),
    *("WSquare(0.1, zero_params='bias')", "Flat(0.01)", "Gradient()", "Gradient('relevance')", "Stop()", "Uniform()"),
    *("(2 * Epsilon(0.1) - 0.5 * ZPlus(0.01))", "(0.5 * Flat(0.1) + 0.5 * Gradient())"),
]
"""Rules for dense layers and convolutions."""

ENTRIES = [
    *(f"({layers}, {rule})" for layers in ("Dense | Convolution", "Dense", "Convolution") for rule in LINEAR),
    *(f"(first(Dense | Convolution), {rule})" for rule in ("Flat(0.1)", "WSquare(0.1)", "ZBox(-3.0, 3.0, 0.1)")),
    *(f"(Sum | AvgPool, {rule})" for rule in ("Norm(0.1)", "Norm(Stabilizer(0.1, clip=True))", "Uniform()", "Stop()")),
    *(f"(Activation, {rule})" for rule in ("Pass()", "Gradient()", "Gradient('relevance')", "Stop()")),
    *(f"(Activation, {rule})" for rule in ("ReLUDeconvNet()", "ReLUGuidedBackprop()", "ReLUBetaSmooth(3.0)")),
    *(f"(Product, {rule})" for rule in ("Uniform()", "Gradient()", "Stop()", "(0.5 * Gradient() + 0.5 * Uniform())")),
    *(f"(Gate, {rule})" for rule in ("SignalTakesAll()", "Uniform()", "(0.3 * SignalTakesAll() + 0.7 * Uniform())")),
    *(f"(Recurrent, {rule})" for rule in ("SignalTakesAll()", "Uniform()", "Gradient()", "Stop()")),
    *(f"(Normalization, {rule})" for rule in ("SignalTakesAll()", "Gradient()", "Stop()")),
    *(f"(BatchNorm, {rule})" for rule in ("SignalTakesAll()", "Gradient()", "Pass()", "Epsilon(0.1)")),
    *(f"(Attention, Uniform()), (Softmax, {rule})" for rule in ("TaylorSoftmax()", "TaylorSoftmax('omit', 0.1)")),
    "(Attention, Uniform()), (Softmax, TaylorSoftmax('distribute'))",
    *(f"(Attention, {rule})" for rule in ("SignalTakesAll()", "Stop()")),
]
RECIPES = [
    *("epsilon(0.1, stabilizer=0.1)", "epsilon_plus(0.1, stabilizer=0.1)", "epsilon_plus_flat(0.1, stabilizer=0.1)"),
    *("epsilon_gamma_box(-4.0, 4.0, 0.1, stabilizer=0.1)", "epsilon_alpha2_beta1(0.1, stabilizer=0.1)"),
    *("epsilon_alpha2_beta1_flat(0.1, stabilizer=0.1)", "excitation_backprop(stabilizer=0.1)"),
]
ATTENTION = ["attn_lrp()", "cp_lrp()", "mamba_lrp() + attn_lrp()"]
COTANGENT = ["gradient()", "deconvnet()", "guided_backprop()", "beta_smooth(3.0)"]


def composite(rng: random.Random) -> str:
    """The text of a composite that covers every model."""
    if rng.random() < 0.08:
        return rng.choice(COTANGENT)
    if rng.random() < 0.04:
        return "None"
    mine = ", ".join(rng.sample(ENTRIES, rng.randint(0, 2)))
    parts = [rng.choice(RECIPES), rng.choice(ATTENTION)]
    return f"[{mine}] + " * bool(mine) + " + ".join(parts if rng.random() < 0.7 else parts[::-1])


@dataclass(frozen=True)
class Target:
    """Where relevance starts, in the library's words and in the oracle's."""

    kind: str
    index: int
    other: int = 0

    def theirs(self, output: Tensor) -> Any:
        match self.kind:
            case "index":
                return self.index
            case "everything":
                return None
            case "contrast":
                return lrp.contrast(self.index, self.other)
            case "one":
                return lrp.one_hot(self.index, 1.0)
            case _:
                return self._numbers(output)

    def ours(self, output: Tensor) -> Sent:
        start = torch.zeros_like(output)
        if self.kind == "everything":
            start += 1
        elif self.kind == "numbers":
            start = self._numbers(output)
        else:
            start[:, self.index] += 1
            if self.kind == "contrast":
                start[:, self.other] -= 1
        return Sent(start.flatten(), self.kind in ("one", "numbers"))

    def _numbers(self, output: Tensor) -> Tensor:
        count = torch.arange(output.numel(), dtype=output.dtype).reshape(output.shape)
        return torch.cos(1.7 * count + self.index)


def target(rng: random.Random, outputs: int) -> Target:
    kind = rng.choice(["index", "index", "everything", "contrast", "one", "numbers"])
    return Target(kind, rng.randrange(outputs), rng.randrange(outputs))


# --------------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class Model:
    """A function, its parameters and an input, and how to make them again."""

    function: Callable[[Any, Tensor], Tensor]
    params: dict[str, Tensor]
    x: Tensor
    shown: str


def drawn_net(number: int) -> Net:
    found: list[Net] = []

    @seed(number)
    @settings(max_examples=4, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=EVERY_CHECK)
    @given(models(max_blocks=4))
    def draw(net: Net) -> None:
        found.append(net)

    draw()
    return found[-1]


def model(number: int) -> Model:
    """A net of `lrpfunc.testing`, or for every third number a program of writes in place."""
    if number % 3 == 2:
        made = program(number)
        return Model(made.function, made.params, made.x, made.source)
    net = drawn_net(number)
    return Model(*net.case(), repr(net))


# --------------------------------------------------------------------------------------------------------------
# What is compared


class Disagreement(AssertionError):
    """The library and the oracle do not say the same."""


class Compared:
    """A model, recorded by the oracle once, and beside it a little to either side along one direction."""

    steps = (3e-5, 1.5e-5, -1.5e-5, -3e-5)

    def __init__(self, model: Model, rng: random.Random):
        self.model = model
        generator = torch.Generator().manual_seed(rng.randrange(10**6))

        def like(tensor: Tensor) -> Tensor:
            return torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)

        self.along = {name: like(p) for name, p in model.params.items()}, like(model.x)
        self.weights = like(model.x)
        self.here = Recording(model.function, model.params, model.x)
        self.beside = [Recording(model.function, *self._moved(t)) for t in self.steps]

    def _moved(self, t: float) -> tuple[dict[str, Tensor], Tensor]:
        ways, way = self.along
        return {name: p + t * ways[name] for name, p in self.model.params.items()}, self.model.x + t * way

    def check(self, text: str, target: Target, *, lowered: bool) -> bool:
        """Compares one case; whether its derivative could be compared, too."""
        ours = self.oracle(text, target, self.here)
        theirs = eval(text, vars(lrp).copy())
        given = target.theirs(self.here.output)
        function, params, x = self.model.function, self.model.params, self.model.x
        scale = max(ours.scale, 1e-4)
        relevance, value = lrp.attribute_and_value(function, theirs, lowered=lowered)(params, x, target=given)
        if not torch.equal(value, function(params, x)):
            raise Disagreement("the value is not the model's own")
        self.same("value", value, self.here.output, ROUNDING * max(1.0, float(value.abs().max())))
        self.same("relevance", relevance, ours.relevance, ROUNDING * scale)
        self.balance(lrp.explain(function, theirs)(params, x, target=given), ours, ROUNDING * scale)
        return self.slope(theirs, text, target, ours, lowered)

    @staticmethod
    def same(what: str, theirs: Any, ours: Any, tolerance: float) -> None:
        theirs, ours = (torch.as_tensor(v, dtype=torch.float64) for v in (theirs, ours))
        off = (theirs - ours).abs().max()
        if not off <= tolerance * 10:
            raise Disagreement(
                f"{what}: the library says {theirs.tolist()}, the oracle {ours.tolist()}, off by {off:.2g}"
            )

    def balance(self, table: lrp.Explanation, ours: Result, tolerance: float) -> None:
        self.same("relevance in explain", table.relevance, ours.relevance, tolerance)
        self.same("start", table.start, ours.start, tolerance * 10)
        self.same("relevance that reaches the input", table.relevance_in, ours.reached, tolerance * 10)
        for cause in sorted({*table.absorbed, *ours.lost}):
            self.same(f"absorbed by {cause}", table.absorbed.get(cause, 0.0), ours.lost.get(cause, 0.0), tolerance * 10)

    def oracle(self, text: str, target: Target, recording: Recording) -> Result:
        found = read(text)
        assert found is not None
        start = target.ours(recording.output)
        return recording.explain(found, start)

    def slope(self, theirs: Any, text: str, target: Target, ours: Result, lowered: bool) -> bool:
        far, near, back, behind = (
            float((self.weights * self.oracle(text, target, beside).relevance).sum()) for beside in self.beside
        )
        at, h = float((self.weights * ours.relevance).sum()), self.steps[0]
        jump = 2 * (near - 2 * at + back) / (h / 2) - (far - 2 * at + behind) / h  # that of the slope at a kink
        wide, narrow = (far - behind) / (2 * h), (near - back) / h
        numeric = (4 * narrow - wide) / 3
        scale = max(abs(numeric), ours.scale, 1e-3)
        if any(beside.zeros != self.here.zeros for beside in self.beside):
            return False  # `0 / 0` is read as 0, which has another derivative than what lies around it
        if abs(jump) > SLOPES * scale or abs(wide - narrow) > SLOPES * scale:
            return False
        fn = lrp.attribute(self.model.function, theirs, lowered=False)

        def weighed(params: Any, x: Tensor) -> Tensor:
            return (self.weights * fn(params, x, target=target.theirs(self.here.output))).sum()

        by_params, by_x = torch.func.grad(weighed, argnums=(0, 1))(self.model.params, self.model.x)
        ways, way = self.along
        exact = (by_x * way).sum() + sum((by_params[name] * ways[name]).sum() for name in ways)
        self.same("derivative", exact, numeric, SLOPES * scale)
        return True


# --------------------------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    number: int
    says: str
    detail: str = ""


def outcomes(number: int, each: int = CASES_A_MODEL) -> Iterator[Outcome]:
    """Those of so many cases of one model."""
    rng = random.Random(number)
    first = number * CASES_A_MODEL
    drawn = model(number)
    try:
        compared = Compared(drawn, rng)
    except UnknownOperationError as error:
        yield from (Outcome(first + i, "unknown", str(error)) for i in range(each))
        return
    outputs = compared.here.output.shape[1]
    for i in range(each):
        text, start = composite(rng), target(rng, outputs)
        shown = f"{drawn.shown}\nrules = {text}\ntarget = {start}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                smooth = compared.check(text, start, lowered=i == number % 4 == 0)
            yield Outcome(first + i, "agree" if smooth else "agree, at a kink")
        except (lrp.RuleError, lrp.NoPathError, lrp.UncoveredLayerError, UncoveredError) as error:
            yield Outcome(first + i, "refused", f"{type(error).__name__}: {error}\n{shown}")
        except Disagreement as error:
            yield Outcome(first + i, "disagree", f"{error}\n{shown}")
        except Exception as error:
            yield Outcome(first + i, "failed", f"{type(error).__name__}: {error}\n{shown}")
