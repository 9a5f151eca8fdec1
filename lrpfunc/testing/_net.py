"""Small networks as pure functions, described by a few numbers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrpfunc._torch import disable_current_modes, outside_transforms
from lrpfunc.testing._code import Pasteable

Params = dict[str, Tensor]
Values = Literal["normal", "nonnegative", "sparse", "zero"]


class Block(Protocol):
    """A part of a network: a function of its parameters, which the scope hands out, and of its input."""

    def __call__(self, p: Scope, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Scope:
    """The parameters of a block, by the path of the block; with a seed, those that are missing are made.

    Two calls with the same name get the same parameter, which is how blocks share them.
    """

    tensors: Params
    path: str = ""
    seed: int | None = None

    def inside(self, name: object) -> Scope:
        return Scope(self.tensors, f"{self.path}{name}.", self.seed)

    def __call__(self, name: str, *shape: int) -> Tensor:
        path = self.path + name
        if self.seed is not None and path not in self.tensors:
            self.tensors[path] = _drawn(path, shape, self.seed)
        return self.tensors[path]

    def module(self, name: str, make: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[..., Any]:
        """A module of torch's with the parameters of this scope."""
        inner, module = self.inside(name), _module(make, args, tuple(options.items()))
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        floating = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
        tensors = {key: inner(key, *tensor.shape) for key, tensor in floating.items()}
        return lambda *inputs, **kwargs: functional_call(module, tensors, inputs, kwargs)


@cache
def _module(make: Callable[..., nn.Module], args: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> nn.Module:
    # Shared by all nets, so that equal nets are captured once; so it must be no tensor of whatever is under way when it
    # is made. A net makes what it needs before it is first traced, but a cache may be emptied.
    with disable_current_modes(), outside_transforms():
        return make(*args, **dict(options), dtype=torch.float64).eval()


def _drawn(path: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A parameter from a seed of its own, so that a net that loses a block keeps the other parameters."""
    values = _generated(shape, zlib.crc32(path.encode()) + seed)
    name = path.rpartition(".")[2]
    if "running_var" in name:
        return values.abs() + 0.5
    if name in ("gain", "decay"):
        return 1 + 0.3 * values
    return values * (0.5 if len(shape) < 2 else 1.2 / math.prod(shape[1:]) ** 0.5)


def _generated(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@final
@dataclass(frozen=True, repr=False)
class Input(Pasteable):
    """An input tensor, by its shape and the seed of its values.

    Args:
        shape: The batch first.
        values: `"normal"`; `"nonnegative"`; `"sparse"`, non-negative and half of it exactly 0; or all `"zero"`.
        seed: Of the values.

    Returns:
        Called, a float64 tensor.

    Example:
        >>> from lrpfunc.testing import Input
        >>> Input((1, 3), values="zero")()
        tensor([[0., 0., 0.]], dtype=torch.float64)
    """

    shape: tuple[int, ...]
    values: Values = "normal"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shape:
            raise ValueError("Input(shape=()) has no batch, which is the first dimension: write, for example, (1, 3)")

    def __call__(self) -> Tensor:
        x = _generated(self.shape, self.seed)
        transforms = {"normal": x, "nonnegative": x.abs(), "sparse": x.relu(), "zero": torch.zeros_like(x)}
        return transforms[self.values]


@final
@dataclass(frozen=True, repr=False)
class Net(Pasteable):
    """A small random network: a pure function of its parameters and its input, in float64.

    Sizes that do not fit the tensor a block gets are cut down until they do, so that every combination of blocks is
    a network. The output is flattened to `(batch, outputs)`.

    Args:
        blocks: What it is made of, in order; see `models`.
        shape: Of the input, the batch first: `(N, F)`, `(N, T, F)`, `(N, C, L)` or `(N, C, H, W)`.
        seed: Of the parameters.
        values: Of the input, as for `Input`.

    Returns:
        Called with parameters and an input, the output. `params()` and `input()` make both, always the same.

    Example:
        >>> from lrpfunc.testing import Linear, Net, Pointwise
        >>> net = Net((Linear(3), Pointwise("relu"), Linear(2)), (1, 4))
        >>> net
        Net(blocks=(Linear(out=3), Pointwise(), Linear(out=2)), shape=(1, 4))
        >>> net(net.params(), net.input()).shape
        torch.Size([1, 2])
        >>> sorted(net.params())
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """

    blocks: tuple[Block, ...]
    shape: tuple[int, ...] = (2, 3)
    seed: int = 0
    values: Values = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        _initial(self)  # fails where the net is made, and makes its modules

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        return Forward(self.blocks)(params, x)

    def case(self) -> tuple[Callable[[Params, Tensor], Tensor], Params, Tensor]:
        """The function, its parameters and its input: what an assertion takes."""
        return Forward(self.blocks), self.params(), self.input()

    def params(self) -> Params:
        """The parameters, by the paths of the blocks."""
        return {name: tensor.clone() for name, tensor in _initial(self)[0].items()}

    def input(self) -> Tensor:
        """The input."""
        return Input(self.shape, self.values, self.seed)()

    def outputs(self) -> int:
        """How many outputs a sample has."""
        return _initial(self)[1]

    def module(self) -> nn.Module:
        """The same network as a module."""
        return _NetModule(self)


@lru_cache(maxsize=8)  # every recording looks through all caches of the process
def _initial(net: Net) -> tuple[Params, int]:
    with torch.no_grad():
        scope = Scope({}, seed=net.seed)
        output = _forward(net.blocks, scope, net.input())
    return scope.tensors, output.shape[1]


class _NetModule(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.forward_fn = Forward(net.blocks)
        self.names = {name.replace(".", "_"): name for name in net.params()}
        for name, tensor in net.params().items():
            if "running_" in name:
                self.register_buffer(name.replace(".", "_"), tensor)
            else:
                self.register_parameter(name.replace(".", "_"), nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_fn({name: getattr(self, own) for own, name in self.names.items()}, x)


@final
@dataclass(frozen=True)
class Forward:
    """The function alone, so that nets that differ in their numbers only are recorded once."""

    blocks: tuple[Block, ...]

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        return _forward(self.blocks, Scope(params), x)


def _forward(blocks: tuple[Block, ...], p: Scope, x: Tensor) -> Tensor:
    x = run(blocks, p, x.clone())  # blocks may work in place, which an argument must not see
    return x if x.ndim == 2 else x.flatten(1)


def run(blocks: tuple[Block, ...], p: Scope, x: Tensor) -> Tensor:
    for place, block in enumerate(blocks):
        x = block(p.inside(place), x)
    return x
