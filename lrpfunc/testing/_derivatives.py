"""Derivatives of relevance against finite differences that say how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad, jvp

import lrpfunc as lrp
from lrpfunc.testing._hyperparameters import hyperparameters

STEPS = (1e-3, 1e-4, 1e-5)
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


@dataclass(frozen=True)
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
    seed: int = 0,
) -> bool:
    r"""Derivatives of relevance, in reverse and forward mode, are those of finite differences.

    A scalar made of the relevance is differentiated along a random direction of the input, the parameters and the
    tensors inside rules, all at once. The reference is Richardson's extrapolation of central differences, whose change
    with the step says how far it can be trusted; the step is made smaller until it can. Relevance has kinks, at the
    zeros of a ReLU for example. Where the derivatives from both sides differ, or a kink is closer than the smallest
    step, there is nothing to compare with, and the input, the parameters and the tensors of rules are tried apart.

    Args:
        model_fn: A function `f(params, x)`, in float64.
        params: Its parameters.
        x: Its input.
        rules: As for `lrpfunc.attribute`. Tensors inside, float64 too, are differentiated.
        target: As for `lrpfunc.attribute`.
        seed: Of the direction.

    Returns:
        Whether there was anything to compare with: `False` at a kink.

    Raises:
        AssertionError: If they differ, with the leaves for which they do, and the direction of each.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import Linear, Net, assert_exact_derivatives
        >>> assert_exact_derivatives(*Net((Linear(2),)).case(), lrp.epsilon(0.1), target=0)
        True
    """
    held, rebuild = hyperparameters(rules)

    def scalar(at: dict[str, Any]) -> Tensor:
        fn = lrp.attribute(model_fn, rebuild(at["rules"]))
        return _scalar(fn(at["parameters"], at["input"], target=target))

    at = pytree.tree_map_only(Tensor, torch.Tensor.detach, {"input": x, "parameters": params, "rules": held})
    groups = [["input", "parameters", "rules"], ["input"], ["parameters"], ["rules"]]
    for group in groups:
        parts = _parts(at, group, seed)
        if parts and (decided := _compare(scalar, at, parts)):
            return decided
    return False


def _scalar(relevance: Any) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for leaf in pytree.tree_leaves(relevance):
        probe = torch.linspace(-1, 1.5, leaf.numel(), dtype=leaf.dtype).reshape(leaf.shape)
        total = total + (leaf * probe).sum() + leaf.square().sum()
    return total


def _parts(at: Any, groups: Sequence[str], seed: int) -> list[Part]:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for path, leaf in pytree.tree_flatten_with_path(at)[0]:
        name = pytree.keystr(path)
        if path[0].key in groups and isinstance(leaf, Tensor) and leaf.is_floating_point():
            parts.append(Part(name, leaf, torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator)))
    return parts


def _compare(scalar: Callable[[Any], Tensor], at: Any, parts: list[Part]) -> bool:
    spec = pytree.tree_structure(at)
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(at)[0]]
    leaves = dict(zip(names, pytree.tree_leaves(at), strict=True))

    def function(tensors: list[Tensor]) -> Tensor:
        moved = leaves | {part.name: tensor for part, tensor in zip(parts, tensors, strict=True)}
        return scalar(pytree.tree_unflatten(list(moved.values()), spec))

    def along(t: float, of: list[Part]) -> float:
        return float(function([p.tensor + t * p.direction if p in of else p.tensor for p in parts]))

    with torch.no_grad():
        estimate = next(_estimates(lambda t: along(t, parts)), None)
    if estimate is None:
        return False
    tensors = [part.tensor for part in parts]
    gradients = grad(function)(tensors)
    terms = [g * part.direction for g, part in zip(gradients, parts, strict=True)]
    reverse = float(sum(term.sum() for term in terms))
    scale = max(float(sum(term.abs().sum() for term in terms)), abs(estimate.value))
    _, forward = jvp(function, (tensors,), ([part.direction for part in parts],))
    wrong = {}
    for mode, exact in (("reverse", reverse), ("forward", float(forward))):
        if not abs(exact - estimate.value) <= 20 * estimate.error + TOLERANCE * scale:
            wrong[mode] = exact
    if wrong:
        raise InexactError(wrong, estimate, lambda: _blamed(along, parts, [float(term.sum()) for term in terms]))
    return True


def _estimates(g: Callable[[float], float]) -> Iterator[Estimate]:
    """Those that can be trusted, from the largest step to the smallest."""
    for step in STEPS:
        estimate = _estimate(g, step)
        if math.isfinite(estimate.error) and estimate.error <= 1e-4 * abs(estimate.value) + 1e-9 and not estimate.kink:
            yield estimate


def _estimate(g: Callable[[float], float], step: float) -> Estimate:
    middle = g(0.0)
    sides = [(g(h), g(-h)) for h in (step, step / 2, step / 4)]
    central = [(up - down) / (2 * h) for (up, down), h in zip(sides, (step, step / 2, step / 4), strict=True)]
    coarse, fine = ((4 * b - a) / 3 for a, b in zip(central, central[1:], strict=False))
    rounding = 1e-15 * max(abs(middle), *(abs(v) for pair in sides for v in pair)) / step
    # The difference of the slopes of both sides shrinks with the step where there is no kink.
    jumps = [
        abs(up - 2 * middle + down) / h for (up, down), h in zip(sides, (step, step / 2, step / 4), strict=True)
    ]
    kink = jumps[2] > 0.5 * jumps[0] and jumps[2] > 1e-7 * max(abs(fine), 1e-9) + 100 * rounding
    return Estimate(fine, abs(fine - coarse) + 10 * rounding, kink)


def _blamed(along: Callable[[float, list[Part]], float], parts: list[Part], exact: list[float]) -> Iterator[str]:
    """The leaves whose own derivatives differ."""
    for part, ours in zip(parts, exact, strict=True):
        estimate = next(_estimates(lambda t, part=part: along(t, [part])), None)
        if estimate is not None and not abs(ours - estimate.value) <= 20 * estimate.error + TOLERANCE * abs(ours):
            direction = part.direction.flatten().tolist()
            shown = ", ".join(f"{d:.3g}" for d in direction[:6]) + (", ..." if len(direction) > 6 else "")
            yield f"{part.name}, along [{shown}]: {ours:.9g}, finite differences {estimate.value:.9g}"


class InexactError(AssertionError):
    """A derivative is wrong; for which leaves is found out when it is printed, since that takes long."""

    def __init__(self, wrong: dict[str, float], estimate: Estimate, blamed: Callable[[], Iterator[str]]):
        super().__init__(wrong, estimate)
        self.wrong, self.estimate, self.blamed = wrong, estimate, blamed

    def __str__(self) -> str:
        modes = ", ".join(f"{value:.9g} in {mode} mode" for mode, value in self.wrong.items())
        message = (
            f"the derivative of relevance is {modes}, and {self.estimate.value:.9g} by finite differences, "
            f"which are off by no more than {self.estimate.error:.1e}"
        )
        with torch.no_grad():
            lines = "\n".join(f"    {line}" for line in self.blamed())
        return f"{message}. It differs for\n\n{lines}" if lines else message
