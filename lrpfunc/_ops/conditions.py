"""Claims about operators that depend on more than what is known of their operands."""

from __future__ import annotations

import math
from typing import Any

from lrpfunc._ops.operator import Arguments, Holds


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


# --------------------------------------------------------------------------------------------------------------
# Sums and averages


def keeps_sign_if_scaled_so(given: Arguments, known: Holds) -> bool:
    """Of `a + alpha * b`."""
    alpha = given.named("alpha")
    return all(map(known, given.operands)) and (alpha is None or known(alpha))


def keeps_sign_unless_divided(given: Arguments, known: Holds) -> bool:
    """Of an average pooling, which may have a divisor of the user's own."""
    divisor = given.named("divisor_override")
    return all(map(known, given.operands)) and (divisor is None or divisor > 0)


# --------------------------------------------------------------------------------------------------------------
# Clamps


def _bounds(given: Arguments) -> tuple[Any, Any]:
    low, high = given.named("min"), given.named("max")
    return (
        given.named("min_val") if low is None else low,
        given.named("max_val") if high is None else high,
    )


def bounded_below_by_zero(given: Arguments, known: Holds) -> bool:
    """Whatever is clamped."""
    low, high = _bounds(given)
    return low is not None and known(low) and (high is None or known(high))


def bounds_hold_zero(given: Arguments, known: Holds) -> bool:
    """Whether a clamp leaves 0 as it is. At a bound of 0 it is a ReLU, whose slope there torch chooses."""
    low, high = (0 if bound is None else bound for bound in _bounds(given))
    return known(given.operands[0]) and _is_number(low) and _is_number(high) and low <= 0 <= high


def beta_is_positive(given: Arguments, known: Holds) -> bool:
    """Of a softplus, which is the identity above its threshold."""
    beta = given.named("beta")
    return (beta is None or beta > 0) and given.named("threshold") is None


def flat_around_zero(given: Arguments, known: Holds) -> bool:
    """Of a shrinkage, which is the identity if it shrinks by nothing."""
    by = given.named("lambd")
    return known(given.operands[0]) and (by is None or by > 0)


# --------------------------------------------------------------------------------------------------------------
# Powers and quotients


def exponent(given: Arguments) -> float | None:
    value = given.named("exponent")
    return float(value) if _is_number(value) else None


def exponent_is_even(given: Arguments, known: Holds) -> bool:
    value = given.named("exponent")
    return isinstance(value, int) and value % 2 == 0


def flat_at_zero(given: Arguments, known: Holds) -> bool:
    """A power with `f(0) = 0` and a derivative there."""
    value = exponent(given)
    return known(given.operands[0]) and value is not None and value >= 1


def steep_at_zero(given: Arguments, known: Holds) -> bool:
    """Any other power, but `x ** 0`."""
    return known(given.operands[0]) and exponent(given) != 0 and not flat_at_zero(given, known)


def only_numerator(given: Arguments, known: Holds) -> bool:
    """Of a quotient."""
    numerator, divisor = given.operands
    return known(numerator) and not known(divisor)


def divisor(given: Arguments, known: Holds) -> bool:
    """Of a quotient."""
    return known(given.operands[1])


def factors(given: Arguments) -> float:
    """How many elements of its operand each element of a product is of."""
    shape, dim = given.operands[0].meta["val"].shape, given.named("dim")
    return float(math.prod(shape) if dim is None else shape[dim] if shape else 1)


def matrix_order(given: Arguments) -> float:
    """How many factors each term of a determinant has."""
    return float(given.operands[0].meta["val"].shape[-1])


def matrix_power(given: Arguments) -> float | None:
    return float(given.named("n")) or None


def order(given: Arguments) -> float:
    """The degree of a norm: that of order 0 counts."""
    orders = (given.named("ord"), given.named("p"))
    return 0.0 if 0 in [value for value in orders if _is_number(value)] else 1.0


# --------------------------------------------------------------------------------------------------------------
# Random numbers


def drops(given: Arguments) -> bool:
    """Of dropout, and of attention that has one."""
    train = given.named("train")
    probability = given.named("dropout_p") if train is None else given.named("p")
    return bool(probability) and train is not False


def drops_between_layers(given: Arguments) -> bool:
    """Of recurrent networks."""
    return bool(given.named("dropout")) and bool(given.named("train"))


def trains(given: Arguments) -> bool:
    return given.named("training") is True
