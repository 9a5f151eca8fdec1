"""Ten targets cost less than six times one, for they share the forward pass and the denominators.

Prints, for `epsilon_plus`, the cost of ten targets as a multiple of one's, in operations and in time. All at once need
tensors ten times as large, which the C library takes from the system and gives back each time, once they pass 32 MiB:
with a small `chunk_size`, tensors stay small, and the forward pass is still run once. Run as
`python -m benchmarks.targets [model] [--batch N]`.
"""

from __future__ import annotations

import argparse

import torch
import torchvision

import lrpfunc as lrp
from benchmarks.measure import Functions, flops, ratios, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = getattr(torchvision.models, args.model)().eval().requires_grad_(False)
    model_fn, params = lrp.from_module(model)
    x = torch.randn(args.batch, 3, 224, 224)
    relevance_fn = lrp.attribute(model_fn, lrp.epsilon_plus())

    def by_vjp(chunk_size: int | None) -> None:
        output, pullback = lrp.vjp(model_fn, lrp.epsilon_plus(), params, x)
        torch.vmap(pullback, chunk_size=chunk_size)(torch.eye(1000)[:10, None] * output)

    fns: Functions = {
        "one target": lambda: relevance_fn(params, x, target=0),
        "ten by vmap over targets": lambda: torch.vmap(lambda t: relevance_fn(params, x, target=t))(torch.arange(10)),
        "ten by vmap over a pullback": lambda: by_vjp(None),
        "the same with chunk_size=2": lambda: by_vjp(2),
        "the same with chunk_size=1": lambda: by_vjp(1),
    }
    taken = seconds(fns, 5)
    one = flops(fns["one target"])
    for name, fn in fns.items():
        low, middle, high = ratios(taken, name, "one target")
        print(f"{name:<28} {flops(fn) / one:5.2f} x operations   {middle:5.2f} x time ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
