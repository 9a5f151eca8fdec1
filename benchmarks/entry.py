"""What a row of the zoo is: one call of `attribute`, on a model with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lrpfunc as lrp
from lrpfunc.composites import Composite

TARGET = 3


@dataclass(frozen=True)
class Entry:
    """One call of `attribute`: `f(*args)` has shape `(N, C)`, and its column `TARGET` is explained.

    Attributes:
        model_fn: A pure function `f(params, *inputs)`.
        args: What it is called with. Parameters and floating-point inputs require gradients, buffers do not.
        options: The keyword arguments of `attribute`.
    """

    model_fn: Callable[..., Tensor]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def relevance(self, args: tuple[Any, ...], rules: Composite | None = None) -> Any:
        """What `attribute` returns."""
        return lrp.attribute(self.model_fn, rules, **self.options)(*args, target=TARGET)

    def explanation(self, args: tuple[Any, ...], rules: Composite | None = None) -> lrp.Explanation:
        """What `explain` returns."""
        return lrp.explain(self.model_fn, rules, **self.options)(*args, target=TARGET)

    def gradient(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The plain gradient of the logit for the same inputs; for token ids, for their embedding's weight."""
        params, *inputs = args
        explained = [x for x in inputs if x.is_floating_point()]
        if "layers" in self.options:
            explained.append(params[f"{self.options['layers']}.weight"])
        explained = [x.requires_grad_() for x in explained]
        return torch.autograd.grad(self.model_fn(*args)[:, TARGET].sum(), explained)

    def detached(self) -> tuple[Any, ...]:
        """The arguments, none of which requires gradients."""
        return pytree.tree_map(lambda leaf: leaf.detach(), self.args)

    def precise(self) -> Entry:
        """The call without casts to float32 inside, whose rounding would drown finite differences."""
        mode = Float64()
        with mode:
            self.model_fn(*self.detached())
        return replace(self, model_fn=Precise(self.model_fn)) if mode.needed else self


class Float64(TorchFunctionMode):
    """Computes in float64 where a model asks for float32.

    Attributes:
        needed: Whether it did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.needed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (*args, *(kwargs or {}).values())
        self.needed |= func is torch.Tensor.float or any(value is torch.float32 for value in given)
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(_doubled, args), **{key: _doubled(value) for key, value in (kwargs or {}).items()})


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@dataclass(frozen=True)
class Precise:
    """A model function in float64 throughout."""

    model_fn: Callable[..., Tensor]

    def __call__(self, *args: Any) -> Tensor:
        with Float64():
            return self.model_fn(*args)


def entry(
    module: nn.Module,
    *inputs: Tensor,
    names: tuple[str, ...] = (),
    output: Callable[[Any], Any] | None = None,
    options: dict[str, Any] | None = None,
    **fixed: Any,
) -> Entry:
    """The call that explains all `inputs` of a module, passed by position or by `names`, with `fixed` others."""
    module_fn, params = lrp.from_module(module, output=output)

    def model_fn(params: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return module_fn(params, *inputs[len(names) :], **dict(zip(names, inputs, strict=False)), **fixed)

    given = tuple(x.requires_grad_(x.is_floating_point()) for x in inputs)
    argnums = {} if len(inputs) == 1 else {"argnums": tuple(range(1, 1 + len(inputs)))}
    return Entry(model_fn, (params, *given), argnums | (options or {}))


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Random numbers, such as an image."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(*shape: int, vocabulary: int, seed: int = 1) -> Tensor:
    """Random token ids, none of which is a special one."""
    return torch.randint(4, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64, with parameters of which none is zero, at which activations neither vanish nor explode."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
        elif name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.1)
    return module.double().eval()


@torch.no_grad()
def calibrated(module: nn.Module, inputs: Tensor) -> nn.Module:
    """The module with the running statistics that its batch norms meet on `inputs`."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.reset_running_stats()
            norm.momentum = None
    module.train()(inputs)
    return module.eval()
