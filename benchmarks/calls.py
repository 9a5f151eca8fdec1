"""The first call for a set of shapes costs seconds, and every later one a few milliseconds beside the work.

Prints how long the first calls of a network take, for one batch size and then for another, beside a later call; and
what a call takes beside the work, which is to find the program that serves it. Run as
`python -m benchmarks.calls [model ...]`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision

import lrpfunc as lrp
from lrpfunc._transform import captured


def seconds(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["resnet18", "vgg16", "resnet50", "densenet121"])
    args = parser.parse_args()
    torch.manual_seed(0)
    for name in args.models:
        model_fn, params = lrp.from_module(getattr(torchvision.models, name)().eval().requires_grad_(False))
        relevance_fn = lrp.attribute(model_fn, lrp.epsilon_plus())
        x = torch.randn(2, 3, 224, 224)
        first, later = (seconds(lambda: relevance_fn(params, x[:1], target=0)) for _ in range(2))  # noqa: B023
        other = seconds(lambda: relevance_fn(params, x, target=0))  # noqa: B023
        found = min(seconds(lambda: captured(relevance_fn, (params, x), {})) for _ in range(20))  # noqa: B023
        print(
            f"{name:<12} first call {first:5.2f} s, with another batch size {other:5.2f} s, later {later:5.2f} s, of "
            f"which {1000 * found:4.1f} ms to find the program",
            flush=True,
        )


if __name__ == "__main__":
    main()
