"""The first call for a set of shapes costs seconds, and every later one a few milliseconds beside the work.

Prints how long the first calls of a network take, for one batch size and then for another, beside a later call; what
a call takes beside the work, which is to find the program that serves it; and what `vmap` over samples takes, which
serves every batch size with one program: its first call for a new one, and its time as a multiple of the batch's. Run
as `python -m benchmarks.calls [model ...]`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision

import lrpfunc as lrp
from benchmarks.measure import ratios, seconds
from lrpfunc._capture.capture import capture


def duration(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def report(name: str) -> str:
    model_fn, params = lrp.from_module(getattr(torchvision.models, name)().eval().requires_grad_(False))
    relevance_fn = lrp.attribute(model_fn, lrp.epsilon_plus())
    x = torch.randn(8, 3, 224, 224)

    def batch(images: torch.Tensor) -> torch.Tensor:
        return relevance_fn(params, images, target=0)

    def samples(images: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda image: batch(image[None])[0])(images)

    first, later = (duration(lambda: batch(x[:1])) for _ in range(2))
    other = duration(lambda: batch(x[:2]))
    known = (model_fn, (params, x[:2]), {})
    found = min(duration(lambda: capture(*known, has_aux=False, inline=False)) for _ in range(20))
    samples(x[:1])
    mapped = duration(lambda: samples(x[:2]))
    taken = seconds({"batch": lambda: batch(x), "samples": lambda: samples(x)}, 5)
    low, middle, high = ratios(taken, "samples", "batch")
    return (
        f"{name:<12} first call {first:5.2f} s, with another batch size {other:5.2f} s, later {later:5.2f} s, of which "
        f"{1000 * found:4.1f} ms to find the program\n{'':<12} by vmap over samples: with another batch size "
        f"{mapped:5.2f} s, later {middle:5.2f} x the time of a batch of 8 ({low:.2f} to {high:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["resnet18", "vgg16", "resnet50", "densenet121"])
    args = parser.parse_args()
    torch.manual_seed(0)
    for name in args.models:
        print(report(name), flush=True)


if __name__ == "__main__":
    main()
