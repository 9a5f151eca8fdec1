"""torchvision's families, the smallest member of each; transformers are built narrow and shallow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d

from benchmarks.entry import Entry, calibrated, entry, normal, randomized
from tests.architectures.models import CLASSES, architecture

IMAGE = (3, 64, 64)
VIDEO = (3, 4, 32, 32)
SAMPLES = 16


def convolutional(name: str, shape: tuple[int, ...] = IMAGE, **options: Any) -> Entry:
    """A model by its name, with running statistics of its own activations."""
    module = randomized(models.get_model(name, weights=None, num_classes=CLASSES, **options))
    return calibrated_entry(module, shape)


def calibrated_entry(module: nn.Module, shape: tuple[int, ...], output: Callable[[Any], Tensor] | None = None) -> Entry:
    return entry(calibrated(module, normal(SAMPLES, *shape, seed=2)), normal(1, *shape), output=output)


def narrow(name: str) -> Entry:
    """A model whose dense layers are narrow."""
    return calibrated_entry(randomized(architecture(name)), IMAGE)


def shallow(**options: Any) -> Entry:
    """A ResNet with one block of each width."""
    module = models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, **options)
    return calibrated_entry(randomized(module), IMAGE)


def segmentation(name: str) -> Entry:
    """What speaks for a class at one pixel."""
    options = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    module = randomized(models.get_model(name, **options))
    return calibrated_entry(module, (3, 32, 32), output=lambda out: out["out"][:, :, 10, 20])


def vit() -> Entry:
    module = models.VisionTransformer(32, 8, 2, 4, hidden_dim=32, mlp_dim=48, num_classes=CLASSES)
    return entry(randomized(module), normal(1, 3, 32, 32))


def swin(**options: Any) -> Entry:
    module = SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES, **options)
    return entry(randomized(module), normal(1, 3, 32, 32))


def convnext() -> Entry:
    module = models.ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)], num_classes=CLASSES)
    return entry(randomized(module), normal(1, 3, 32, 32))


def maxvit() -> Entry:
    module = models.MaxVit((32, 32), 8, 4, [8, 16], [1, 2], 4, stochastic_depth_prob=0.0, num_classes=CLASSES)
    return calibrated_entry(randomized(module), (3, 32, 32))


def mvit(version: int) -> Entry:
    """The pooling attention of version 1, or the one of version 2, with relative positions and residual queries."""
    second = version == 2
    whole, halved = [1, 1, 1], [1, 2, 2]
    blocks = [
        MSBlockConfig(2, 16, 16, [3, 3, 3], [3, 3, 3], whole, halved),
        MSBlockConfig(4, 16, 32, [3, 3, 3], [3, 3, 3], halved, whole),
        MSBlockConfig(4, 32, 32, [3, 3, 3], [3, 3, 3], whole, whole),
    ]
    module = MViT(
        (32, 32),
        4,
        blocks,
        residual_pool=second,
        residual_with_cls_embed=False,
        rel_pos_embed=second,
        proj_after_attn=second,
        num_classes=CLASSES,
    )
    return entry(randomized(module), normal(1, *VIDEO))


def swin3d() -> Entry:
    module = SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [2, 4, 4], num_classes=CLASSES)
    return entry(randomized(module), normal(1, *VIDEO))


def _named(name: str, **options: Any) -> Callable[[], Entry]:
    return lambda: convolutional(name, **options)


# Their own initialization takes seconds.
_BARE = {"aux_logits": False, "init_weights": False}

TORCHVISION: dict[str, Callable[[], Entry]] = {
    "alexnet": lambda: narrow("alexnet"),
    "vgg11_bn": lambda: narrow("vgg11_bn"),
    "resnet18": _named("resnet18"),
    "resnext50_32x4d": lambda: shallow(groups=32, width_per_group=4),
    "wide_resnet50_2": lambda: shallow(width_per_group=128),
    "densenet121": _named("densenet121"),
    "googlenet": _named("googlenet", **_BARE),
    "inception_v3": _named("inception_v3", shape=(3, 80, 80), **_BARE),
    "squeezenet1_1": _named("squeezenet1_1"),
    "mobilenet_v2": _named("mobilenet_v2"),
    "mobilenet_v3_small": _named("mobilenet_v3_small"),
    "shufflenet_v2_x0_5": _named("shufflenet_v2_x0_5"),
    "mnasnet0_5": _named("mnasnet0_5"),
    "regnet_x_400mf": _named("regnet_x_400mf"),
    "regnet_y_400mf": _named("regnet_y_400mf"),
    "efficientnet_b0": _named("efficientnet_b0"),
    "efficientnet_v2_s": _named("efficientnet_v2_s"),
    "convnext_tiny": convnext,
    "vit_b_16": vit,
    "swin_t": swin,
    "swin_v2_t": lambda: swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    "maxvit_t": maxvit,
    "fcn_resnet50": lambda: segmentation("fcn_resnet50"),
    "deeplabv3_mobilenet_v3_large": lambda: segmentation("deeplabv3_mobilenet_v3_large"),
    "lraspp_mobilenet_v3_large": lambda: segmentation("lraspp_mobilenet_v3_large"),
    "r3d_18": _named("r3d_18", shape=(3, 4, 16, 16)),
    "mvit_v1_b": lambda: mvit(1),
    "mvit_v2_s": lambda: mvit(2),
    "swin3d_t": swin3d,
}
