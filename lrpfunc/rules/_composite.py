"""Which rule serves which layer: an ordered collection of selectors and rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, final

from lrpfunc import _tree as tree
from lrpfunc._errors import RuleError
from lrpfunc._layers.layer import Kind, Layer
from lrpfunc._layers.select import Selects, selector_of
from lrpfunc.rules._equality import Description
from lrpfunc.rules._rule import Rule
from lrpfunc.rules.generic import Gradient
from lrpfunc.rules.softmax import TaylorSoftmax

Entry = tuple[Selects, Rule]


class _General(tuple[Any, ...]):
    """An entry of a recipe, which is for any net: it may well serve no layer of this one."""


@final
@dataclass(frozen=True, eq=False)
class Composite(Description):
    """An ordered collection of `(selector, rule)`; the first selector that matches a layer decides.

    `mine + composite` puts mine first; a list of pairs may stand on either side. `rules[0]` is the rule of the first
    entry, and iterating gives the pairs.

    A composite is a pytree, for torch and for optree in any namespace: the tensors inside its rules are the leaves, and
    all else, selectors and plain numbers too, is structure. So transforms take it as an argument, an optimizer learns
    it, and a composite of stacked tensors is a sweep. Errors and `explain` call a leaf what it is in code, such as
    `rules[0].gamma`.

    Args:
        entries: The pairs. A selector is any `Layer -> bool`; a class of modules and a glob on their paths stand for
            the layers in such modules.
        cotangent: Whether what travels is a cotangent, as in guided backprop: layers without an entry take their
            plain VJP, and the answer is the cotangent at the input, not multiplied by it.

    Example:
        >>> import lrpfunc as lrp
        >>> rules = lrp.Composite([(lrp.Dense, lrp.Epsilon(0.1))]) + lrp.epsilon_plus()
        >>> rules.entries[0]
        (Dense, Epsilon(epsilon=0.1, zero_params=None))

        >>> import torch
        >>> lrp.Composite([("head*", lrp.Epsilon(0.1)), (torch.nn.Conv2d, lrp.ZPlus())]).entries[0]
        (name('head*'), Epsilon(epsilon=0.1, zero_params=None))
        >>> def total(rules):
        ...     return lrp.attribute(lambda w, x: x @ w, rules)(torch.eye(2), torch.ones(1, 2)).sum()
        >>> torch.func.grad(total)(lrp.Composite([(lrp.Dense, lrp.Epsilon(torch.tensor(1.0)))]))[0].epsilon
        tensor(-0.5000)
        >>> torch.vmap(total)(lrp.Composite([(lrp.Dense, lrp.Epsilon(torch.tensor([0.0, 1.0, 3.0])))]))
        tensor([2.0000, 1.0000, 0.5000])
    """

    entries: Sequence[Entry]
    cotangent: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(map(_checked, self.entries)))

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __getitem__(self, place: int) -> Any:
        """The rule of the entry at that place."""
        return self.entries[place][1]

    def __add__(self, other: Composite | Iterable[Entry]) -> Composite:
        if other is None:
            return NotImplemented
        other = composite_of(other)
        return Composite((*self.entries, *other.entries), self.cotangent or other.cotangent)

    def __radd__(self, other: Iterable[Entry]) -> Composite:
        return composite_of(other) + self

    def rule_for(self, layer: Layer) -> Rule | None:
        """The rule of the first entry that matches."""
        place = self.place_for(layer)
        rule = None if place is None else self.entries[place][1]
        if layer.kind is Kind.ATTENTION and (rule or self.cotangent):
            self._check_softmax_inside(layer, rule or Gradient())
        return rule

    def place_for(self, layer: Layer) -> int | None:
        """The place of the first entry that matches."""
        return next((place for place, selector in enumerate(self.selectors) if selector(layer)), None)

    @property
    def selectors(self) -> Sequence[Callable[[Layer], bool]]:
        """Those of the entries, in order."""
        return [cast(Callable[[Layer], bool], selector) for selector, _ in self.entries]

    def is_general(self, place: int) -> bool:
        """Whether the entry at that place is for any net, as those of recipes are."""
        return isinstance(self.entries[place], _General)

    def _check_softmax_inside(self, attention: Layer, rule: Rule) -> None:
        """Refuses an entry for softmax that decides where attention is written out, and not where it is fused."""
        softmax = replace(attention, kind=Kind.SOFTMAX, operation="softmax")
        places = (i for i, selector in enumerate(self.selectors) if selector(attention) or selector(softmax))
        place = next(places, None)
        decides = rule if place is None else self[place]
        absorbs = decides == Gradient() or (isinstance(decides, TaylorSoftmax) and decides.bias == "absorb")
        if decides is rule or absorbs or set(rule.receivers(attention)) <= set(attention.signals):
            return
        shown = decides if place is None else tree.named(self, "rules")[place]
        raise RuleError(
            f"fused attention has a softmax inside, which the composite gives {shown!r}. There it does not reach:\n\n"
            f"    {attention}\n        {rule!r}\n\n"
            'Write the attention out (attn_implementation="eager" in transformers, need_weights=True in a '
            "torch.nn.MultiheadAttention), or say in front what serves it whole, for example\n\n"
            "    rules = [(lrp.Attention, lrp.Uniform())] + rules"
        )


def _flatten(rules: Composite) -> tuple[list[tuple[tree.Key, Rule]], tuple[Any, ...]]:
    selectors = tuple((entry[0], type(entry)) for entry in rules)
    return [(tree.IndexKey(place), rule) for place, (_, rule) in enumerate(rules)], (selectors, rules.cotangent)


def _unflatten(rules: Iterable[Rule], structure: tuple[Any, ...]) -> Composite:
    selectors, cotangent = structure
    composite = object.__new__(Composite)  # without its checks: anything may stand in the place of a rule
    entries = tuple(cls((selector, rule)) for (selector, cls), rule in zip(selectors, rules, strict=True))
    object.__setattr__(composite, "entries", entries)
    object.__setattr__(composite, "cotangent", cotangent)
    return composite


tree.register(Composite, _flatten, _unflatten)


def _checked(entry: Any) -> Entry:
    is_pair = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Rule)
    if not (is_pair and (callable(entry[0]) or isinstance(entry[0], str))):
        raise TypeError(
            f"a composite is made of pairs (selector, rule), not of {entry!r}; for example\n\n"
            "    lrpfunc.Composite([(lrpfunc.Dense, lrpfunc.Epsilon())])"
        )
    return entry if isinstance(entry, _General) else (selector_of(entry[0]), entry[1])


def general(entries: Iterable[Entry], cotangent: bool = False) -> Composite:
    """A composite for any net, whose entries may serve no layer of this one."""
    return Composite(tuple(map(_General, entries)), cotangent)  # pyright: ignore[reportArgumentType]


def composite_of(rules: Composite | Iterable[Entry]) -> Composite:
    """What users may give for `rules`, as a composite."""
    if not isinstance(rules, Iterable) and not isinstance(rules, Rule):
        call = f"; write {rules.__name__}(...)" if callable(rules) and hasattr(rules, "__name__") else ""
        raise TypeError(f"rules must be a composite or a list of pairs (selector, rule), not {rules!r}{call}")
    if isinstance(rules, Rule):
        raise TypeError(
            f"rules must say which layers {rules!r} is for; write, for example\n\n"
            f"    lrpfunc.attribute(model_fn, [(lrpfunc.Dense | lrpfunc.Convolution, {rules!r})] + lrpfunc.epsilon())"
        )
    return rules if isinstance(rules, Composite) else Composite(tuple(rules))
