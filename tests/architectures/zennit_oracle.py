"""Zennit 0.5.1, an independent implementation to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import zennit.core
from torch import Tensor, nn
from zennit.attribution import Gradient
from zennit.canonizers import NamedMergeBatchNorm, SequentialMergeBatchNorm
from zennit.torchvision import ResNetCanonizer, VGGCanonizer

import lrpfunc as lrp


class WithoutEps:
    """Makes a merge of batch norms exact.

    Zennit takes the scale and shift of a batch norm over into the layer before it and sets the batch norm's statistics
    to 0 and 1, but leaves its `eps`: each merged batch norm still divides by `sqrt(1 + eps)`, and the output is no
    longer the model's.
    """

    def register(self: Any, linears: Any, batch_norm: Any) -> None:
        super().register(linears, batch_norm)  # type: ignore[misc]
        self.eps, batch_norm.eps = batch_norm.eps, 0.0

    def remove(self: Any) -> None:
        self.batch_norm.eps = self.eps
        super().remove()  # type: ignore[misc]


class MergeSequential(WithoutEps, SequentialMergeBatchNorm):
    """Batch norms that are registered right after a convolution or dense layer."""


class MergeNamed(WithoutEps, NamedMergeBatchNorm):
    """Batch norms by name."""


class CanonizeVGG(WithoutEps, VGGCanonizer):
    """Zennit's canonizer for VGG."""


class CanonizeResNet(ResNetCanonizer):
    """Zennit's canonizer for ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.canonizers = (MergeSequential(), *self.canonizers[1:])


class OneModuleACall(nn.Module):
    """A ReLU that a forward pass calls several times, with a module for each call."""

    def __init__(self, calls: int):
        super().__init__()
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(calls))
        self.called = 0

    def forward(self, x: Tensor) -> Tensor:
        self.called += 1
        return self.relus[(self.called - 1) % len(self.relus)](x)


def stabilizer(ours: float | lrp.Stabilizer) -> Any:
    """Zennit's counterpart of a stabilizer."""
    if not isinstance(ours, lrp.Stabilizer):
        return ours
    assert isinstance(ours.epsilon, float)
    return zennit.core.Stabilizer(ours.epsilon, ours.clip, ours.norm_scale)


def zennit_relevance(
    model: nn.Module, composite: zennit.core.Composite, x: Tensor, start: Tensor | Callable[[Tensor], Tensor]
) -> Tensor:
    """Zennit's relevance of `x`; `start` is the starting relevance, or the function of the output that gives it.

    Zennit changes the model, so it is given a copy. The output it computes must be the model's.
    """
    twin = copy.deepcopy(model).requires_grad_(False)
    with Gradient(twin, composite) as attributor:
        output, relevance = attributor(x.clone(), start)  # type: ignore[misc]
    torch.testing.assert_close(output.detach(), model(x).detach(), rtol=1e-10, atol=1e-10)
    return relevance
