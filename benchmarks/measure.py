"""What the benchmarks measure: time as a ratio in one run; operations and memory as torch counts them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Functions = dict[str, Callable[[], Any]]


def flops(fn: Callable[[], Any]) -> int:
    """The floating-point operations of convolutions and matrix products, attention included."""
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def peak_memory(fn: Callable[[], Any]) -> int:
    """The most bytes that tensors made by `fn` held at one time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    held = peak = 0
    results: Any = profile.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def seconds(fns: Functions, repetitions: int) -> dict[str, list[float]]:
    """The duration of each function's calls, interleaved, after one call of each."""
    taken: dict[str, list[float]] = {name: [] for name in fns}
    for fn in fns.values():
        fn()
    for _ in range(repetitions):
        for name, fn in fns.items():
            start = time.perf_counter()
            fn()
            taken[name].append(time.perf_counter() - start)
    return taken


def ratios(taken: dict[str, list[float]], name: str, to: str) -> tuple[float, float, float]:
    """The quartiles of the ratio of two functions' times, from calls one after the other."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(taken[name], taken[to], strict=True)], n=4)
    return low, middle, high


def gradient(model: torch.nn.Module, x: torch.Tensor, target: int) -> Callable[[], None]:
    """The plain gradient with respect to the input; the counter of operations knows `backward` only."""
    given = x.clone().requires_grad_()

    def run() -> None:
        given.grad = None
        model(given)[:, target].sum().backward()

    return run
