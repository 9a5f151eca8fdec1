"""Derivatives of relevance against finite differences that say how far they can be trusted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp

import lrpfunc as lrp
from lrpfunc import _tree as tree
from lrpfunc.composites import as_composite
from lrpfunc.testing._numbers import PropertyError, require_float64

STEPS = (1e-3, 1e-4, 1e-5)
FINER = (1e-6, 1e-7, 1e-8, 1e-9)
"""Steps at which a difference must still be what it was before it is held against a derivative."""
TOLERANCE = 1e-6
"""Of the magnitude of what adds up to the derivative, beside what finite differences say of their own error."""


@dataclass(frozen=True)
class Estimate:
    """A derivative by finite differences.

    Attributes:
        value: Richardson's extrapolation of central differences.
        error: How much it changes when the step is halved, and what rounding may add.
        kink: Whether the derivatives from the two sides differ, so that there is none.
    """

    value: float
    error: float
    kink: bool

    @property
    def trusted(self) -> bool:
        return not self.kink and math.isfinite(self.error) and self.error <= 1e-4 * abs(self.value) + 1e-9

    def agrees(self, exact: float, scale: float) -> bool:
        """Whether it is `exact`, a sum of terms of such a magnitude. NaN agrees with nothing."""
        return abs(exact - self.value) <= 20 * self.error + TOLERANCE * max(scale, abs(self.value))


@dataclass(frozen=True, eq=False)
class Part:
    """One leaf of what is differentiated: its name, and where it is moved to."""

    name: str
    tensor: Tensor
    direction: Tensor


def assert_exact_derivatives(
    model_fn: Callable[..., Any],
    params: Any,
    x: Any,
    rules: Any = None,
    *,
    target: Any = None,
    lowered: bool = True,
    seed: int = 0,
) -> bool:
    r"""Derivatives of relevance, in reverse and forward mode, are those of finite differences.

    A scalar made of the relevance is differentiated along a random direction of the input, the parameters and the
    tensors inside rules, all at once. The reference is Richardson's extrapolation of central differences, whose change
    with the step says how far it can be trusted; the step is made smaller until it can. Relevance has kinks, at the
    zeros of a ReLU for example. Where the derivatives from both sides differ, or a kink is closer than the smallest
    step, or much smaller steps give something else, as within a stabilizer of 1e-6, there is nothing to compare with,
    and the input, the parameters and the tensors of rules are tried apart.

    Args:
        model_fn: A function `f(params, x)`, in float64.
        params: Its parameters.
        x: Its input.
        rules: As for `lrpfunc.attribute`. Tensors inside, float64 too, are differentiated.
        target: As for `lrpfunc.attribute`.
        lowered: Likewise.
        seed: Of the direction.

    Returns:
        Whether there was anything to compare with: `False` at a kink.

    Raises:
        ValueError: If parameters or input are floating-point tensors of another dtype.
        AssertionError: If they differ, with the leaves for which they do, and the direction of each.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import Linear, Net, assert_exact_derivatives
        >>> assert_exact_derivatives(*Net((Linear(2),)).case(), lrp.epsilon(0.1), target=0)
        True
    """
    require_float64(params, x)

    def scalar(at: dict[str, Any]) -> Tensor:
        fn = lrp.attribute(model_fn, at["rules"], lowered=lowered)
        return _scalar(fn(at["parameters"], at["input"], target=target))

    at = tree.map_only(Tensor, torch.Tensor.detach, {"input": x, "parameters": params, "rules": as_composite(rules)})
    groups = [["input", "parameters", "rules"], ["input"], ["parameters"], ["rules"]]
    for group in groups:
        parts = _parts(at, group, seed)
        scale = _compare(Along(scalar, at, parts)) if parts else None
        if scale or (scale == 0 and group is groups[0]):  # tensors in rules that serve no layer tell nothing
            return True
    return False


def _scalar(relevance: Any) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for leaf in tree.leaves(relevance):
        probe = torch.linspace(-1, 1.5, leaf.numel(), dtype=leaf.dtype).reshape(leaf.shape)
        total = total + (leaf * probe).sum() + leaf.square().sum()
    return total


def _parts(at: Any, groups: Sequence[str], seed: int) -> list[Part]:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, leaf in tree.named_leaves(at):
        if name.startswith(tuple(groups)) and isinstance(leaf, Tensor) and leaf.is_floating_point():
            parts.append(Part(name, leaf, torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator)))
    return parts


@dataclass(frozen=True, eq=False)
class Along:
    """A scalar of a pytree, as a function of some of its leaves and along their directions."""

    scalar: Callable[[Any], Tensor]
    at: Any
    parts: list[Part]

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        moved = dict(zip((part.name for part in self.parts), tensors, strict=True))
        leaves = [moved.get(name, leaf) for name, leaf in tree.named_leaves(self.at)]
        return self.scalar(tree.unflatten(leaves, tree.structure(self.at)))

    def estimate(self, of: list[Part]) -> Estimate | None:
        """The derivative along the directions of some parts, by the first step that can be trusted."""

        def at(t: float) -> float:
            return float(self([p.tensor + t * p.direction if p in of else p.tensor for p in self.parts]))

        with torch.no_grad():
            estimates = (_estimate(at, step) for step in STEPS)
            return next((estimate for estimate in estimates if estimate.trusted), None)

    def settled(self, estimate: Estimate, exact: float) -> bool:
        """Whether finer differences stay where the estimate is, instead of moving away in a feature too narrow for it.

        They are plain ones, which rounding blurs: away is by a tenth of the disagreement.
        """
        with torch.no_grad():
            for h in FINER:
                up, down = (float(self([p.tensor + t * p.direction for p in self.parts])) for t in (h, -h))
                rounding = 1e-14 * max(abs(up), abs(down)) / h
                moved = abs((up - down) / (2 * h) - estimate.value)
                if moved > 20 * estimate.error + 0.1 * abs(exact - estimate.value) + rounding:
                    return False
        return True

    def reverse(self) -> list[Tensor]:
        """What each part adds to the derivative, element by element."""
        gradients = grad(self)([part.tensor for part in self.parts])
        return [g * part.direction for g, part in zip(gradients, self.parts, strict=True)]

    def forward(self) -> float:
        tensors, directions = [part.tensor for part in self.parts], [part.direction for part in self.parts]
        return float(jvp(self, (tensors,), (directions,))[1])


def _compare(along: Along) -> float | None:
    """The magnitude of what was compared, `None` if there was nothing to compare with."""
    estimate = along.estimate(along.parts)
    if estimate is None:
        return None
    terms = along.reverse()
    scale = float(sum(term.abs().sum() for term in terms))
    # Forward mode second: an operation may not have it, and what reverse mode says tells more.
    for mode, exact in (("reverse", lambda: float(sum(term.sum() for term in terms))), ("forward", along.forward)):
        if not estimate.agrees(derivative := exact(), scale):
            if not along.settled(estimate, derivative):
                return None
            raise InexactError(f"{derivative:.9g} in {mode} mode", estimate, lambda: _blamed(along, terms))
    return scale


def _estimate(g: Callable[[float], float], step: float) -> Estimate:
    steps = (step, step / 2, step / 4)
    middle, sides = g(0.0), [(g(h), g(-h)) for h in steps]
    central = [(up - down) / (2 * h) for (up, down), h in zip(sides, steps, strict=True)]
    coarse, fine = ((4 * b - a) / 3 for a, b in itertools.pairwise(central))
    rounding = 1e-15 * max(abs(middle), *(abs(v) for pair in sides for v in pair)) / step
    error = abs(fine - coarse) + 10 * rounding
    # The difference of the slopes of both sides: its limit for a step of 0, which is 0 where there is no kink.
    bends = [(up - 2 * middle + down) / h for (up, down), h in zip(sides, steps, strict=True)]
    kink = abs(4 * bends[2] - bends[0]) / 3 > 10 * error + 1e-6 * abs(fine) + 100 * rounding
    return Estimate(fine, error, kink)


def _blamed(along: Along, terms: list[Tensor]) -> Iterator[str]:
    """The leaves whose own derivatives differ."""
    for part, term in zip(along.parts, terms, strict=True):
        estimate, ours = along.estimate([part]), float(term.sum())
        if estimate is not None and not estimate.agrees(ours, abs(ours)):
            direction = part.direction.flatten().tolist()
            shown = ", ".join(f"{d:.3g}" for d in direction[:6]) + (", ..." if len(direction) > 6 else "")
            yield f"{part.name}, along [{shown}]: {ours:.9g}, finite differences {estimate.value:.9g}"


class InexactError(PropertyError):
    """A derivative is wrong; for which leaves is found out when it is printed, since that takes long."""

    def __init__(self, derivative: str, estimate: Estimate, blamed: Callable[[], Iterator[str]]):
        super().__init__(derivative, estimate)
        self.derivative, self.estimate, self.blamed = derivative, estimate, blamed

    def __str__(self) -> str:
        message = (
            f"the derivative of relevance is {self.derivative} and {self.estimate.value:.9g} by finite differences, "
            f"which are off by no more than {self.estimate.error:.1e}"
        )
        lines = "\n".join(f"    {line}" for line in self.blamed())
        return f"{message}. It differs for\n\n{lines}" if lines else message
