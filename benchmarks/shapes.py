"""What a new size costs: a sentence of another length, a batch of another size, an image of another resolution.

Each model is called with 24 sizes, one after the other, and with each of them twice: the first time it is new. Prints
how many recordings that took and for how long, and what a new size takes as a multiple of a known one, over the sizes
after the last recording. Run as `python -m benchmarks.shapes [model ...]`.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import lrpfunc as lrp
from benchmarks.transformers_zoo import TRANSFORMERS
from lrpfunc.composites import Composite

SIZES = 24


class UNet(nn.Module):
    """Two levels, with a skip between them; scores by the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(32, 10, 3, padding=1)
        self.down, self.norm = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.before(x).relu()
        second = self.up(self.norm(self.down(first)).relu())
        return self.after(torch.cat([first, second], 1)).mean((2, 3))


@dataclass(frozen=True)
class Sized:
    """A model, and its input of some size."""

    model_fn: Callable[..., Any]
    params: Any
    rules: Composite | None
    options: dict[str, Any]
    input: Callable[[], Tensor]


def transformer(name: str) -> Sized:
    entry = TRANSFORMERS[name]()
    params, x, *_ = entry.detached()

    def sentences() -> Tensor:
        shape = random.randint(2, 9), random.randint(2, 30)
        return torch.randn(*shape, *x.shape[2:], dtype=x.dtype) if x.is_floating_point() else ids(*shape)

    return Sized(entry.model_fn, params, None, entry.options, sentences)


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 90, shape)


def convolutional(module: nn.Module) -> Sized:
    model_fn, params = lrp.from_module(module.eval(), frozen=True)

    def images() -> Tensor:
        return torch.randn(random.randint(2, 9), 3, *2 * [8 * random.randint(8, 16)])

    return Sized(model_fn, params, lrp.attn_lrp() + lrp.epsilon_plus(), {}, images)


MODELS: dict[str, Callable[[], Sized]] = {
    **{name: lambda name=name: transformer(f"{name}-sdpa") for name in ("llama", "qwen2", "gpt2", "bert", "bert_ids")},
    "resnet18": lambda: convolutional(torchvision.models.resnet18(num_classes=10)),
    "convnext_tiny": lambda: convolutional(torchvision.models.convnext_tiny(num_classes=10)),
    "unet": lambda: convolutional(UNet()),
}


class Recordings(logging.Handler):
    """Counts them by what the library logs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.msg.startswith("recording")


def report(name: str, recordings: Recordings) -> str:
    torch.manual_seed(0)
    random.seed(0)
    sized = MODELS[name]()
    relevance_fn = lrp.attribute(sized.model_fn, sized.rules, **sized.options)
    before, spent, ratios = recordings.count, 0.0, list[float]()
    for _ in range(SIZES):
        x, known = sized.input(), recordings.count
        new, again = (duration(lambda x=x: relevance_fn(sized.params, x, target=1)) for _ in range(2))
        if recordings.count > known:
            spent, ratios = spent + new, []
        else:
            ratios.append(new / again)
    count = recordings.count - before
    return (
        f"{name:<14} {count} recordings, {spent:5.1f} s; then a new size takes {statistics.median(ratios):.2f} x a "
        f"known one ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} sizes)"
    )


def duration(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    recordings = Recordings()
    logger = logging.getLogger("lrpfunc")
    logger.setLevel(logging.INFO)
    logger.addHandler(recordings)
    warnings.simplefilter("ignore", lrp.RelevanceWarning)
    for name in parser.parse_args().models:
        print(report(name, recordings), flush=True)


if __name__ == "__main__":
    main()
