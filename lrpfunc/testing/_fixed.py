"""Nets that are not drawn: what a rule can serve, what is seldom met, and what is smallest."""

from __future__ import annotations

from lrpfunc.testing._blocks import NORMALIZATIONS, Conv, Linear, Normalize, Pointwise, Pool
from lrpfunc.testing._net import Block, Net
from lrpfunc.testing._paths import Branch, Gated, Loop, Residual, Reuse, SelfAttention, Tied


def _probe(*blocks: Block, shape: tuple[int, ...] = (1, 2, 3)) -> Net:
    return Net(blocks, shape)


PROBES: dict[str, Net] = {
    "dense": _probe(Linear(2), shape=(1, 2)),
    "convolution": _probe(Conv(2)),
    "activation": _probe(Pointwise("relu"), Pointwise("gelu")),
    "normalization": _probe(*map(Normalize, NORMALIZATIONS)),
    "pooling": _probe(Pool("avg"), Pool("sum")),
    "gate": _probe(*map(Gated, ("glu", "squeeze"))),
    "attention": _probe(SelfAttention(), SelfAttention(spelling="fused")),
    "recurrence": _probe(Loop("lstm")),
}
"""A net for each of the plain families that rules are for."""

FIXED: dict[str, tuple[Net, ...]] = {
    "dense": (
        _probe(Linear(2), shape=(2, 3)),
        _probe(Linear(2, bias=False), shape=(1, 2)),
        _probe(Linear(2), shape=(1, 2, 3)),
        _probe(Linear(2), Linear(), shape=(1, 2)),
        *(_probe(Linear(2, spelling=spelling), shape=(1, 2)) for spelling in ("matmul", "addmm", "einsum", "module")),
    ),
    "convolution": (
        _probe(Conv(kernel=2), shape=(1, 1, 3)),
        _probe(Conv(kernel=2, bias=False), shape=(1, 1, 3)),
        _probe(Conv(kernel=2, stride=2), shape=(1, 1, 4)),
        _probe(Conv(kernel=2, padding=1), shape=(1, 1, 3)),
        _probe(Conv(kernel=2, dilation=2), shape=(1, 1, 4)),
        _probe(Conv(4, kernel=2, groups=2)),
        _probe(Conv(kernel=2, transposed=True), shape=(1, 1, 3)),
        _probe(Conv(kernel=2, stride=2, transposed=True), shape=(1, 1, 3)),
        _probe(Conv(4, kernel=2, groups=2, transposed=True)),
        _probe(Conv(kernel=2), shape=(1, 1, 3, 2)),
        _probe(Conv(kernel=2, stride=2, module=True), shape=(1, 1, 4, 4)),
        _probe(Conv(2, kernel=2), Pointwise("relu"), Linear(2), shape=(1, 1, 3)),
    ),
    "activation": tuple(_probe(Linear(2), Pointwise(name), Linear(), shape=(1, 2)) for name in ("relu", "tanh")),
    "normalization": tuple(
        _probe(Linear(2), Normalize(name), Linear(), shape=(1, 2)) for name in ("batch_norm", "layer_norm", "softmax")
    ),
    "pooling": tuple(_probe(Conv(kernel=2), Pool(name), shape=(1, 1, 4)) for name in ("avg", "max", "sum")),
    "gate": (_probe(Linear(2), Gated("glu"), shape=(1, 2)),),
    "attention": (_probe(SelfAttention(), shape=(1, 2, 2)),),
    "recurrence": tuple(_probe(Loop(cell), shape=(1, 2, 2)) for cell in ("rnn", "lstm")),
    "shared": (_probe(Tied(2), shape=(1, 3)),),
    "residual": (_probe(Residual((Linear(2),)), shape=(1, 2)),),
    "branch": tuple(_probe(Branch((Linear(2),), (Linear(2),), merge), shape=(1, 2)) for merge in ("add", "mul", "cat")),
    "reuse": (_probe(Reuse((Linear(2),)), shape=(1, 2)),),
}
"""Small nets, one a feature that a search at random seldom meets alone, by the family it takes."""

SMALLEST: tuple[Net, ...] = (
    *(Net((block,), (1, 1)) for block in (Linear(bias=False), Linear(), Linear(2))),
    Net((Linear(2, bias=False),), (1, 2), values="zero"),
    *(Net((block,), (1, 2)) for block in (Pointwise(), Pointwise("tanh"), Normalize(), Normalize("softmax"))),
    Net((Linear(), Pointwise(), Linear()), (1, 1)),
    *(Net((Linear(bias=False), Pointwise(), Linear(bias=False)), (1, 1), seed) for seed in (0, 1, 2)),
    Net((Linear(), Pointwise("tanh"), Linear()), (1, 1)),
    Net((Conv(),), (1, 2, 3)),
)
"""What a search for the smallest net that fails looks at first."""
