"""A compiled relevance function is at most as slow as the same function run eagerly.

Prints the time of `torch.compile(relevance_fn, fullgraph=True)` as a multiple of `relevance_fn`'s. Run as
`python -m benchmarks.compiled [model] [--batch N]`.
"""

from __future__ import annotations

import argparse

import torch
import torchvision

import lrpfunc as lrp
from benchmarks.measure import Functions, ratios, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="resnet18")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    model_fn, params = lrp.from_module(getattr(torchvision.models, args.model)().eval().requires_grad_(False))
    x = torch.randn(args.batch, 3, 224, 224)
    for name, rules in {"epsilon": lrp.epsilon(), "epsilon_plus_flat": lrp.epsilon_plus_flat()}.items():
        relevance_fn = lrp.attribute(model_fn, rules)
        bound = relevance_fn.bind(params)
        compiled = torch.compile(relevance_fn, fullgraph=True)
        fns: Functions = {
            "eager": lambda fn=relevance_fn: fn(params, x, target=3),
            "bound": lambda fn=bound: fn(x, target=3),
            "compiled": lambda fn=compiled: fn(params, x, target=3),
        }
        taken = seconds(fns, 10)
        for kind in ("bound", "compiled"):
            low, middle, high = ratios(taken, kind, "eager")
            print(f"{name:<20} {kind:<10} {middle:5.2f} x time ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
