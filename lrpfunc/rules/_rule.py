"""What a rule is, and the algebra of rules."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from lrpfunc._errors import RuleError
from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import Layer
from lrpfunc.rules._message import (
    Form,
    Message,
    Stabilizer,
    add,
    as_stabilizer,
    carried,
    divide,
    in_form,
    is_message,
    scale,
)
from lrpfunc.rules._pytree import Parametric

ZeroParams = str | Iterable[str] | None


class Rule(Parametric, abc.ABC):
    r"""How relevance at a layer's output is attributed to its inputs.

    A rule is a frozen dataclass with one method that must be written, `propagate`. Rules form a vector space:
    `2 * p - q` is the rule whose relevance is twice that of `p` less that of `q`.

    Write `propagate(layer, message)` in ordinary torch operations on `layer.input`, `layer.output`,
    `layer.parameters`, `layer.affine`, `layer.transpose` and `layer.vjp`; every derivative is then exact. It returns
    one message for each of `layer.inputs`.

    A rule is a pytree: the tensors inside are its leaves, and all else, plain numbers too, is its structure. So
    `torch.func.grad`, `vmap` and `jacrev` take it as an argument, by itself or inside a composite. A rule of your own
    is one when its class is made; its `__post_init__` does not run when a transform puts other leaves into it.

    A rule for operations of several outputs, such as `torch.linalg.eigh`, says so with `several_outputs = True` and
    takes `propagate(layer, *messages)` and `absorbed(layer, *messages)`: one message for each of `layer.outputs`, as
    the pullback of `torch.func.vjp` takes cotangents, all in one form, and zeros where no relevance came.

    Attributes:
        form: The form the message arrives in: `"relevance"`, `"multiplier"`, or `"either"`.
        several_outputs: Whether the rule serves operations of several outputs.

    Example:
        A rule that gives every input the same share:

        >>> import dataclasses, torch, lrpfunc as lrp
        >>> @dataclasses.dataclass(frozen=True, eq=False)
        ... class Even(lrp.Rule):
        ...     def propagate(self, layer, message):
        ...         share = message.value.sum(-1, keepdim=True) / layer.input.shape[-1]
        ...         return (lrp.Relevance(share.expand(layer.input.shape)),)
        >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, Even())])
        >>> relevance_fn(torch.eye(2), torch.tensor([[1.0, 3.0]]), target=1)
        tensor([[1.5000, 1.5000]])

        The derivative with respect to a rule is a rule:

        >>> def total(rule):
        ...     return lrp.attribute(lambda w, x: x @ w, [(lrp.Dense, rule)])(torch.eye(2), torch.ones(1, 2)).sum()
        >>> torch.func.grad(total)(lrp.Epsilon(torch.tensor(1.0)))
        Epsilon(epsilon=tensor(-0.5000), zero_params=None)
    """

    form: ClassVar[Form] = "relevance"
    several_outputs: ClassVar[bool] = False

    @abc.abstractmethod
    def propagate(self, layer: BoundLayer, message: Message, /) -> tuple[Message | None, ...]:
        """The messages at the layer's inputs, one each; `None` for an input that gets nothing."""

    def absorbed(self, layer: BoundLayer, message: Message, /) -> dict[str, Tensor]:
        """The relevance that does not reach the inputs, by cause, each from its own formula."""
        return {}

    def takes(self, layer: Layer) -> Form:
        """The form in which messages at the outputs of a layer arrive."""
        return self.form

    def receivers(self, layer: Layer) -> tuple[fx.Node, ...]:
        """The inputs that may get relevance; what is behind the others needs no rule."""
        return layer.inputs

    def objection(self, layer: Layer) -> str | None:
        """Why the rule cannot serve a layer, or `None` if it can."""
        return None

    # -- what the walk calls

    def apply(self, layer: BoundLayer, messages: Sequence[Message | None]) -> tuple[Message | None, ...]:
        """`propagate`, in the form the rule takes; `messages` has `None` for an output that no relevance came to."""
        results = self.propagate(layer, *in_form(messages, layer.outputs, self.takes(layer.layer)))
        if not _answers(results, layer.inputs):
            raise _misshapen(self, layer, results)
        return results

    def account(self, layer: BoundLayer, messages: Sequence[Message | None]) -> dict[str, Tensor]:
        """`absorbed`, together with what the conversion to the rule's form loses."""
        form = self.takes(layer.layer)
        booked = dict(self.absorbed(layer, *in_form(messages, layer.outputs, form)))
        if form == "multiplier":
            came = [(m, y) for m, y in zip(messages, layer.outputs, strict=True) if m is not None]
            booked["conversion"] = added(message.unconvertible(y) for message, y in came)
        return booked

    # -- algebra

    def __mul__(self, factor: float | Tensor) -> Rule:
        return Combination(((factor, self),)) if _is_factor(factor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Rule:
        return self * (1 / divisor)

    def __neg__(self) -> Rule:
        return self * -1

    def __add__(self, other: Rule) -> Rule:
        return Combination((*_terms(self), *_terms(other))) if isinstance(other, Rule) else NotImplemented

    def __radd__(self, other: object) -> Rule:
        return self if other == 0 else NotImplemented  # so that `sum` adds rules up

    def __sub__(self, other: Rule) -> Rule:
        return self + (-other) if isinstance(other, Rule) else NotImplemented


def _answers(results: object, inputs: Sequence[Tensor]) -> bool:
    """Whether the results are one message for each input, of its shape."""
    if not isinstance(results, (tuple, list)) or len(results) != len(inputs):
        return False
    return all(m is None or (is_message(m) and m.value.shape == x.shape) for m, x in zip(results, inputs, strict=True))


def _misshapen(rule: Rule, layer: BoundLayer, results: object) -> RuleError:
    came = ", ".join(map(_described, results)) if isinstance(results, (tuple, list)) else _described(results)
    wanted = [f"a message of shape {tuple(x.shape)}" for x in layer.inputs]
    example = ", ".join(f"lrp.Relevance(r{i})" for i in range(len(wanted))) if len(wanted) > 1 else "lrp.Relevance(r),"
    return RuleError(
        f"propagate of {rule!r} must return a tuple of one message, or None, for each input of the layer\n\n"
        f"    {layer.layer}\n\n"
        f"that is ({', '.join(wanted)}), and returned {f'({came})' if isinstance(results, (tuple, list)) else came}. "
        "A message is relevance, or a multiplier of the input, and has the input's shape; end with\n\n"
        f"    return ({example})"
    )


def _described(result: object) -> str:
    if is_message(result):
        return f"{type(result).__name__} of shape {tuple(result.value.shape)}"
    if isinstance(result, Tensor):
        return f"a tensor of shape {tuple(result.shape)}, which does not say what it holds"
    return "None" if result is None else f"a {type(result).__name__}"


def _is_factor(value: object) -> bool:
    return isinstance(value, (int, float, Tensor)) or hasattr(value, "__float__")


def _terms(rule: Rule) -> tuple[tuple[float | Tensor, Rule], ...]:
    return rule.terms if isinstance(rule, Combination) else ((1, rule),)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Combination(Rule):
    """A linear combination of rules, as the algebra of rules makes it."""

    terms: tuple[tuple[float | Tensor, Rule], ...]
    form: ClassVar[Form] = "either"

    def __repr__(self) -> str:
        return f"({' + '.join(f'{weight} * {rule}' for weight, rule in self.terms)})"

    def __mul__(self, factor: float | Tensor) -> Rule:
        if not _is_factor(factor):
            return NotImplemented
        return Combination(tuple((factor * weight, rule) for weight, rule in self.terms))

    __rmul__ = __mul__

    @property
    def several_outputs(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(rule.several_outputs for _, rule in self.terms)

    def propagate(self, layer: BoundLayer, *messages: Message) -> tuple[Message | None, ...]:
        parts = [[m and scale(weight, m) for m in rule.apply(layer, messages)] for weight, rule in self.terms]
        totals: list[Message | None] = []
        for shares, x in zip(zip(*parts, strict=True), layer.inputs, strict=True):
            some = [message for message in shares if message is not None]
            totals.append(add(some, x) if some else None)
        return tuple(totals)

    def absorbed(self, layer: BoundLayer, *messages: Message) -> dict[str, Tensor]:
        share = 1 - sum(weight for weight, _ in self.terms)
        booked = {"rule": share * added(m.relevance(y) for m, y in zip(messages, layer.outputs, strict=True))}
        for weight, rule in self.terms:
            for cause, amount in rule.account(layer, messages).items():
                booked[cause] = booked.get(cause, 0) + weight * amount
        return booked

    def objection(self, layer: Layer) -> str | None:
        return next((reason for _, rule in self.terms if (reason := rule.objection(layer))), None)


# --------------------------------------------------------------------------------------------------------------
# What several rules need


def needs_parameters(rule: Rule, layer: Layer) -> str | None:
    """The objection of a rule that modifies weights."""
    if layer.affine is not None:
        return None
    return f"{type(rule).__name__} modifies weights, which only dense layers and convolutions have"


def needs_linear(rule: Rule, layer: Layer) -> str | None:
    """The objection of a rule that distributes a linear layer's output."""
    return None if layer.linear else f"{type(rule).__name__} serves linear layers; this one is not linear in its input"


def named(zero_params: ZeroParams) -> tuple[str, ...] | None:
    """`zero_params` as a sorted tuple of names, so that rules compare and hash; `None` for none."""
    if zero_params is None:
        return None
    names = (zero_params,) if isinstance(zero_params, str) else tuple(sorted(zero_params))
    if unknown := [name for name in names if name not in ("weight", "bias")]:
        raise ValueError(f"zero_params names 'weight' or 'bias', not {unknown[0]!r}: write zero_params='bias'")
    return names or None


def kept(layer: BoundLayer, zero_params: ZeroParams) -> tuple[Tensor, Tensor | None]:
    """The layer's weight and bias, with those that `zero_params` names set to zero."""
    weight, bias = layer.parameters
    names = zero_params or ()
    return torch.zeros_like(weight) if "weight" in names else weight, None if "bias" in names else bias


# NOTE: [not torch.where] which on a CPU takes ten times as long as any of these where signs are mixed.


# At 0 the derivative of the one is 1 and that of the other 0: those of their sum, the tensor itself, must add up to 1.
def positive(tensor: Tensor) -> Tensor:
    return where_positive(tensor.detach().sign() + 0.5, tensor)


def negative(tensor: Tensor) -> Tensor:
    return -torch.relu(-tensor)


def where_positive(decides: Tensor, value: Tensor) -> Tensor:
    """`value` where `decides` is positive, and 0 elsewhere."""
    return torch.ops.aten.threshold_backward(value, decides, 0)


def of_bias(part: Callable[[Tensor], Tensor], bias: Tensor | None) -> Tensor | None:
    """`part` of a bias that may be missing."""
    return None if bias is None else part(bias)


@dataclass(frozen=True)
class Quotient:
    r""":math:`s = R / \operatorname{stab}(z)`, and what becomes of the relevance `R` it divides."""

    relevance: Tensor
    z: Tensor
    denominator: Tensor
    s: Tensor

    @classmethod
    def of(cls, relevance: Tensor, z: Tensor, stabilizer: float | Tensor | Stabilizer, *, sign: int = 0) -> Quotient:
        """The quotient; `sign=1` says that no `z` is negative."""
        stabilizer = as_stabilizer(stabilizer)
        denominator = stabilizer(z, sign=sign)
        s = divide(relevance, denominator, nonzero=stabilizer.is_positive(z.dtype))
        return cls(relevance, z, denominator, s)

    def absorbed(self, layer: BoundLayer, bias: Tensor | None) -> dict[str, Tensor]:
        """What the bias and the stabilizer take, and what is lost because nothing contributes.

        To `z = 0` nothing does, and to an infinite one, of a mask, nothing finite.
        """
        by_bias = self.s.new_zeros(()) if bias is None else (self.s * carried(layer.shift(bias))).sum()
        infinite = self.z.isinf()
        all_lost = (self.denominator == 0) | infinite
        rest = torch.where(all_lost, self.relevance, self.s * (self.denominator - self.z))
        empty = (self.z == 0) | infinite
        return {
            "bias": by_bias,
            "stabilizer": torch.where(empty, 0, rest).sum(),
            "rule": torch.where(empty, rest, 0).sum(),
        }


def added(parts: Iterable[Tensor]) -> Tensor:
    """All numbers of the tensors, one for each output of a layer, added up."""
    return reduce(torch.add, (part.sum() for part in parts))


def batched_sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """`tensor` summed over the dimensions that broadcasting added to `shape`."""
    return tensor if tensor.shape == shape else tensor.sum_to_size(shape)
