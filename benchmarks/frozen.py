"""Relevance of frozen parameters takes a fraction of the memory.

Where a parameter requires a gradient, somebody may still ask for the derivative of the relevance, so that all that it
takes is kept for as long as the relevance is: as with any result of a module. `from_module(model, frozen=True)` and
`torch.no_grad()` say that nobody will. Prints the peak memory of one call for each, beside the plain gradient with
respect to the input, and what is held after it, as torch's profiler counts tensors. Run as
`python -m benchmarks.frozen [model] [--batch N]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torchvision

import lrpfunc as lrp
from benchmarks.measure import gradient, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = getattr(torchvision.models, args.model)().eval()
    x = torch.randn(args.batch, 3, 224, 224)
    model_fn, params = lrp.from_module(model)
    _, frozen = lrp.from_module(model, frozen=True)
    relevance_fn = lrp.attribute(model_fn, lrp.epsilon_plus_flat())

    def without_gradients() -> Any:
        with torch.no_grad():
            return relevance_fn(params, x, target=3)

    fns: dict[str, Callable[[], Any]] = {
        "live parameters": lambda: relevance_fn(params, x, target=3),
        "the same under no_grad": without_gradients,
        "frozen parameters": lambda: relevance_fn(frozen, x, target=3),
        "plain gradient, live": gradient(model, x, 3),
    }
    for name, fn in fns.items():
        fn()  # makes the program
        peak, held = memory(fn)
        print(f"{name:<24} peak {peak / 2**30:5.2f} GiB   held with the result {held / 2**30:5.2f} GiB")


if __name__ == "__main__":
    main()
