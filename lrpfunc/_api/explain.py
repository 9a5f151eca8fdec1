"""The table of layers: what served each, and where its relevance went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._api.attribution import Attribution
from lrpfunc._api.options import Argnames, Argnums, Globs
from lrpfunc._api.target import Target, plain, start
from lrpfunc._api.transform import Rules, attribute
from lrpfunc._errors import CaptureError
from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import STRUCTURAL, Kind, Layer
from lrpfunc._ops.call import operation_name
from lrpfunc._torch import is_wrapped
from lrpfunc._walk.forward import on_numbers, relevance, walk
from lrpfunc.rules._message import Message, Multiplier
from lrpfunc.rules._rule import Rule


@final
@dataclass(frozen=True)
class Row:
    """One layer's balance: `relevance_out = relevance_in + sum of absorbed`, up to `residual`.

    Attributes:
        layer: The layer.
        rule: The rule that served it.
        relevance_out: The sum of the relevance at its output.
        relevance_in: The sum of the relevance at its inputs.
        absolute: The sum of the absolute relevance at its output and inputs.
        absorbed: What did not reach the inputs, by cause, each from its own formula: `"bias"`, `"stabilizer"`,
            `"conversion"` (relevance of a zero activation, which a multiplier cannot hold), `"constants"`,
            `"nonlinearity"` and `"rule"`, what the rule gives to nobody.
    """

    layer: Layer
    rule: Rule
    relevance_out: float
    relevance_in: float
    absolute: float
    absorbed: dict[str, float]

    @property
    def residual(self) -> float:
        """What the formulas do not explain: rounding."""
        return self.relevance_out - self.relevance_in - sum(self.absorbed.values())


@final
@dataclass(frozen=True, repr=False)
class Explanation:
    """What `explain` returns: shown as a table, in a notebook too.

    Attributes:
        rows: One a layer, from the output to the input, those that only move values included.
        start: The sum of the relevance at the output.
        relevance: What `attribute` returns.
        relevance_in: The sum of the relevance that arrives at the input. Parameters that are explained take nothing
            from it: their relevance is another view of the same layers.
        tensors: Those inside the rules, by their names, such as `"rules[0].gamma"`.
    """

    rows: tuple[Row, ...]
    start: float
    relevance: Any
    relevance_in: float
    tensors: dict[str, Tensor]

    @property
    def absorbed(self) -> dict[str, float]:
        """What did not arrive, by cause, over all layers."""
        total: dict[str, float] = {}
        for row in self.rows:
            for cause, amount in row.absorbed.items():
                total[cause] = total.get(cause, 0.0) + amount
        return total

    @property
    def residual(self) -> float:
        """What the layers' formulas do not explain: rounding."""
        return self.start - self.relevance_in - sum(self.absorbed.values())

    def __repr__(self) -> str:
        lines = [_HEADER, *self._lines()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
        table = [
            "  ".join(
                cell.rjust(w) if i in _NUMBERS else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        table.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(line.rstrip() for line in (*table, "", *self._below()))

    def _repr_html_(self) -> str:
        import html  # which only notebooks need

        def row(cells: Sequence[str], tag: str) -> str:
            aligned = ((cell, "right" if i in _NUMBERS else "left") for i, cell in enumerate(cells))
            return "".join(f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>' for cell, side in aligned)

        body = "".join(f"<tr>{row(line, 'td')}</tr>" for line in self._lines())
        below = "".join(f"<p>{html.escape(line)}</p>" for line in self._below() if line)
        return f"<table><thead><tr>{row(_HEADER, 'th')}</tr></thead><tbody>{body}</tbody></table>{below}"

    def _lines(self) -> list[tuple[str, ...]]:
        names = {id(tensor): name for name, tensor in reversed(self.tensors.items())}
        return [_line(row, names) for row in self.rows if _worth_showing(row)]

    def _below(self) -> list[str]:
        """The tensors in the rules, what is held constant, and the sum of it all."""
        tensors = [f"{name} = {_described(tensor)}" for name, tensor in self.tensors.items()]
        held = _held_constant(self.rows)
        total = f"{self.start:.6g} at the output = {self.relevance_in:.6g} at the input"
        for cause, amount in self.absorbed.items():
            if abs(amount) > 1e-12 * max(1.0, abs(self.start)):
                total += f" {'+' if amount >= 0 else '-'} {abs(amount):.6g} {cause}"
        parts = [[*lines, ""] for lines in (tensors, held) if lines]
        return [*chain.from_iterable(parts), f"{total}   (residual {self.residual:.1e})"]


_HEADER = ("layer", "operation", "rule", "in", "out", "R out", "R in", "absorbed")
_NUMBERS = (5, 6)
"""The columns that are aligned to the right."""


def _worth_showing(row: Row) -> bool:
    return row.layer.kind not in STRUCTURAL or any(abs(a) > 1e-12 * row.absolute for a in row.absorbed.values())


def _line(row: Row, names: dict[int, str]) -> tuple[str, ...]:
    absorbed = ", ".join(f"{c} {a:.4g}" for c, a in row.absorbed.items() if abs(a) > 1e-12 * max(row.absolute, 1e-300))
    shapes = ", ".join(map(_shape, row.layer.input_shapes))
    name = type(row.rule).__name__
    shown = tree.map(lambda tensor: tree.Code(names.get(id(tensor), tensor)), row.rule)
    rule = f"{name} (exact)" if name in ("Linear", "Select", "Scale") else repr(shown)
    out = _shape(row.layer.output_shape)
    followers = row.layer.nodes[1:] if row.layer.affine is not None else ()
    operation = " + ".join([row.layer.operation, *map(_follower, followers)])
    return (
        row.layer.name,
        operation,
        rule,
        shapes,
        out,
        f"{row.relevance_out:.5g}",
        f"{row.relevance_in:.5g}",
        absorbed,
    )


_MULTIPLIES = (Kind.SCALE, Kind.PRODUCT, Kind.QUOTIENT, Kind.DENSE, Kind.CONVOLUTION, Kind.ATTENTION)


def _held_constant(rows: Sequence[Row]) -> list[str]:
    """What the model computes from its input and reads through `detach`, where that carries weight."""
    lines: list[str] = []
    for row in rows:
        taken = sum(amount for cause, amount in row.absorbed.items() if cause in ("bias", "constants"))
        affine = row.layer.affine
        for node in row.layer.detached:
            is_factor = row.layer.kind in _MULTIPLIES and (affine is None or node is not affine.bias_node)
            if is_factor or abs(taken) > 1e-12 * row.absolute:
                source = node.args[0] if operation_name(node) == "detach" else node
                what = f"{operation_name(source)} {_shape(tuple(node.meta['val'].shape))}"  # type: ignore[arg-type]
                lines.append(f"    {row.layer.name}: {what}, {'a factor' if is_factor else f'which takes {taken:.5g}'}")
    return ["constants that are computed from the input, behind detach or no_grad:", *lines] if lines else []


def _follower(node: fx.Node) -> str:
    return {"batch_norm_eval": "batch_norm"}.get(operation_name(node), operation_name(node))


def _described(tensor: Tensor) -> str:
    if tensor.numel() == 1:
        return f"{tensor.item():.6g}"
    shape = f"shape {_shape(tuple(tensor.shape))}"
    if tensor.numel() == 0 or tensor.is_complex():
        return f"{shape}, of {tensor.dtype}"
    return f"{shape}, from {tensor.min().item():.6g} to {tensor.max().item():.6g}"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"


def explain(
    model_fn: Callable[..., Any],
    rules: Rules = None,
    *,
    argnums: Argnums = 1,
    has_aux: bool = False,
    layers: Globs = None,
    inline_functions: bool = False,
    argnames: Argnames = None,
) -> Explainer:
    """What served each layer, and where its relevance went: the proof that no operation was missed.

    Args:
        model_fn: As for `attribute`.
        rules: As for `attribute`.
        argnums: As for `attribute`.
        has_aux: As for `attribute`.
        layers: As for `attribute`; needed where the input is made of integers, such as token ids.
        inline_functions: As for `attribute`.
        argnames: As for `attribute`.

    Returns:
        `f(*args, target=None, **kwargs)`, which returns an `Explanation`: data, and a table when printed. For
        cotangent composites, relevance is activation times cotangent.

    Raises:
        CaptureError: Inside `vmap`, `grad` or `torch.compile`, where there are no numbers to print.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> def model_fn(params, x):
        ...     return torch.nn.functional.linear(x, params["weight"], params["bias"])
        >>> params = {"weight": torch.ones(1, 2).double(), "bias": torch.ones(1).double()}
        >>> table = lrp.explain(model_fn, lrp.epsilon(0.0))(params, torch.tensor([[1.0, 3.0]]).double(), target=0)
        >>> table.start, table.relevance_in, table.absorbed["bias"]
        (5.0, 4.0, 1.0)
    """
    return Explainer(
        attribute(
            model_fn,
            rules,
            argnums=argnums,
            has_aux=has_aux,
            layers=layers,
            inline_functions=inline_functions,
            argnames=argnames,
        )
    )


@final
@dataclass(frozen=True)
class Explainer:
    """The function that `explain` returns."""

    attribution: Attribution[Any]

    def __repr__(self) -> str:
        return f"Explainer({self.attribution!r})"

    def __call__(self, *args: Any, target: Target = None, **kwargs: Any) -> Explanation:
        _refuse_abstract({"args": args, "kwargs": kwargs, "target": target, "rules": self.attribution.rules})
        with torch.no_grad():
            return _explanation(self.attribution, args, target, kwargs)


def _tensors(attribution: Attribution[Any]) -> dict[str, Tensor]:
    rules = attribution.rules
    return dict(zip(tree.names(rules, "rules"), tree.leaves(rules), strict=True))


def _number(tensor: Tensor) -> float:
    _refuse_abstract({"a number that a rule or a target computes": tensor})
    return float(tensor.real)


def _relevance(message: Message, activation: Tensor) -> Tensor:
    """As real numbers: torch's multiplier of a complex activation is the conjugate of what it is multiplied by."""
    if not activation.is_complex():
        return message.relevance(activation)
    conjugate = Multiplier(message.value.conj()) if isinstance(message, Multiplier) else message
    return conjugate.relevance(activation).real


def _refuse_abstract(values: dict[str, Any]) -> None:
    wrapped = [name for name, value in tree.named_leaves(values) if isinstance(value, Tensor) and is_wrapped(value)]
    if wrapped or torch.compiler.is_compiling():
        raise CaptureError(
            "explain prints numbers, and inside vmap, grad or torch.compile there are none yet"
            f"{f': {wrapped[0]} is transformed' if wrapped else ''}. Call it outside, or "
            "use lrpfunc.attribute(model_fn, rules, layers='*'), which returns the relevance of every layer as tensors"
        )


def _explanation(attribution: Attribution[Any], args: Any, target: Any, kwargs: dict[str, Any]) -> Explanation:
    graph, rules, tensors = attribution.assigned(args, kwargs)
    program = graph.program
    values = program.run(tensors)
    rows: list[Row] = []

    def observe(
        layer: BoundLayer, rule: Rule, messages: Sequence[Message | None], results: Sequence[Message | None]
    ) -> None:
        if not layer.layer.is_tap:
            rows.append(_row(layer, rule, messages, results))

    outputs = [values[node] for node in program.outputs]
    messages = start(plain(target), program.output(outputs))
    arrived = walk(graph, rules, messages, on_numbers(values, observe=observe))
    if attribution.rules.cotangent:
        messages = [Multiplier(message.value) for message in messages]
    begun = sum(_number(_relevance(m, output).sum()) for m, output in zip(messages, outputs, strict=True))
    reached = sum(_number(_relevance(m, values[n]).sum()) for n in graph.starts for m in arrived.get(n, ()))
    found = graph.answer([relevance(graph, node, rules, values, arrived) for node in graph.requested])
    return Explanation(tuple(rows), begun, found, reached, _tensors(attribution))


def _row(layer: BoundLayer, rule: Rule, messages: Sequence[Message | None], results: Sequence[Message | None]) -> Row:
    out = [_relevance(m, y) for m, y in zip(messages, layer.outputs, strict=True) if m is not None]
    into = [_relevance(m, x) for m, x in zip(results, layer.inputs, strict=True) if m is not None]
    absorbed = rule.account(layer, messages)
    return Row(
        layer.layer,
        rule,
        sum(_number(r.sum()) for r in out),
        sum(_number(r.sum()) for r in into),
        sum(_number(r.abs().sum()) for r in (*out, *into)),
        {cause: _number(amount) for cause, amount in absorbed.items()},
    )
