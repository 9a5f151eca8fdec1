"""Which operations of a tape are one layer, told from its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tests.oracle.tape import Entry, Tape, UnknownOperationError, key

AFFINE = {"linear", "matmul", "mm", "addmm", "bmm", "einsum"}
CONVOLUTIONS = {f"conv{way}{n}d" for way in ("", "_transpose") for n in (1, 2, 3)}
AVERAGES = {"mean", *(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3))}
WINNERS = {"amax", "maximum", *(f"max_pool{n}d" for n in (1, 2, 3))}
NORMS = {"layer_norm", "group_norm"}
CURVES = {
    *("relu", "leaky_relu", "tanh", "sigmoid", "gelu", "silu", "softplus", "elu", "square", "exp", "pow", "sqrt"),
    *("rsqrt", "abs", "clamp"),
}
SIGNED = {"relu", "sigmoid", "exp", "square", "abs", "softplus", "softmax"}
ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "neg"}
POINTWISE = {*CURVES, *ARITHMETIC, "maximum", "clone", "masked_fill", "where", "contiguous"}


@dataclass(eq=False)
class Layer:
    """One step: what it is, the ids at its inputs and its output, and its Jacobians.

    Attributes:
        kind: Such as "dense", "activation" or "select".
        operation: Its name.
        entries: The operations of the tape, in order.
        inputs: For each input the ids of its elements.
        nonnegative: Whether no input can be negative, whatever the numbers.
        signals: The places of the inputs that carry the signal, where others modulate it.
        role: "gate" where one operand of a product modulates the other.
    """

    kind: str
    operation: str
    entries: list[Entry]
    inputs: list[Tensor]
    tape: Tape
    signals: tuple[int, ...] = ()
    role: str = ""
    layers: list[Layer] = field(default_factory=list)
    nonnegative: bool = False

    @property
    def output(self) -> Tensor:
        return self.entries[-1].output

    def function(self, *operands: Tensor) -> Tensor:
        """The output from the inputs, through all operations."""
        known = {key(ids): x for ids, x in zip(self.inputs, operands, strict=True)}
        for entry in self.entries:
            xs = [known[key(ids)].reshape(ids.shape) if key(ids) in known else self.values(ids) for ids in entry.inputs]
            if entry.function is None:
                assert len(xs) == 1
                assert entry.moved is not None
                flat = {i: v for i, v in zip(key(entry.inputs[0]), xs[0].flatten(), strict=True)}
                constant = self.values(entry.output)
                y = torch.stack(
                    [flat.get(i, c) for i, c in zip(key(entry.moved), constant.flatten(), strict=True)]
                ).reshape(entry.output.shape)
            else:
                y = entry.function(*xs)
            known[key(entry.output)] = y
        return y

    def values(self, ids: Tensor) -> Tensor:
        # NOTE: torch's own backward of a batch norm permutes numbers where its input and its cotangent are laid out
        # differently in memory (torch 2.14, float64 on a CPU): everything here is contiguous.
        return self.tape.values[ids].contiguous()

    @cached_property
    def xs(self) -> list[Tensor]:
        return [self.values(ids) for ids in self.inputs]

    @cached_property
    def x(self) -> Tensor:
        """The one input, as a vector."""
        (x,) = self.xs
        return x.flatten()

    @cached_property
    def y(self) -> Tensor:
        return self.values(self.output).flatten()

    @cached_property
    def jacobians(self) -> list[Tensor]:
        """For each input the matrix of derivatives, outputs by inputs."""
        return jacobians(self.function, self.xs)

    @cached_property
    def constant(self) -> Tensor:
        """What an affine layer adds: its output at zero."""
        return self.function(*map(torch.zeros_like, self.xs)).flatten()


def jacobians(function: Callable[..., Tensor], xs: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in xs]
    with torch.enable_grad():
        y = function(*inputs).flatten()
    rows: list[list[Tensor]] = [[] for _ in xs]
    for element in y:
        found = (
            torch.autograd.grad(element, inputs, retain_graph=True, allow_unused=True)
            if y.requires_grad
            else [None] * len(xs)
        )
        for row, g, x in zip(rows, found, xs, strict=True):
            row.append(torch.zeros_like(x).flatten() if g is None else g.flatten())
    return [torch.stack(row) for row in rows]


class Recogniser:
    """Goes back from the output of a tape: what ends at an operation that is needed is one layer."""

    def __init__(self, tape: Tape, input: Tensor, output: Tensor):
        self.tape, self.input = tape, input
        self.signs: dict[Entry, bool] = {}
        self.owner: dict[int, Entry] = {}
        self.whole: dict[tuple[int, ...], Entry] = {}
        for entry in tape.entries:
            self.whole[key(entry.output)] = entry
            self.owner.update(dict.fromkeys(key(entry.output), entry))
        self.result = set(key(output))
        self.uses: dict[int, list[Entry]] = {}
        needed = set(self.result)
        for entry in reversed(tape.entries):
            if needed.isdisjoint(key(entry.output)):
                continue
            for ids in entry.inputs:
                needed.update(key(ids))
                for i in set(key(ids)):
                    self.uses.setdefault(i, []).append(entry)

    def layers(self) -> list[Layer]:
        needed, found = set(self.result), []
        for entry in reversed(self.tape.entries):
            if needed.isdisjoint(key(entry.output)):
                continue
            layer = self.layer(entry)
            layer.nonnegative = all(map(self.nonnegative, layer.inputs))
            for ids in layer.inputs:
                needed.update(set(key(ids)) - {0})
            found.append(layer)
        found.reverse()
        for layer in found:
            layer.layers = found
        return found

    # -- what ends here

    def layer(self, entry: Entry) -> Layer:
        if entry in self.tape.signals:
            return Layer("product", entry.name, [entry], entry.inputs, self.tape, **self.role(entry))
        return (
            self.merged(entry)
            or self.normalization(entry)
            or self.region(entry)
            or Layer(self.kind(entry), entry.name, [entry], entry.inputs, self.tape, **self.role(entry))
        )

    def producer(self, ids: Tensor) -> Entry | None:
        """The operation that made exactly this tensor."""
        made = self.whole.get(key(ids))
        return made if made is not None and made.output.shape == ids.shape else None

    def kind(self, entry: Entry) -> str:
        name, count = entry.name, len(entry.inputs)
        if entry.moved is not None:
            return "select"
        if name in AFFINE | CONVOLUTIONS:
            if count > 1:
                return "product"
            if name == "einsum" and entry.reads == 1:
                return "linear"
            return "dense" if name in AFFINE else "convolution"
        if name in ("add", "sub", "rsub"):
            return "sum" if entry.places > 1 else "linear"
        if name in ("mul", "div", "neg"):
            if entry.places > 1:
                return "product" if name == "mul" else "quotient"
            return "scale" if name != "div" or entry.arguments[0] == (0,) else "activation"
        for names, kind in KINDS.items():
            if name in names:
                return kind
        raise UnknownOperationError(name)

    # -- dense layers and convolutions

    def affine(self, ids: Tensor, *, exactly: bool) -> list[Entry] | None:
        """The operations that end at the tensor as one dense layer or convolution that nothing else reads."""
        made = self.whole.get(key(ids))
        if made is None or (exactly and made.output.shape != ids.shape):
            return None
        if self.kind(made) in ("dense", "convolution"):
            return [made]
        return self.biased(made)

    def biased(self, entry: Entry) -> list[Entry] | None:
        """A dense layer or convolution without a bias, and the constant tensor that is added to it."""
        if entry.name not in ("add", "sub") or len(entry.inputs) != 1 or entry.reads != 2 or entry.places > 1:
            return None
        if entry.name == "sub" and entry.arguments[0] != (0,):
            return None
        made = self.whole.get(key(entry.inputs[0]))
        if made is None or self.kind(made) not in ("dense", "convolution") or made.reads > 2:
            return None
        return [made, entry] if entry.output.shape == entry.inputs[0].shape and self.alone(made, entry) else None

    def alone(self, made: Entry, user: Entry) -> bool:
        """Whether nothing else reads what an operation made."""
        ids = key(made.output)
        return self.result.isdisjoint(ids) and all(self.uses.get(i) == [user] for i in ids)

    def merged(self, entry: Entry) -> Layer | None:
        found = self.biased(entry)
        if entry.name == "batch_norm":
            before = self.affine(entry.inputs[0], exactly=True)
            if before is not None and self.alone(before[-1], entry) and self.over_features(before, entry):
                found = [*before, entry]
        if found is None:
            return None
        kind = self.kind(found[0])
        return Layer(kind, found[0].name, found, found[0].inputs, self.tape)

    def over_features(self, before: list[Entry], norm: Entry) -> bool:
        first = before[0]
        if len(before) > 1 and first.output.shape != before[1].inputs[0].shape:
            return False
        if len(before) > 1 and not all(n == 1 for n in _padded(before[1].constants[0], norm.output.ndim, without=1)):
            return False
        channels = _padded(before[1].constants[0], norm.output.ndim)[1] if len(before) > 1 else norm.output.shape[1]
        return channels == norm.output.shape[1] and (
            self.kind(first) == "convolution" or (norm.output.ndim == 2 and first.name != "einsum")
        )

    # -- activations

    def region(self, entry: Entry) -> Layer | None:
        """Pointwise operations of one tensor that are one activation, as in `x * sigmoid(x)`."""
        found = self.joined(entry)
        if found is None and self.curved(entry):
            found = [entry], entry.inputs[0]
        if found is None:
            return None
        entries, root = self.extended(*found)
        operation = entry.name if len(entries) == 1 and self.curved(entry) else "pointwise"
        return Layer("activation", operation, entries, [root], self.tape)

    def curved(self, entry: Entry) -> bool:
        """A non-linear function of one tensor alone."""
        if entry.moved is not None or entry.places != 1 or entry.inputs[0].shape != entry.output.shape:
            return False
        return entry.name in CURVES or (entry.name == "div" and self.kind(entry) == "activation")

    def straight(self, entry: Entry) -> bool:
        """Linear in all that it reads."""
        return entry.moved is not None or self.kind(entry) in ("sum", "linear", "scale")

    def joined(self, entry: Entry) -> tuple[list[Entry], Tensor] | None:
        if entry.name not in POINTWISE or entry.places < 2 or self.residual(entry):
            return None
        inside = [entry]
        front = {key(ids): ids for ids in entry.inputs}
        while front:
            if len(front) == 1:
                (root,) = front.values()
                if any(t.shape != entry.output.shape for e in inside for t in (e.output, root)):
                    return None
                if not all(map(self.straight, inside)):
                    return sorted(inside, key=self.tape.entries.index), root
            latest = max(front.values(), key=self.when)
            made = self.producer(latest)
            if made is None or made.name not in POINTWISE:
                return None
            inside.append(made)
            del front[key(latest)]
            front.update({key(ids): ids for ids in made.inputs})
        return None

    def when(self, ids: Tensor) -> int:
        made = self.producer(ids)
        return -1 if made is None else self.tape.entries.index(made)

    def residual(self, entry: Entry) -> bool:
        """`x + f(x)` is a sum beside an activation."""
        if entry.name != "add" or len(entry.inputs) != 2:
            return False
        makers = [(self.producer(a), b) for a, b in (entry.inputs, entry.inputs[::-1])]
        return any(f is not None and self.curved(f) and key(f.inputs[0]) == key(x) for f, x in makers)

    def extended(self, entries: list[Entry], root: Tensor) -> tuple[list[Entry], Tensor]:
        """With the function before it, if a number is added in between, as in `log(1 + exp(x))`."""
        between: list[Entry] = []
        before = root
        while (made := self.producer(before)) is not None and made.output.shape == entries[-1].output.shape:
            if any(e.name in ("add", "sub", "rsub") for e in between):
                earlier = self.joined(made) or (([made], made.inputs[0]) if self.curved(made) else None)
                if earlier is not None:
                    first, root = self.extended(*earlier)
                    return [*first, *between[::-1], *entries], root
            if made.name not in POINTWISE or made.places != 1 or made.constants or not self.straight(made):
                break
            between.append(made)
            before = made.inputs[0]
        return entries, root

    # -- normalizations that are written out

    def normalization(self, entry: Entry) -> Layer | None:
        """`x / sqrt(mean(x ** 2) + 0.1)` and `x * rsqrt(...)`: the statistic modulates."""
        if entry.name not in ("div", "mul") or len(entry.inputs) != 2:
            return None
        pairs = [entry.inputs] if entry.name == "div" else [entry.inputs, entry.inputs[::-1]]
        for numerator, statistic in pairs:
            root = self.under_statistic(statistic, "sqrt" if entry.name == "div" else "rsqrt")
            if root is not None and key(root) == key(numerator):
                place = next(i for i, ids in enumerate(entry.inputs) if ids is numerator)
                return Layer("normalization", "normalize", [entry], entry.inputs, self.tape, signals=(place,))
        return None

    def under_statistic(self, ids: Tensor, root_name: str) -> Tensor | None:
        names = iter([{root_name}, {"add"}, {"mean", "sum"}, {"square"}])
        for wanted in names:
            made = self.producer(ids)
            if made is None or made.name not in wanted or len(made.inputs) != 1:
                return None
            ids = made.inputs[0]
        return ids

    # -- signs

    def nonnegative(self, ids: Tensor) -> bool:
        """Whether a tensor cannot be negative: it comes from a ReLU, say, perhaps averaged or moved."""
        made = {self.owner.get(i) for i in key(ids)} - {None}
        fixed = torch.tensor([i for i in key(ids) if i not in self.owner], dtype=torch.int64)
        explained = set(key(self.input))
        if not explained.isdisjoint(fixed.tolist()) or bool((self.tape.values[fixed] < 0).any()):
            return False
        return all(self.never_negative(entry) for entry in made if entry is not None)

    def never_negative(self, entry: Entry) -> bool:
        if entry not in self.signs:
            even = entry.name == "pow" and isinstance(entry.given[1], int) and entry.given[1] % 2 == 0
            keeps = entry.moved is not None or self.kind(entry) in ("winner", "average", "total")
            keeps |= entry.name in ("add", "mul") and not entry.constants and all(map(_is_not_negative, entry.given))
            if entry.moved is not None:
                source = entry.moved.flatten()
                fixed = self.tape.values[entry.output.flatten()[source == 0]]
                found = bool((fixed >= 0).all()) and self.nonnegative(source[source != 0])
            else:
                found = even or entry.name in SIGNED or (keeps and all(map(self.nonnegative, entry.inputs)))
            self.signs[entry] = found
        return self.signs[entry]

    # -- gates

    def role(self, entry: Entry) -> dict[str, Any]:
        if entry.name == "batch_norm" or entry.name in NORMS:
            return {"signals": (0,)}
        if entry in self.tape.signals:
            places = [i for i, ids in enumerate(entry.inputs) if key(ids) == self.tape.signals[entry]]
            return {"role": "recurrent", "signals": tuple(places)}
        if self.kind(entry) != "product" or len(entry.inputs) != 2:
            return {}
        looks = [(self.gate(ids), -ids.numel()) for ids in entry.inputs]
        if looks[0] == looks[1] or max(looks[0][0], looks[1][0]) == 0:
            return {}
        return {"role": "gate", "signals": (0 if looks[1] > looks[0] else 1,)}

    def gate(self, ids: Tensor) -> int:
        """How much a tensor looks like a gate: 3 for a fraction, 2 for what is bounded, 1 for an activation."""
        for entry in self.origins(ids):
            if entry.name in ("softmax", "sigmoid"):
                return 3
            region = self.region(entry)
            if region is not None and region.operation == "pointwise":
                return 1
            if entry.name in ("tanh", "exp", "clamp"):
                return 2
            if region is not None:
                return 1
        return 0

    def origins(self, ids: Tensor) -> Iterator[Entry]:
        """The operations back through what keeps a gate a gate."""
        while True:
            made = {self.owner[i] for i in key(ids) if i in self.owner}
            if len(made) != 1 or any(i and i not in self.owner for i in key(ids)):
                return
            (entry,) = made
            yield entry
            norm = self.normalization(entry)
            if norm is not None:
                ids = norm.inputs[norm.signals[0]]
                continue
            through = self.kind(entry) in ("select", "scale", "product", "quotient", "sum", "linear", "winner")
            if not through or len(entry.inputs) != 1:
                return
            (ids,) = entry.inputs


def _is_not_negative(given: object) -> bool:
    return isinstance(given, Tensor) or (isinstance(given, (int, float)) and given >= 0)


def _padded(shape: torch.Size, ndim: int, without: int | None = None) -> list[int]:
    """A shape as it broadcasts to so many dimensions."""
    sizes = [*[1] * (ndim - len(shape)), *shape]
    return [n for i, n in enumerate(sizes) if i != without]


KINDS = {
    frozenset({"sum"}): "total",
    frozenset(AVERAGES): "average",
    frozenset({"cumsum"}): "linear",
    frozenset(WINNERS): "winner",
    frozenset({"softmax"}): "softmax",
    frozenset(NORMS): "normalization",
    frozenset({"batch_norm"}): "batch_norm",
    frozenset({"scaled_dot_product_attention"}): "attention",
    frozenset(CURVES): "activation",
}
