"""What the benchmarks measure: time as a ratio in one run; operations and memory as torch counts them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Functions = dict[str, Callable[[], Any]]


class _Flops(TorchDispatchMode):
    """Adds up what torch's registry says of each operation; its own counter refuses hooks that call autograd."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **kwargs, out_val=output)
        return output


def flops(fn: Callable[[], Any]) -> int:
    """The floating-point operations of convolutions and matrix products, attention included."""
    with _Flops() as counted:
        fn()
    return counted.total


def peak_memory(fn: Callable[[], Any]) -> int:
    """The most bytes that tensors made by `fn` held at one time."""
    return memory(fn)[0]


def memory(fn: Callable[[], Any]) -> tuple[int, int]:
    """The most bytes that tensors made by `fn` held at one time, and what they hold while its result lives."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = fn()
    held = peak = 0
    results: Any = profile.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak, held


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
    """The plain gradient with respect to the input."""
    given = x.clone().requires_grad_()

    def run() -> None:
        torch.autograd.grad(model(given)[:, target].sum(), given)

    return run
