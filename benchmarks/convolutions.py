"""LRP of convolutional nets costs what the rules need and no more.

Prints, for VGG and ResNet, each composite's floating-point operations of convolutions and matrix products, wall time
and peak memory, as multiples of a plain gradient's with respect to the input, beside Zennit's. Run as
`python -m benchmarks.convolutions [model ...] [--batch N] [--size N] [--repetitions N] [--alone]`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from captum.attr import LRP
from torch import Tensor, nn
from zennit import composites, rules, types
from zennit.attribution import Gradient
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.torchvision import ResNetCanonizer

import lrpfunc as lrp
from benchmarks.measure import Functions, flops, gradient, peak_memory, ratios, seconds

TARGET = 3

OURS: dict[str, lrp.Composite] = {
    "epsilon": lrp.epsilon(),
    "epsilon_plus": lrp.epsilon_plus(),
    "epsilon_plus_flat": lrp.epsilon_plus_flat(),
    "epsilon_gamma_box": lrp.epsilon_gamma_box(-3.0, 3.0),
    "epsilon_alpha2_beta1": lrp.epsilon_alpha2_beta1(),
}
ZENNIT: dict[str, Callable[..., Any]] = {
    "epsilon": lambda canonizers: composites.LayerMapComposite(
        [(types.Convolution, rules.Epsilon()), (types.Linear, rules.Epsilon()), *composites.layer_map_base()],
        canonizers=canonizers,
    ),
    "epsilon_plus": composites.EpsilonPlus,
    "epsilon_plus_flat": composites.EpsilonPlusFlat,
    "epsilon_gamma_box": lambda canonizers: composites.EpsilonGammaBox(
        low=torch.tensor(-3.0),
        high=torch.tensor(3.0),
        canonizers=canonizers,  # type: ignore[arg-type]
    ),
    "epsilon_alpha2_beta1": composites.EpsilonAlpha2Beta1,
}


def start(output: Tensor) -> Tensor:
    return torch.zeros_like(output).index_fill(1, torch.tensor([TARGET]), 1) * output


def zennit(model: nn.Module, name: str, x: Tensor) -> Callable[[], Any]:
    """Zennit's attribution, by its composite of that name, in a context that stays open."""
    canonizer = ResNetCanonizer() if isinstance(model, torchvision.models.ResNet) else SequentialMergeBatchNorm()
    attributor = Gradient(copy.deepcopy(model), ZENNIT[name](canonizers=[canonizer]))
    attributor.__enter__()
    return lambda: attributor(x, start)


def captum(model: nn.Module, x: Tensor) -> Callable[[], Any] | None:
    """Captum's LRP, which knows the epsilon rule, and no net that uses a module twice."""
    if isinstance(model, torchvision.models.ResNet):
        return None
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    explainer = LRP(twin)
    return lambda: explainer.attribute(x.clone().requires_grad_(), target=TARGET)


def compare(name: str, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval().requires_grad_(False)
    x = torch.randn(args.batch, 3, args.size, args.size)
    model_fn, params = lrp.from_module(model)
    plain = gradient(model, x, TARGET)
    plain_flops, plain_memory = flops(plain), peak_memory(plain)
    print(f"{name}, batch {args.batch}, {args.size} x {args.size}; multiples of a plain gradient's")
    for composite, ours in OURS.items():
        relevance_fn = lrp.attribute(model_fn, ours)
        fns: Functions = {
            "gradient": plain,
            "lrpfunc": lambda fn=relevance_fn: fn(params, x, target=TARGET),
        }
        if not args.alone:
            fns["zennit"] = zennit(model, composite, x)
        if not args.alone and composite == "epsilon" and (other := captum(model, x)):
            fns["captum"] = other
        taken = seconds(fns, args.repetitions)
        print(f"  {composite}")
        for library in [name for name in fns if name != "gradient"]:
            low, middle, high = ratios(taken, library, "gradient")
            print(
                f"    {library:<8} {flops(fns[library]) / plain_flops:5.2f} x operations   {middle:5.2f} x time "
                f"({low:.2f} to {high:.2f})   {peak_memory(fns[library]) / plain_memory:5.2f} x memory",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["vgg16", "resnet50"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="leave the other libraries out")
    args = parser.parse_args()
    for name in args.models:
        compare(name, args)


if __name__ == "__main__":
    main()
