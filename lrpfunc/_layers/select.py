"""Selectors: which layers a rule is for."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

from torch import nn

from lrpfunc._layers.layer import Kind, Layer, Role


class Selector(abc.ABC):
    """A predicate on layers; selectors combine with `&`, `|` and `~`, with any other `Layer -> bool` too.

    A class of modules selects the layers in modules of that class, and a glob those in modules with such a path, as
    `name` does: they may stand wherever a selector may.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> (lrp.Dense | lrp.Convolution) & ~lrp.name("head*")
        ((Dense | Convolution) & ~name('head*'))
        >>> lrp.Dense & "head*" | torch.nn.Bilinear
        ((Dense & name('head*')) | Bilinear)
    """

    @abc.abstractmethod
    def __call__(self, layer: Layer) -> bool: ...

    def __and__(self, other: Selects) -> Selector:
        return _And(self, selector_of(other))

    def __rand__(self, other: Selects) -> Selector:
        return _And(selector_of(other), self)

    def __or__(self, other: Selects) -> Selector:
        return _Or(self, selector_of(other))

    def __ror__(self, other: Selects) -> Selector:
        return _Or(selector_of(other), self)

    def __invert__(self) -> Selector:
        return _Not(self)


Selects = Callable[[Layer], bool] | type[nn.Module] | str
"""What may stand for a selector."""


def selector_of(selects: Selects) -> Callable[[Layer], bool]:
    """A class of modules and a glob as the selectors that they stand for; any other is one."""
    if isinstance(selects, str):
        return name(selects)
    return _OfModule(selects) if isinstance(selects, type) and issubclass(selects, nn.Module) else selects


def names_something(selector: Callable[[Layer], bool]) -> bool:
    """Whether it names a module, a class or an operation, which a net then ought to have."""
    if isinstance(selector, (_And, _Or)):
        return names_something(selector.left) or names_something(selector.right)
    if isinstance(selector, _End):
        return names_something(selector.selector)
    return isinstance(selector, (_Name, _OfModule, _Operation)) and selector != ReLU


@final
@dataclass(frozen=True, repr=False)
class _OfKind(Selector):
    kind: Kind

    def __call__(self, layer: Layer) -> bool:
        return layer.kind is self.kind

    def __repr__(self) -> str:
        return self.kind.value


@final
@dataclass(frozen=True, repr=False)
class _OfRole(Selector):
    role: Role

    def __call__(self, layer: Layer) -> bool:
        return layer.role is self.role

    def __repr__(self) -> str:
        return self.role.value


@final
@dataclass(frozen=True, repr=False)
class _OfModule(Selector):
    cls: type[nn.Module]

    def __call__(self, layer: Layer) -> bool:
        return any(issubclass(cls, self.cls) for cls in layer.module_types)

    def __repr__(self) -> str:
        return self.cls.__qualname__


@final
@dataclass(frozen=True, repr=False)
class _And(Selector):
    left: Callable[[Layer], bool]
    right: Callable[[Layer], bool]

    def __call__(self, layer: Layer) -> bool:
        return self.left(layer) and self.right(layer)

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


@final
@dataclass(frozen=True, repr=False)
class _Or(Selector):
    left: Callable[[Layer], bool]
    right: Callable[[Layer], bool]

    def __call__(self, layer: Layer) -> bool:
        return self.left(layer) or self.right(layer)

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


@final
@dataclass(frozen=True, repr=False)
class _Not(Selector):
    selector: Callable[[Layer], bool]

    def __call__(self, layer: Layer) -> bool:
        return not self.selector(layer)

    def __repr__(self) -> str:
        return f"~{self.selector!r}"


@final
@dataclass(frozen=True, repr=False)
class _Name(Selector):
    globs: tuple[str, ...]

    def __call__(self, layer: Layer) -> bool:
        paths = (layer.name, *layer.modules)
        return any(fnmatchcase(path, glob) for glob in self.globs for p in paths for path in _spellings(p))

    def __repr__(self) -> str:
        return f"name({self.globs[0] if len(self.globs) == 1 else list(self.globs)!r})"


@final
@dataclass(frozen=True, repr=False)
class _Operation(Selector):
    glob: str

    def __call__(self, layer: Layer) -> bool:
        return fnmatchcase(layer.operation, self.glob)

    def __repr__(self) -> str:
        return f"operation({self.glob!r})"


@final
@dataclass(frozen=True, repr=False)
class _End(Selector):
    selector: Callable[[Layer], bool]
    is_first: bool

    def __call__(self, layer: Layer) -> bool:
        layers = layer.siblings if self.is_first else reversed(layer.siblings)
        return next((other for other in layers if not other.is_tap and self.selector(other)), None) is layer

    def __repr__(self) -> str:
        return f"{'first' if self.is_first else 'last'}({self.selector!r})"


@final
@dataclass(frozen=True, repr=False)
class _Depth(Selector):
    low: float
    high: float

    def __call__(self, layer: Layer) -> bool:
        return self.low <= layer.depth < self.high or layer.depth == 1 <= self.high

    def __repr__(self) -> str:
        return f"depth({self.low}, {self.high})"


def _spellings(path: str) -> Iterator[str]:
    """The path of a call, and that of all calls of the module."""
    yield path
    if "@" in path:
        yield path.rpartition("@")[0]


def name(glob: str | Sequence[str]) -> Selector:
    """The layers in modules whose path matches a glob: the layer itself or any module around it.

    Args:
        glob: As in `fnmatch`, or several, of which one is to match; `*` crosses dots, so `"layer1*"` is everything in
            `layer1`. Without `@k` it matches every call of a reused module, with it that one call.

    Example:
        >>> import lrpfunc as lrp
        >>> rules = [(lrp.Dense & lrp.name("head*"), lrp.Epsilon(0.1))] + lrp.epsilon_plus()
        >>> lrp.name(["layer1*", "layer2*"])
        name(['layer1*', 'layer2*'])
    """
    return _Name((glob,) if isinstance(glob, str) else tuple(glob))


def operation(glob: str) -> Selector:
    """The layers whose torch operation matches a glob, such as `"gelu"` or `"conv*"`.

    Example:
        >>> import lrpfunc as lrp
        >>> rules = [(lrp.operation("softplus"), lrp.Gradient())] + lrp.epsilon_plus()
    """
    return _Operation(glob)


def first(selector: Selects) -> Selector:
    """The first selected layer in order of execution, among those that depend on the explained input.

    Example:
        >>> import lrpfunc as lrp
        >>> rules = [(lrp.first(lrp.Convolution), lrp.ZBox(-1.0, 1.0))] + lrp.epsilon_plus()
    """
    return _End(selector_of(selector), is_first=True)


def last(selector: Selects) -> Selector:
    """The last selected layer in order of execution, among those that depend on the explained input.

    Example:
        >>> import lrpfunc as lrp
        >>> rules = [(lrp.last(lrp.Dense), lrp.Epsilon(0.0))] + lrp.epsilon_plus()
    """
    return _End(selector_of(selector), is_first=False)


def depth(low: float, high: float) -> Selector:
    """The layers from share `low` to share `high` of the way through the dense layers and convolutions.

    Layer `k` of `n`, counted from 0, lies at `k / n`; any other layer at the share of those before it. The interval
    is half open, so that `depth(0, 0.5) | depth(0.5, 1)` is every layer once.

    Example:
        >>> import lrpfunc as lrp
        >>> rules = [(lrp.Convolution & lrp.depth(0, 0.5), lrp.Gamma(0.5))] + lrp.epsilon()
    """
    return _Depth(low, high)


Dense: Selector = _OfKind(Kind.DENSE)
"""Layers that multiply by a matrix that does not depend on the explained input."""

Convolution: Selector = _OfKind(Kind.CONVOLUTION)
"""Convolutions, transposed ones too."""

Activation: Selector = _OfKind(Kind.ACTIVATION)
"""Pointwise non-linearities."""

ReLU: Selector = _Operation("relu")
"""Rectified linear units, written as such: `clamp(min=0)` and the like are only an `Activation`."""

BatchNorm: Selector = _OfKind(Kind.BATCH_NORM)
"""Batch norms that are not merged with the layer before them."""

AvgPool: Selector = _OfKind(Kind.AVERAGE)
"""Average pooling of any spelling, and means."""

Sum: Selector = _OfKind(Kind.SUM)
"""Sums of activations, residual connections for example, and along an axis."""

Softmax: Selector = _OfKind(Kind.SOFTMAX)
"""Softmax, log-softmax and logsumexp, native or written out; the one inside fused attention is part of `Attention`."""

Attention: Selector = _OfKind(Kind.ATTENTION)
"""Fused scaled dot product attention; written out it is products and a softmax."""

Product: Selector = _OfKind(Kind.PRODUCT)
"""Products, of matrices too, of operands that all depend on the explained input."""

Quotient: Selector = _OfKind(Kind.QUOTIENT)
"""Divisions by what depends on the explained input and is no statistic of the numerator."""

Normalization: Selector = _OfKind(Kind.NORMALIZATION)
"""Layer, group, instance, RMS and L2 norms: division by a statistic of the same tensor, native or written out."""

Statistic: Selector = _OfKind(Kind.STATISTIC)
"""Norms, variances and standard deviations that are no part of a normalization."""

Gate: Selector = _OfRole(Role.GATE)
"""Products in which one operand modulates the other: gates, and attention weights with the values."""

Router: Selector = _OfRole(Role.ROUTER)
"""Products of the output of an expert with its weight, of those that `topk` chose."""

Recurrent: Selector = _OfRole(Role.RECURRENT)
"""The gates of `torch.nn.LSTM`, `torch.nn.GRU` and their cells."""

Scan: Selector = _OfRole(Role.SCAN)
"""The products of a selective scan, of state space models, that carry its input."""
