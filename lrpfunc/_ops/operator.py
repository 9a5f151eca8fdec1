"""What can be said of an operator of torch: one record each."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call as they stand there: nodes, numbers and lists of both.

    Attributes:
        operands: Those at the places that `Operator.operands` names, without those that were left out.
        named: Any of them, by its name in torch's schema; `None` if it was left to its default.
    """

    operands: tuple[Any, ...]
    named: Callable[[str], Any]


Holds = Callable[[Any], bool]
"""Whether a property, such as not to be negative, is known of an argument."""


class Claim(enum.Enum):
    """When a property holds of an operator's result."""

    ALWAYS = "whatever the operands"
    ALL = "where it holds of every operand"
    ANY = "where it holds of one operand"


Condition = Claim | Callable[[Arguments, Holds], bool] | None
"""A claim; a function where it depends on more than the operands; or `None` where nothing is claimed."""


@dataclass(frozen=True)
class Operator:
    """What is known of one operator, whichever its arguments.

    Nothing is claimed but what is said here: what is left out may or may not be so. `tests/test_table.py` draws random
    inputs for every record, and finds each claim true of them.

    Attributes:
        kind: What a layer of it is if all its operands depend on the explained input. If some do not, a product becomes
            a scaling or a dense layer, and a sum a linear layer: `nature_of` has these cases.
        operands: The places of the tensors that the kind speaks of. A sum and the like is linear in all of them
            together, a product in each of them, and a selection takes its elements from them. If any other argument
            depends on the explained input, such as the grid of `grid_sampler`, the layer is only non-linear.
        addend: The place of a tensor that is added to a product, such as a bias.

        name: What an operator with several names is called here: `"div"` for `true_divide`, too.
        pointwise: Whether each element of the result depends on the same element of every operand alone.
        differentiable: Whether relevance can pass at all. The derivative of what cannot is zero everywhere.
        underived: Whether torch knows no derivative, and takes the result for a constant without a word.
        reduces: Whether each element of the result stands for many: those along the axes `dim`, or of a window.
        reshapes: Whether the result has the same elements in the same order, in another shape.
        chooses: Whether integers, which may come from a `topk`, say which elements are taken.
        epsilon: Whether models use it to keep a number away from zero, as in `x + 1e-6` and `x.clamp(min=1e-6)`.
        gate: How much a factor that it computes looks like a gate: 2 for a fraction, 1 for a bounded number.
        features: The axis of the second factor along which the features of the output lie.

        nonnegative: When the result is never negative.
        zero: When the result of what is pointwise is 0, as a function of the operands that are 0, with a derivative
            there. Torch chooses the slope at a kink, such as that of a ReLU.
        singular: When it has no derivative where operands are 0, or no value.
        finite: When the result is never infinite, short of overflow.
        degree: The `k` for which :math:`f(c x) = c^k f(x)`, with all operands scaled by the same :math:`c > 0`.

        random: Whether another call gives another result. Left to torch's tag where it is `None`.
        held: The operator as an affine function of its first operand, whose statistics are those of the values that
            come second; then the operator's own arguments.
        in_walk: What the walk backwards evaluates in its place.
        of_open_sizes: What it evaluates where sizes are open, of which torch's own would ask for numbers.
        exact: What it evaluates if the VJP will be differentiated with respect to its cotangent, or vmapped over it.
    """

    kind: Kind = Kind.NON_LINEAR
    operands: tuple[int, ...] = (0,)
    addend: int | None = None

    name: str = ""
    pointwise: bool = False
    differentiable: bool = True
    underived: bool = False
    reduces: bool = False
    reshapes: bool = False
    chooses: bool = False
    epsilon: bool = False
    gate: int = 0
    features: int | None = None

    nonnegative: Condition = None
    zero: Condition = None
    singular: Condition = None
    finite: Condition = None
    degree: float | Callable[[Arguments], float | None] | None = None

    random: bool | Callable[[Arguments], bool] | None = None
    held: Callable[..., Any] | None = None
    in_walk: Callable[..., Any] | None = None
    of_open_sizes: Callable[..., Any] | None = None
    exact: Callable[..., Any] | None = None

    @property
    def homogeneous(self) -> bool:
        """Whether it is an activation with `f(x) = f'(x) x`: to pass relevance on is the VJP of the multiplier."""
        return self.kind is Kind.ACTIVATION and self.operands == (0,) and self.degree == 1


def holds(condition: Condition, arguments: Arguments, known: Holds) -> bool:
    """Whether a property holds of a result, from what is known of the arguments."""
    match condition:
        case None:
            return False
        case Claim.ALWAYS:
            return True
        case Claim.ALL:
            return all(map(known, arguments.operands))
        case Claim.ANY:
            return any(map(known, arguments.operands))
    return condition(arguments, known)
