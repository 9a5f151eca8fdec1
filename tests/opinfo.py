"""Every function of torch's own database between two dense layers: how it is explained, or why not.

`python -m tests.opinfo` writes the table of `docs/operators.md`, which `tests/test_opinfo.py` compares.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import functional as F
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_methods_invocations import op_db

import lrpfunc as lrp
from lrpfunc._api.arguments import Explained
from lrpfunc._api.explain import _row
from lrpfunc._api.options import Options
from lrpfunc._api.request import recognise
from lrpfunc._capture.capture import capture
from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import STRUCTURAL, Kind
from lrpfunc._walk.assign import assign
from lrpfunc._walk.forward import on_numbers, relevance, walk
from lrpfunc.composites import as_composite
from lrpfunc.rules._message import Multiplier

PAGE = Path(__file__).parents[1] / "docs" / "operators.md"
LARGEST = 1500
_REFUSALS = (lrp.UncoveredLayerError, lrp.RuleError, lrp.CaptureError)
ATTN_LRP = lrp.attn_lrp()
GRADIENT = as_composite([(lambda layer: True, lrp.Gradient())])


def name_of(info: Any) -> str:
    return f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name


# What draws random numbers would set the seed each time, which is no operation that a trace could see.
common_methods_invocations.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)

INFOS = {name_of(info): info for info in sorted(op_db, key=name_of) if torch.float64 in info.dtypes}


def _flat(outputs: Any) -> Tensor:
    """All floating-point numbers of a function's results."""
    found = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    if any(t.is_complex() or t.layout is not torch.strided for t in found):
        raise _Elsewhere
    found = [t.to(torch.float64).reshape(-1) for t in found if t.is_floating_point()]
    if not sum(map(len, found)):
        raise _Elsewhere
    return torch.cat(found)


@dataclass(eq=False)
class Case:
    """One call of a function, between a dense layer that makes its operands and one that reads its results.

    The first layer is such that the operands are those of the sample, whatever the domain of the function.
    """

    info: Any
    leaves: list[Any]
    spec: Any
    active: list[int]

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        flat = torch.cat([self.leaves[place].reshape(-1) for place in self.active])
        self.x, weight = random(1, 2), 0.01 * random(len(flat), 2)
        self.params = {"weight": weight, "bias": flat - F.linear(self.x, weight)[0]}
        torch.manual_seed(0)
        # With gradients, as a model has them: torch does not resize tensors that require some.
        self.params["head"] = random(2, len(self._results(flat.detach().requires_grad_().clone())))

    @property
    def _results(self) -> Callable[[Tensor], Tensor]:
        """The function as one from vectors to vectors, which closes over no more than it reads."""
        # What is about symmetric or triangular matrices gets such, as for torch's own finite differences.
        op, fit = self.info.op, self.info.gradcheck_wrapper
        given, spec, active = self.leaves, self.spec, self.active

        def results(flat: Tensor) -> Tensor:
            leaves, start = list(given), 0
            for place in active:
                shape = given[place].shape
                leaves[place] = flat[start : start + shape.numel()].reshape(shape)
                start += shape.numel()
            operand, args, kwargs = pytree.tree_unflatten(leaves, spec)
            return _flat(fit(op, operand, *args, **kwargs))

        return results

    @property
    def model_fn(self) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        results = self._results

        def between(params: dict[str, Tensor], x: Tensor) -> Tensor:
            flat = F.linear(x, params["weight"], params["bias"])[0]
            return F.linear(results(flat)[None], params["head"])

        return between

    def gradient(self) -> Tensor | None:
        """Torch's own; `None` if it has none, or says that it is zero everywhere."""
        x = self.x.clone().requires_grad_()
        torch.manual_seed(0)
        try:
            return torch.autograd.grad(self.model_fn(self.params, x)[0, 0], x)[0]
        except RuntimeError:
            return None


class _Elsewhere(Exception):
    """A sample that is no function from floating-point tensors to floating-point tensors."""


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.dtype is torch.float64


@cache
def cases(name: str) -> list[Case]:
    """A function's samples, with all operands, and with the first one alone, from the first dense layer."""
    info, found = INFOS[name], list[Case]()
    differs = bool(info.supports_autograd)
    torch.manual_seed(0)
    samples = list(itertools.islice(info.sample_inputs("cpu", torch.float64, requires_grad=differs), 60))
    for sample in samples:
        leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        active = [
            i for i, leaf in enumerate(leaves) if _is_float(leaf) and leaf.numel() and leaf.requires_grad >= differs
        ]
        active = active if differs else active[:1]
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if any(isinstance(leaf, Tensor) and leaf.layout is not torch.strided for leaf in leaves):
            continue
        if not active or sum(leaves[place].numel() for place in active) > LARGEST:
            continue
        for chosen in (active, active[:1]) if len(active) > 1 else (active,):
            try:
                found.append(Case(info, leaves, spec, chosen))
            except (_Elsewhere, AssertionError, RuntimeError, NotImplementedError):
                continue
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What holds of each


@dataclass(frozen=True)
class Outcome:
    """How a function is explained: the kinds of its layers, or the line that says why it is refused."""

    kinds: frozenset[str]
    refused: str | None


def outcome(name: str, *, proven: bool = False) -> Outcome | None:
    """How a function is explained, or why not; `None` if it is none of floating-point tensors.

    By its first sample and its last, and by some others where both of them are refused.

    With `proven=True` all there is to check of it is checked.
    """
    found = cases(name)
    kinds, refused = set[str](), None
    others = found[1:-1][:: max(len(found) // 8, 1)]
    for place, case in enumerate([*found[:1], *found[1:][-1:], *others]):
        if place > 1 and kinds:
            break  # the others are for what is refused of the first and the last
        try:
            kinds |= _kinds(case, proven)
        except _REFUSALS as error:
            if not _names(error, case):
                raise AssertionError("the error does not say which function it is about") from error
            refused = refused or _reason(error)
    return Outcome(frozenset(kinds), refused) if found else None


def _names(error: Exception, case: Case) -> bool:
    if "asks for a number inside a tensor" in str(error):
        return "opinfo.py, line" in str(error)  # which is where the model stands
    words = {*re.findall(r"[a-z]{2,}", f"{case.info.name} {case.info.aten_name}"), "random", "pow", "traced", "svd"}
    return any(word in str(error).lower() for word in words)


def _kinds(case: Case, proven: bool) -> set[str]:
    try:
        walked = Walked(case)
    except lrp.NoPathError:
        gradient = case.gradient()
        assert gradient is None or not gradient.any()
        return {"Constant"}
    if proven:
        _prove(walked)
    inner = [layer.kind for layer in walked.graph.layers[1:-1]]
    shown = {str(kind) for kind in inner if kind not in STRUCTURAL}
    return shown or {str(kind) for kind in inner if kind is not Kind.SELECT} or {"Select"}


def _prove(walked: Walked) -> None:
    case, value = walked.case, walked.value
    torch.manual_seed(0)
    expected, gradient = case.model_fn(case.params, case.x), case.gradient()
    assert torch.equal(value.nan_to_num(7.5), expected.nan_to_num(7.5)), "the value is not the model's"
    _check_linear(walked)
    _check_gradient(walked, gradient)
    relevance = walked.relevance(ATTN_LRP)
    if gradient is not None and gradient.isfinite().all() and expected.isfinite().all():
        assert relevance.isfinite().all(), f"relevance is {relevance}"
        _check_balance(walked)
        _check_derivative(walked)


class Walked:
    """A case with the values of its forward pass, from which each composite's walk starts anew."""

    def __init__(self, case: Case):
        self.case = case
        arguments = (case.params, case.x)
        program, self.tensors = capture(case.model_fn, arguments, {}, has_aux=False, inline=False)
        self.graph = recognise(program, Explained(case.model_fn, arguments, {}, Options()), ())
        assign(self.graph, ATTN_LRP)

    @cached_property
    def values(self) -> dict[Any, Any]:
        return self.run(self.tensors)

    def run(self, tensors: list[Tensor]) -> dict[Any, Any]:
        torch.manual_seed(0)
        return self.graph.program.run(tensors)

    @property
    def value(self) -> Tensor:
        return self.values[self.graph.program.outputs[0]]

    def relevance(self, composite: lrp.Composite, values: Any = None, observe: Any = None) -> Tensor:
        """Relevance of the input, for the first output."""
        values, rules = values or self.values, assign(self.graph, composite)
        start = Multiplier(F.one_hot(torch.zeros(1, dtype=torch.int64), 2).double())
        arrived = walk(self.graph, rules, [start], on_numbers(values, observe=observe))
        return relevance(self.graph, self.graph.requested[0], rules, values, arrived)


_TORCHS_IS_WRONG = (
    "as_strided_scatter",
    "nn.functional.max_unpool1d",
    "nn.functional.max_unpool2d",
    "nn.functional.max_unpool3d",
)
"""Their derivatives give to elements that were overwritten, too."""


def _check_gradient(walked: Walked, gradient: Tensor | None) -> None:
    """With the plain gradient for a rule, relevance is input times gradient, also of the flat program."""
    case = walked.case
    if name_of(case.info) in _TORCHS_IS_WRONG:
        return
    try:
        found = [walked.relevance(GRADIENT)]
        if walked.case is cases(name_of(case.info))[0]:
            torch.manual_seed(0)
            found.append(lrp.attribute(case.model_fn, GRADIENT)(case.params, case.x, target=0))
    except lrp.RuleError as error:
        if gradient is not None or "derivative" not in str(error):
            raise AssertionError(f"torch has a derivative, {gradient}") from error
        return
    if gradient is None:
        return
    for one in found:
        torch.testing.assert_close(one, case.x * gradient, rtol=1e-6, atol=1e-9, equal_nan=True)


def _check_linear(walked: Walked) -> None:
    """What is classed linear has the value in the middle in the middle."""
    generator = torch.Generator().manual_seed(2)
    for layer in walked.graph.layers:
        at = [walked.values[node] for node in layer.inputs]
        if not layer.linear or layer.kind is Kind.WINNER or any(x.dtype is not torch.float64 for x in at):
            continue
        function = BoundLayer(layer, walked.values).function(layer.inputs)
        step = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in at]
        here, ahead, behind = (
            pytree.tree_leaves(function(*(x + sign * d for x, d in zip(at, step, strict=True)))) for sign in (0, 1, -1)
        )
        for y, a, b in zip(here, ahead, behind, strict=True):
            if y.isfinite().all() and y.dtype is torch.float64:
                error = float((a + b - 2 * y).norm())
                assert error <= 1e-6 * max(1.0, float(y.norm())), f"{layer} is not linear, by {error}"


def _check_balance(walked: Walked) -> None:
    """What arrives and what is absorbed is what there was."""

    def observe(layer: BoundLayer, rule: Any, messages: Any, results: Any) -> None:
        if not all(x.isfinite().all() for x in (*layer.inputs, *layer.outputs)):
            return  # what `nansum` leaves out
        balance = _row(layer, rule, messages, results)
        eps = max(torch.finfo(t.dtype).eps for t in (*layer.inputs, *layer.outputs))
        off = abs(balance.residual)
        assert off <= max(1e-8, 100 * eps) * max(1.0, balance.absolute), f"{layer.layer}: off by {balance.residual}"

    with torch.no_grad():
        walked.relevance(ATTN_LRP, observe=observe)


def _check_derivative(walked: Walked) -> None:
    """The derivative of relevance is that of finite differences, wherever these have one."""
    *params, x = walked.tensors[:4]

    def total(t: Tensor) -> Tensor:
        tensors = [*params, x + t * torch.tensor([[0.7, -1.1]]), *walked.tensors[4:]]
        return walked.relevance(ATTN_LRP, walked.run(tensors))[0, 0]

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    here = total(t)
    try:
        (exact,) = torch.autograd.grad(here, t)
    except RuntimeError:
        return  # torch has no second derivative of it, and says so
    h = 1e-4
    behind, halfway_behind, halfway, ahead = (float(total(torch.tensor(k * h))) for k in (-1, -0.5, 0.5, 1))
    coarse, fine = (ahead - behind) / (2 * h), (halfway - halfway_behind) / h
    # Neither at a kink nor at a jump, such as that of labels that are compared with 1.
    is_smooth = abs(ahead + behind - 2 * float(here)) <= 1e-6 and abs(coarse - fine) <= 1e-5 * max(1.0, abs(fine))
    if math.isfinite(fine) and is_smooth:
        assert abs(float(exact) - fine) <= 1e-4 * max(1.0, abs(fine)), f"{float(exact)} for {fine}"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, lrp.UncoveredLayerError):
        return "not linear, and no rule covers it"
    return text.partition(". ")[0].partition(": ")[0].partition(", which")[0][:100]


# ---------------------------------------------------------------------------------------------------------------------
# The page


def row(name: str, outcome: Outcome) -> str:
    kinds = ", ".join(sorted(outcome.kinds))
    parts = [kinds] * bool(kinds) + [f"refused: {outcome.refused}"] * bool(outcome.refused)
    return f"| `{name}` | {'; '.join(parts)} |"


def page(outcomes: dict[str, Outcome]) -> str:
    refused = sum(not outcome.kinds for outcome in outcomes.values())
    partly = sum(bool(outcome.kinds) and outcome.refused is not None for outcome in outcomes.values())
    return (
        f"""# Operators

How lrpfunc explains the {len(outcomes)} functions of the database of operators of torch {_VERSION} that take
floating-point tensors and return such. Each stands between two dense layers: the value is the model's, the plain
gradient as a rule gives input times gradient, and with `attn_lrp()` relevance is finite, the balance of each layer
closes and the derivative of relevance is that of finite differences.

A function is explained as the layers that are named, some of which may be its pieces; `Constant` is what has the
derivative zero everywhere. {refused} are refused, in words, unless you name a rule for them, and {partly} more with
some of their arguments, mostly if all of these depend on the input.

Written by `python -m tests.opinfo`, and compared by `tests/test_opinfo.py`.

| function | explained as |
|---|---|
"""
        + "\n".join(row(name, outcome) for name, outcome in outcomes.items())
        + "\n"
    )


_VERSION = re.match(r"\d+\.\d+", torch.__version__)[0]  # type: ignore[index]


def main() -> None:
    warnings.simplefilter("ignore")
    found = ((name, outcome(name)) for name in INFOS)
    PAGE.write_text(page({name: one for name, one in found if one is not None}))


if __name__ == "__main__":
    main()
