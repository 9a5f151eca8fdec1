"""Measures `attribute`, with the default composite, on architectures that people use.

Run it with `python -m benchmarks.zoo [name-glob ...] [--json FILE]`. Each row is one architecture with random weights
in float64, and one call: whether it works, whether relevance is accounted for, whether its derivative equals finite
differences, and what it costs. The exit status is 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
import transformers
from torch import Tensor

from benchmarks.entry import Entry
from benchmarks.torchvision_zoo import TORCHVISION
from benchmarks.transformers_zoo import TRANSFORMERS
from lrpfunc.composites import Composite

ZOO: dict[str, Callable[[], Entry]] = TORCHVISION | TRANSFORMERS
BALANCE_TOLERANCE = 1e-6
DERIVATIVE_TOLERANCE = 1e-4
# Relevance jumps where a ReLU does, so that steps must be short of all jumps. Later ones are for where the first fails.
STEPS = (1e-8, 1e-9, 1e-6, 1e-4)
REPETITIONS = 5

T = TypeVar("T")


# --------------------------------------------------------------------------------------------------------------
# Results


@dataclass(frozen=True)
class Balance:
    """Where relevance went; `residual` is a share of the absolute relevance of all layers."""

    start: float
    relevance_in: float
    absorbed: dict[str, float]
    residual: float

    def __str__(self) -> str:
        large = {cause: amount for cause, amount in self.absorbed.items() if abs(amount) > 1e-3 * abs(self.start)}
        return ", ".join(f"{cause} {amount:.3g}" for cause, amount in large.items())


@dataclass
class Result:
    """One row of the table.

    Attributes:
        name: Of the row.
        capture: Seconds that the first call takes longer than the next ones.
        balance: Where relevance went.
        derivative: The relative error of `.backward()` through relevance, against finite differences.
        ratio: The time of a call over a plain gradient's.
        seconds: All that the row took.
        errors: What was raised, or is beyond tolerance.
    """

    name: str
    capture: float | None = None
    balance: Balance | None = None
    derivative: float | None = None
    ratio: float | None = None
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        return not self.errors

    def attempt(self, stage: str, compute: Callable[[], T]) -> T | None:
        """What `compute` returns; an error becomes a part of the row."""
        try:
            return compute()
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.errors.append(f"{stage}: {type(error).__name__}: {' | '.join(lines[:3])}")
            return None

    def expect(self, criterion: str, value: float, tolerance: float) -> None:
        if not value <= tolerance:
            self.errors.append(f"{criterion} {value:.1e} > {tolerance:.0e}")


def measure(name: str, make: Callable[[], Entry], rules: Composite | None = None, timed: bool = True) -> Result:
    """All there is to say about one row; nothing is raised.

    Args:
        name: Of the row.
        make: Builds the model and its inputs.
        rules: The composite, by default the default one.
        timed: Whether to compare with the time of a plain gradient.
    """
    began, result = time.perf_counter(), Result(name)
    entry = result.attempt("model", make)
    if entry is not None:
        result.capture = result.attempt("attribute", lambda: capture_seconds(entry, rules))
        result.attempt("model afterwards", lambda: expect_numbers(entry))
    if entry is not None and result.capture is not None:
        result.balance = result.attempt("explain", lambda: balance(entry, rules))
        result.derivative = result.attempt("backward", lambda: derivative_error(entry, rules))
        result.ratio = result.attempt("time", lambda: cost_ratio(entry, rules)) if timed else None
    if result.balance is not None:
        result.expect("residual", abs(result.balance.residual), BALANCE_TOLERANCE)
    if result.derivative is not None:
        result.expect("derivative", result.derivative, DERIVATIVE_TOLERANCE)
    result.seconds = time.perf_counter() - began
    return result


# --------------------------------------------------------------------------------------------------------------
# Measurements


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def capture_seconds(entry: Entry, rules: Composite | None) -> float:
    args = entry.detached()
    first, *later = (seconds(lambda: entry.relevance(args, rules)) for _ in range(3))
    return first - min(later)  # a garbage collection can double a call


def expect_numbers(entry: Entry) -> None:
    """A capture must not leave a tensor without numbers behind, in a cache of the model's library for example."""
    output = entry.model_fn(*entry.detached())
    if type(output) is not Tensor:
        raise TypeError(f"the output is a {type(output).__name__}")


def balance(entry: Entry, rules: Composite | None) -> Balance:
    explanation = entry.explanation(entry.detached(), rules)
    scale = sum(row.absolute for row in explanation.rows)
    return Balance(explanation.start, explanation.relevance_in, explanation.absorbed, explanation.residual / scale)


def cost_ratio(entry: Entry, rules: Composite | None) -> float:
    """The median of calls that take turns."""
    args = entry.detached()
    entry.gradient(args)
    pairs = [
        (seconds(lambda: entry.relevance(args, rules)), seconds(lambda: entry.gradient(args)))
        for _ in range(REPETITIONS)
    ]
    relevance, gradient = map(statistics.median, zip(*pairs, strict=True))
    return relevance / gradient


def derivative_error(entry: Entry, rules: Composite | None) -> float:
    """The relative error of `.backward()` for inputs and parameters together, along a random direction."""
    entry = entry.precise()
    leaves, spec = pytree.tree_flatten(entry.args)
    generator = torch.Generator().manual_seed(3)
    probes = [random_like(r, generator) for r in tensors(entry.relevance(entry.detached(), rules))]
    directions = [random_like(leaf, generator) if leaf.requires_grad else None for leaf in leaves]

    def loss(leaves: Sequence[Tensor]) -> Tensor:
        relevances = tensors(entry.relevance(pytree.tree_unflatten(leaves, spec), rules))
        return torch.stack([(r * probe).sum() for r, probe in zip(relevances, probes, strict=True)]).sum()

    def along(t: float) -> float:
        moved = [x.detach() if d is None else x.detach() + t * d for x, d in zip(leaves, directions, strict=True)]
        return float(loss(moved))

    given = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
    loss(given).backward()
    pairs = [(leaf.grad, d) for leaf, d in zip(given, directions, strict=True)]
    exact = sum(float((gradient * d).sum()) for gradient, d in pairs if gradient is not None and d is not None)
    best = float("inf")
    for step in STEPS:
        best = min(best, relative_error(exact, richardson(along, step)))
        if best <= DERIVATIVE_TOLERANCE / 100:
            break
    return best


def random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of the tensor's own magnitude."""
    noise = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
    return noise * tensor.detach().square().mean().sqrt()


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def richardson(fn: Callable[[float], float], step: float) -> float:
    """The derivative at 0, from two central differences, with an error of fourth order in the step."""

    def central(h: float) -> float:
        return (fn(h) - fn(-h)) / (2 * h)

    return (4 * central(step / 2) - central(step)) / 3


def relative_error(exact: float, numeric: float) -> float:
    """Infinite where both are zero: a derivative that vanishes shows nothing."""
    scale = max(abs(exact), abs(numeric))
    return abs(exact - numeric) / scale if scale else float("inf")


# --------------------------------------------------------------------------------------------------------------
# The table

COLUMNS: dict[str, Callable[[Result], str]] = {
    "model": lambda r: r.name,
    "": lambda r: "ok" if r.passes else "FAIL",
    "start": lambda r: number(r.balance and r.balance.start, ".4g"),
    "input": lambda r: number(r.balance and r.balance.relevance_in, ".4g"),
    "residual": lambda r: number(r.balance and r.balance.residual, ".0e"),
    "backward": lambda r: number(r.derivative, ".0e"),
    "capture": lambda r: number(r.capture, ".2f"),
    "ratio": lambda r: number(r.ratio, ".1f"),
    "seconds": lambda r: number(r.seconds, ".1f"),
    "absorbed, or what is wrong": lambda r: "; ".join(r.errors) or str(r.balance or ""),
}
WIDTHS = (-30, -4, 9, 9, 8, 8, 7, 6, 7, 0)  # negative for what is flush left


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def line(cells: Sequence[str]) -> str:
    return "  ".join(cell.rjust(w) if w > 0 else cell.ljust(-w) for cell, w in zip(cells, WIDTHS, strict=True)).rstrip()


def summary(results: Sequence[Result]) -> str:
    failing = [result for result in results if not result.passes]
    lines = [f"{len(results) - len(failing)} of {len(results)} rows pass."]
    return "\n".join([*lines, *(f"  {result.name}: {'; '.join(result.errors)}" for result in failing)])


def selected(globs: Sequence[str]) -> Iterator[str]:
    return (name for name in ZOO if not globs or any(fnmatch(name, glob) for glob in globs))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name-glob", help="rows to measure, all without any")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    print(line(list(COLUMNS)), flush=True)
    results: list[Result] = []
    for name in selected(options.names):
        results.append(measure(name, ZOO[name]))
        print(line([cell(results[-1]) for cell in COLUMNS.values()]), flush=True)
    print(f"\n{summary(results)}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2))
    return 0 if results and all(result.passes for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
