"""AttnLRP costs what a gradient costs: a decoder of 6 layers, 384 channels and 192 tokens.

Prints matmul FLOPs, counted by torch, and wall time, both as multiples of a plain gradient's with respect to the
embeddings. Run as `python -m benchmarks.decoder`.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrpfunc as lrp
from benchmarks.measure import Functions, flops, gradient, ratios, seconds

LAYERS, WIDTH, TOKENS, HEADS, CLASSES = 6, 384, 192, 6, 1000


class Block(nn.Module):
    """Attention and a gated feed-forward network, each behind an RMS norm."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * 1024, bias=False), nn.Linear(1024, WIDTH, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(*qkv.unbind()).transpose(1, 2).flatten(2))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """From embeddings to the scores of the next token."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(fused) for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x))[:, -1])


def main() -> None:
    for fused in (True, False):
        torch.manual_seed(0)
        model = Decoder(fused).eval().requires_grad_(False)
        model_fn, params = lrp.from_module(model)
        x = torch.randn(1, TOKENS, WIDTH)
        fns: Functions = {"gradient": gradient(model, x, target=3)}
        for name, rules in {"attn_lrp": lrp.attn_lrp(), "cp_lrp": lrp.cp_lrp()}.items():
            relevance_fn = lrp.attribute(model_fn, rules)
            fns[name] = lambda fn=relevance_fn, params=params, x=x: fn(params, x, target=3)
        counts = {name: flops(fn) for name, fn in fns.items()}
        taken = seconds(fns, repetitions=25)
        print("fused attention" if fused else "attention written out")
        for name in fns:
            low, middle, high = ratios(taken, name, "gradient")
            print(
                f"  {name:<10} {counts[name] / counts['gradient']:.3f} x FLOPs   {middle:.2f} x time "
                f"({low:.2f} to {high:.2f}), {1e3 * statistics.median(taken[name]):.0f} ms"
            )


if __name__ == "__main__":
    main()
