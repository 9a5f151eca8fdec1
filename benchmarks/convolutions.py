"""LRP of convolutional nets costs what the rules need and no more.

Prints, for VGG and ResNet, each composite's floating-point operations of convolutions and matrix products, wall time
and peak memory, as multiples of a plain gradient's with respect to the input, beside Zennit's. Run as
`python -m benchmarks.convolutions [model ...] [--batch N] [--size N] [--repetitions N]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from zennit import canonizers, composites
from zennit.attribution import Gradient

import lrpfunc as lrp
from benchmarks.measure import flops, gradient, peak_memory, ratios, seconds

TARGET = 3
BOX: dict[str, Any] = {"low": -3.0, "high": 3.0}

OURS: dict[str, lrp.Composite] = {
    "epsilon": lrp.epsilon(),
    "epsilon_plus": lrp.epsilon_plus(),
    "epsilon_plus_flat": lrp.epsilon_plus_flat(),
    "epsilon_gamma_box": lrp.epsilon_gamma_box(**BOX),
    "epsilon_alpha2_beta1": lrp.epsilon_alpha2_beta1(),
}
ZENNIT: dict[str, Callable[[list[Any]], Any]] = {
    "epsilon": lambda merge: composites.LayerMapComposite(
        layer_map=[(nn.Conv2d | nn.Linear, composites.Epsilon()), *composites.layer_map_base()], canonizers=merge
    ),
    "epsilon_plus": lambda merge: composites.EpsilonPlus(canonizers=merge),
    "epsilon_plus_flat": lambda merge: composites.EpsilonPlusFlat(canonizers=merge),
    "epsilon_gamma_box": lambda merge: composites.EpsilonGammaBox(
        **{name: torch.full((1, 3, 1, 1), bound) for name, bound in BOX.items()}, canonizers=merge
    ),
    "epsilon_alpha2_beta1": lambda merge: composites.EpsilonAlpha2Beta1(canonizers=merge),
}


def zennit(model: nn.Module, name: str, x: Tensor) -> Callable[[], Any]:
    """Zennit's attribution by the composite of that name, inside a context that stays open."""
    resnet = isinstance(model, torchvision.models.ResNet)
    canonizer = torchvision_canonizer(resnet)
    attributor = Gradient(model, ZENNIT[name]([canonizer]))
    attributor.__enter__()

    def start(output: Tensor) -> Tensor:
        return torch.zeros_like(output).index_fill(1, torch.tensor([TARGET]), 1) * output

    return lambda: attributor(x, start)


def torchvision_canonizer(resnet: bool) -> Any:
    from zennit import torchvision as known

    return known.ResNetCanonizer() if resnet else canonizers.SequentialMergeBatchNorm()


def compare(name: str, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval().requires_grad_(False)
    x = torch.randn(args.batch, 3, args.size, args.size)
    model_fn, params = lrp.from_module(model)
    plain = gradient(model, x, TARGET)
    plain_flops, plain_memory = flops(plain), peak_memory(plain)
    print(f"{name}, batch {args.batch}, {args.size} x {args.size}; multiples of a plain gradient's")
    for composite, rules in OURS.items():
        relevance_fn = lrp.attribute(model_fn, rules)
        other = getattr(torchvision.models, name)().eval().requires_grad_(False)
        fns = {
            "gradient": plain,
            "lrpfunc": lambda fn=relevance_fn: fn(params, x, target=TARGET),
            "zennit": zennit(other, composite, x),
        }
        taken = seconds(fns, args.repetitions)
        print(f"  {composite}")
        for library in ("lrpfunc", "zennit"):
            low, middle, high = ratios(taken, library, "gradient")
            print(
                f"    {library:<8} {flops(fns[library]) / plain_flops:5.2f} x operations   {middle:5.2f} x time "
                f"({low:.2f} to {high:.2f})   {peak_memory(fns[library]) / plain_memory:5.2f} x memory"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["vgg16", "resnet50"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    for name in args.models:
        compare(name, args)


if __name__ == "__main__":
    main()
