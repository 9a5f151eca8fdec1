"""Every rule, from its equation, over a table of contributions: outputs by inputs.

A rule gets a layer and what came to its outputs, and answers with one `Sent` for each input, and with what it did not
send on, by cause. What is lost is the difference of what came and what was sent, one output at a time; the bias has
its share by its own formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.oracle.layers import Layer, jacobians

Lost = dict[str, float]


@dataclass
class Sent:
    """Relevance, or a multiplier `m` that stands for the relevance `x * m`."""

    value: Tensor
    is_relevance: bool

    def relevance(self, x: Tensor) -> Tensor:
        return self.value if self.is_relevance else self.value * finite(x)

    def multiplier(self, x: Tensor) -> tuple[Tensor, Lost]:
        """The multiplier; relevance of what is zero has none."""
        if not self.is_relevance:
            return self.value, {}
        m = [r / v if v != 0 else 0 * r for r, v in zip(self.value, x, strict=True)]
        lost = sum(float(r) for r, v in zip(self.value, x, strict=True) if v == 0)
        return torch.stack(m), {"conversion": lost}


Answer = tuple[list[Sent | None], Lost]
Rule = Callable[[Layer, Sent], Answer]


def finite(x: Tensor) -> Tensor:
    """A masked number, of minus infinity, carries nothing."""
    return torch.where(x.isinf(), torch.zeros_like(x), x)


def plus(*losses: Mapping[str, Any]) -> Lost:
    total: Lost = {}
    for lost in losses:
        for cause, amount in lost.items():
            total[cause] = total.get(cause, 0.0) + float(amount)
    return total


def times(factor: float, lost: Lost) -> Lost:
    return {cause: factor * amount for cause, amount in lost.items()}


# --------------------------------------------------------------------------------------------------------------
# Division


@dataclass(frozen=True)
class Stabilizer:
    """`z + sign(z) * epsilon`, and its variants."""

    epsilon: float = 1e-6
    clip: bool = False
    norm_scale: bool = False

    def __call__(self, z: Tensor, shape: torch.Size) -> Tensor:
        result = []
        grid = z.reshape(shape)
        for place, number in enumerate(z.tolist()):
            sign = -1.0 if number < 0 else 1.0
            epsilon = self.epsilon
            if self.norm_scale:
                sample = grid.reshape(shape[0], -1)[place // (z.numel() // shape[0])] if len(shape) > 1 else z
                epsilon = epsilon * (sum(v * v for v in sample.tolist()) / sample.numel()) ** 0.5
            result.append(sign * max(abs(number), epsilon) if self.clip else number + sign * epsilon)
        return torch.tensor(result, dtype=z.dtype)


def stabilized(given: float | Stabilizer) -> Stabilizer:
    return given if isinstance(given, Stabilizer) else Stabilizer(given)


def share_out(
    layer: Layer, relevance: Tensor, parts: Tensor, bias: Tensor, given: float | Stabilizer, cause: str = "bias"
) -> tuple[Tensor, Lost]:
    """Each output's relevance in proportion to its parts, one row of `parts` an output, and the bias beside them.

    Returns the quotients, and what is lost: to the bias its share; what is left where nothing contributes to the rule,
    elsewhere to the stabilizer.
    """
    z = parts.sum(1) + bias
    denominator = stabilized(given)(z, layer.output.shape)
    s = torch.stack([r / d if d != 0 else 0 * r for r, d in zip(relevance, denominator, strict=True)])
    to_bias = s * bias
    rest = relevance - s * parts.sum(1) - to_bias
    lost = {cause: to_bias.sum(), "rule": rest[z == 0].sum(), "stabilizer": rest[z != 0].sum()}
    return s, plus(lost)


# --------------------------------------------------------------------------------------------------------------
# Linear layers


def _matrix(layer: Layer) -> tuple[Tensor, Tensor]:
    (matrix,) = layer.jacobians
    return matrix, layer.constant


def _kept(bias: Tensor, zero_params: object) -> Tensor:
    return torch.zeros_like(bias) if zero_params and "bias" in zero_params else bias  # type: ignore[operator]


def Epsilon(epsilon: float | Stabilizer = 1e-6, zero_params: object = None) -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        relevance = came.relevance(layer.y)
        parts = torch.cat([j * x.flatten() for j, x in zip(layer.jacobians, layer.xs, strict=True)], 1)
        affine = layer.kind in ("dense", "convolution")
        bias = _kept(layer.constant, zero_params)
        s, lost = share_out(layer, relevance, parts, bias, epsilon, "bias" if affine else "constants")
        return [Sent(j.T @ s, False) for j in layer.jacobians], lost

    return rule


def Norm(stabilizer: float | Stabilizer = 1e-6) -> Rule:
    return Epsilon(stabilizer)


def _by_table(
    layer: Layer, relevance: Tensor, parts: Tensor, bias: Tensor, stabilizer: float | Stabilizer
) -> tuple[Sent, Lost]:
    """Relevance by a table of parts, one row an output."""
    s, lost = share_out(layer, relevance, parts, bias, stabilizer)
    return Sent((parts * s[:, None]).sum(0), True), lost


def _one_side(
    layer: Layer,
    relevance: Tensor,
    part: Callable[[Tensor], Tensor],
    stabilizer: float | Stabilizer,
    zero_params: object,
) -> tuple[Sent, Lost]:
    """Relevance by some part of the contributions and of the bias.

    Where the input is known to be non-negative, that is one matrix times the input, and the matrix gives a multiplier.
    """
    matrix, bias = _matrix(layer)
    s, lost = share_out(layer, relevance, part(matrix * layer.x), part(_kept(bias, zero_params)), stabilizer)
    if layer.nonnegative:
        return Sent(part(matrix).T @ s, False), lost
    return Sent((part(matrix * layer.x) * s[:, None]).sum(0), True), lost


def _positive(numbers: Tensor) -> Tensor:
    return numbers.clamp(min=0)


def _negative(numbers: Tensor) -> Tensor:
    return numbers.clamp(max=0)


def ZPlus(stabilizer: float | Stabilizer = 1e-6, zero_params: object = None) -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        sent, lost = _one_side(layer, came.relevance(layer.y), _positive, stabilizer, zero_params)
        return [sent], lost

    return rule


def AlphaBeta(
    alpha: float = 2.0, beta: float = 1.0, stabilizer: float | Stabilizer = 1e-6, zero_params: object = None
) -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        relevance = came.relevance(layer.y)
        up, lost_up = _one_side(layer, relevance, _positive, stabilizer, zero_params)
        down, lost_down = _one_side(layer, relevance, _negative, stabilizer, zero_params)
        lost = plus(times(alpha, lost_up), times(-beta, lost_down), {"rule": (1 - alpha + beta) * relevance.sum()})
        return [Sent(alpha * up.value - beta * down.value, up.is_relevance)], lost

    return rule


def Gamma(gamma: float = 0.25, stabilizer: float | Stabilizer = 1e-6, zero_params: object = None) -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        relevance, y = came.relevance(layer.y), layer.y
        zero = torch.zeros_like(relevance)
        above, lost_above = _one_side(
            layer, torch.where(y > 0, relevance, zero), lambda n: n + gamma * _positive(n), stabilizer, zero_params
        )
        below, lost_below = _one_side(
            layer, torch.where(y < 0, relevance, zero), lambda n: n + gamma * _negative(n), stabilizer, zero_params
        )
        lost = plus(lost_above, lost_below, {"rule": relevance[y == 0].sum()})
        return [Sent(above.value + below.value, above.is_relevance)], lost

    return rule


def ZBox(low: float, high: float, stabilizer: float | Stabilizer = 1e-6, zero_params: object = None) -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        matrix, bias = _matrix(layer)
        parts = matrix * layer.x - matrix.clamp(min=0) * low - matrix.clamp(max=0) * high
        sent, lost = _by_table(layer, came.relevance(layer.y), parts, torch.zeros_like(bias), stabilizer)
        return [sent], lost

    return rule


def WSquare(stabilizer: float | Stabilizer = 1e-6, zero_params: object = None) -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        matrix, bias = _matrix(layer)
        bias = _kept(bias, zero_params)
        sent, lost = _by_table(layer, came.relevance(layer.y), matrix * matrix, bias * bias, stabilizer)
        return [sent], lost

    return rule


def Flat(stabilizer: float | Stabilizer = 1e-6, zero_params: object = None) -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        matrix, bias = _matrix(layer)
        seen = (matrix != 0).to(matrix.dtype)
        sent, lost = _by_table(layer, came.relevance(layer.y), seen, torch.zeros_like(bias), stabilizer)
        return [sent], lost

    return rule


# --------------------------------------------------------------------------------------------------------------
# Any layer


def Gradient(of: str = "multiplier") -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        if of == "relevance":
            r = came.relevance(layer.y)
            sent = [j.T @ r for j in layer.jacobians]
            return [Sent(v, True) for v in sent], plus({"rule": r.sum() - sum(v.sum() for v in sent)})
        return linear(layer, came)

    return rule


def linear(layer: Layer, came: Sent) -> Answer:
    """The plain VJP of the multiplier."""
    m, lost = came.multiplier(layer.y)
    sent = [j.T @ m for j in layer.jacobians]
    kept = sum((v * finite(x.flatten())).sum() for v, x in zip(sent, layer.xs, strict=True))
    return [Sent(v, False) for v in sent], plus(lost, {_constants(layer): (m * finite(layer.y)).sum() - kept})


def _constants(layer: Layer) -> str:
    if layer.kind in ("dense", "convolution", "batch_norm"):
        return "bias"
    affine = ("select", "winner", "scale", "linear", "sum", "total", "average")
    return "constants" if layer.kind in affine else "nonlinearity"


def Stop() -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        return [None for _ in layer.inputs], plus({"rule": came.relevance(layer.y).sum()})

    return rule


def Uniform() -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        if layer.kind == "sum":
            r = came.relevance(layer.y) / len(layer.inputs)
            return [Sent((j != 0).to(r.dtype).T @ r, True) for j in layer.jacobians], {}
        m, lost = came.multiplier(layer.y)
        shares = _shares(layer)
        sent = [share * (j.T @ m) for share, j in zip(shares, layer.jacobians, strict=True)]
        kept = sum((v * finite(x.flatten())).sum() for v, x in zip(sent, layer.xs, strict=True))
        return [Sent(v, False) for v in sent], plus(lost, {"nonlinearity": (m * finite(layer.y)).sum() - kept})

    return rule


def _shares(layer: Layer) -> list[float]:
    if layer.kind == "attention":
        return [0.25, 0.25, 0.5]
    if layer.kind == "quotient":
        return [-0.5 if place == (1,) else 0.5 for place in layer.entries[-1].arguments]
    return [1 / layer.entries[-1].places if layer.kind == "product" else 1.0] * len(layer.inputs)


def SignalTakesAll() -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        m, lost = came.multiplier(layer.y)
        if layer.role == "recurrent" and not layer.signals:
            return [None], plus(lost, {"constants": (m * layer.y).sum()})
        place, matrix = _held(layer)
        sent = matrix.T @ m
        answer: list[Sent | None] = [None for _ in layer.inputs]
        answer[place] = Sent(sent, False)
        rest = (m * finite(layer.y)).sum() - (sent * finite(layer.xs[place].flatten())).sum()
        cause = "bias" if layer.kind in ("normalization", "batch_norm") else "constants"
        return answer, plus(lost, {cause: rest})

    return rule


def _held(layer: Layer) -> tuple[int, Tensor]:
    """The signal, and the matrix it is multiplied by where all else is held constant."""
    if layer.kind == "attention":
        q, k, v = layer.xs
        weights = attention_weights(layer, q, k)
        return 2, jacobians(lambda value: weights @ value, [v])[0]
    if layer.kind == "normalization" and layer.operation != "normalize":
        return 0, _centred_and_scaled(layer)
    (place,) = layer.signals
    return place, layer.jacobians[place]


def attention_weights(layer: Layer, q: Tensor, k: Tensor) -> Tensor:
    """The weights of fused attention, read off by giving it the unit vectors for values."""
    units = torch.eye(k.shape[-2], dtype=k.dtype).expand(*k.shape[:-1], k.shape[-2])
    return layer.entries[-1].function(q, k, units)  # type: ignore[misc]


def _centred_and_scaled(layer: Layer) -> Tensor:
    """A native norm with its standard deviations held: centred, divided, times the gain."""
    (x,) = layer.xs
    _, size, gain, _, epsilon = layer.entries[-1].given
    places = torch.arange(x.numel()).reshape(x.shape)
    if layer.operation == "layer_norm":
        groups, gain = places.reshape(-1, size[0]), gain.expand(x.shape)
    else:
        groups, gain = places.reshape(len(x) * size, -1), gain.reshape(-1, *[1] * (x.ndim - 2)).expand(x.shape)
    matrix, numbers = torch.zeros(x.numel(), x.numel(), dtype=x.dtype), x.flatten()
    for members in groups.tolist():
        values = numbers[members]
        mean = values.sum() / len(members)
        deviation = (((values - mean) ** 2).sum() / len(members) + epsilon) ** 0.5
        for i in members:
            for j in members:
                matrix[i, j] = ((1.0 if i == j else 0.0) - 1 / len(members)) / deviation
    return gain.flatten()[:, None] * matrix


# --------------------------------------------------------------------------------------------------------------
# Activations


def Pass() -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        if came.is_relevance:
            return [came], {}
        zero = layer.function(torch.zeros_like(layer.xs[0])).flatten()
        if layer.kind != "activation" or bool((zero != 0).any()):
            return [Sent(came.relevance(layer.y), True)], {}
        slopes = layer.jacobians[0].diagonal()
        ratio = [y / x if x != 0 else slope for y, x, slope in zip(layer.y, layer.x, slopes, strict=True)]
        return [Sent(came.value * torch.stack(ratio), False)], {}

    return rule


def _of_cotangent(change: Callable[[Layer, Tensor], Tensor]) -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        m, lost = came.multiplier(layer.y)
        sent = change(layer, m)
        return [Sent(sent, False)], plus(lost, {"rule": (layer.y * m).sum() - (layer.x * sent).sum()})

    return rule


def ReLUDeconvNet() -> Rule:
    return _of_cotangent(lambda layer, m: m.clamp(min=0))


def ReLUGuidedBackprop() -> Rule:
    return _of_cotangent(lambda layer, m: torch.where(m > 0, layer.jacobians[0].T @ m, torch.zeros_like(m)))


def ReLUBetaSmooth(beta_smooth: float = 10.0) -> Rule:
    return _of_cotangent(lambda layer, m: m / (1 + torch.exp(-beta_smooth * layer.x)))


# --------------------------------------------------------------------------------------------------------------
# Softmax


def TaylorSoftmax(bias: str = "absorb", stabilizer: float | Stabilizer = 1e-6) -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        m, lost = came.multiplier(layer.y)
        x, s = finite(layer.x), layer.y
        sent, rest = torch.zeros_like(x), 0.0
        for row in _rows(layer):
            xs, ss, ms = x[row], s[row], m[row]
            relevance = ss * ms
            mean = (ss * xs).sum()
            if bias == "omit":
                denominator = _stabilized_row(layer, stabilizer, row)
                v = torch.stack([a / d if d != 0 else 0 * a for a, d in zip(ms, denominator, strict=True)])
                sent[row] = xs * ss * (v - (ss * v).sum())
                continue
            sent[row] = xs * (relevance - ss * relevance.sum())
            if bias == "distribute":
                reached = ~layer.x[row].isinf()
                share = ((1 + mean - xs) * relevance).sum() / reached.sum()
                sent[row] += torch.where(reached, share, torch.zeros_like(xs))
        rest = (s * m).sum() - sent.sum()
        if bias == "distribute":
            return [Sent(sent, True)], lost
        if bias == "omit":
            return [_as_multiplier(layer, sent, m, stabilizer)], plus(lost, {"stabilizer": rest})
        return [Sent(layer.jacobians[0].T @ m, False)], plus(lost, {"nonlinearity": rest})

    return rule


def _as_multiplier(layer: Layer, sent: Tensor, m: Tensor, stabilizer: float | Stabilizer) -> Sent:
    result, s = torch.zeros_like(m), layer.y
    for row in _rows(layer):
        denominator = _stabilized_row(layer, stabilizer, row)
        v = torch.stack([a / d if d != 0 else 0 * a for a, d in zip(m[row], denominator, strict=True)])
        result[row] = s[row] * (v - (s[row] * v).sum())
    return Sent(result, False)


def _stabilized_row(layer: Layer, stabilizer: float | Stabilizer, row: list[int]) -> Tensor:
    centred = torch.zeros_like(layer.y)
    x = finite(layer.x)
    for members in _rows(layer):
        centred[members] = x[members] - (layer.y[members] * x[members]).sum()
    return stabilized(stabilizer)(centred, layer.output.shape)[row]


def _rows(layer: Layer) -> list[list[int]]:
    """The elements that sum to one together."""
    axis = layer.entries[-1].given[1]
    places = torch.arange(layer.output.numel()).reshape(layer.output.shape)
    return places.movedim(axis, -1).reshape(-1, layer.output.shape[axis]).tolist()


# --------------------------------------------------------------------------------------------------------------
# What only moves or scales


def moved(layer: Layer, came: Sent) -> Answer:
    """Where each number came from; what is written in place of others is lost."""
    (entry,) = layer.entries
    assert entry.moved is not None
    answers = []
    sources = entry.moved.flatten().tolist()
    known = set()
    for ids in layer.inputs:
        places = {i: place for place, i in enumerate(ids.flatten().tolist())}
        known |= set(places)
        value = torch.zeros(ids.numel(), dtype=came.value.dtype)
        for source, amount in zip(sources, came.value, strict=True):
            if source in places and source:
                value[places[source]] += amount
        answers.append(Sent(value, came.is_relevance))
    r = came.relevance(layer.y)
    lost = sum(float(amount) for source, amount in zip(sources, r, strict=True) if not source)
    return answers, {"constants": lost}


def scaled(layer: Layer, came: Sent) -> Answer:
    (matrix,) = layer.jacobians
    if not came.is_relevance:
        return [Sent(matrix.T @ came.value, False)], {}
    reached = (matrix != 0).to(matrix.dtype)
    return [Sent(reached.T @ came.value, True)], {"constants": float(came.value[matrix.sum(1) == 0].sum())}


def won(layer: Layer, came: Sent) -> Answer:
    return [Sent(j.T @ came.value, came.is_relevance) for j in layer.jacobians], {}


# --------------------------------------------------------------------------------------------------------------
# Combinations


def combination(terms: list[tuple[float, Rule]]) -> Rule:
    def rule(layer: Layer, came: Sent) -> Answer:
        share = 1 - sum(weight for weight, _ in terms)
        lost = plus({"rule": share * came.relevance(layer.y).sum()})
        totals: list[Sent | None] = [None for _ in layer.inputs]
        for weight, part in terms:
            answer, lost_here = part(layer, came)
            lost = plus(lost, times(weight, lost_here))
            for place, (sent, x) in enumerate(zip(answer, layer.xs, strict=True)):
                if sent is not None:
                    totals[place] = added(totals[place], Sent(weight * sent.value, sent.is_relevance), x.flatten())
        return totals, lost

    return rule


def added(one: Sent | None, other: Sent, x: Tensor) -> Sent:
    if one is None:
        return other
    if not one.is_relevance and not other.is_relevance:
        return Sent(one.value + other.value, False)
    return Sent(one.relevance(x) + other.relevance(x), True)
