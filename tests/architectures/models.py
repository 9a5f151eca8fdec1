"""torchvision's architectures in float64, with random parameters, none of which is zero."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn

CLASSES = 10


def image(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (1, 3, 64, 64), generator=generator, dtype=torch.float64)


def architecture(name: str, **options: Any) -> nn.Module:
    """A model of torchvision's in evaluation mode.

    The dense layers of VGG and AlexNet are narrow: thousands of neurons would take a gigabyte and show nothing more.
    """
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES, **options)
        if isinstance(model, torchvision.models.VGG | torchvision.models.AlexNet):
            features = next(layer.in_features for layer in model.classifier if isinstance(layer, nn.Linear))
            hidden = (nn.Linear(features, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 48), nn.ReLU(True))
            model.classifier = nn.Sequential(*hidden, nn.Linear(48, CLASSES))
    return randomized(model.to_empty(device="cpu"))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with every parameter and statistic drawn at random, in float64 and in evaluation mode."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            for tensor in (layer.weight, layer.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.normal_(layer.running_mean, std=0.1)  # type: ignore[arg-type]
        elif isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model.double().eval()
