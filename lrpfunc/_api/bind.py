"""A relevance function with its parameters bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, final, overload

import torch
from torch import Tensor, nn

from lrpfunc import _tree as tree
from lrpfunc._api.target import Target
from lrpfunc._lower.bound import Bound

R = TypeVar("R")


class Runnable(Protocol):
    """A relevance function, which may have its first argument bound."""

    @property
    def reads(self) -> tuple[Any, ...]: ...

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, bound: Any = None) -> Any: ...

    def value(self, args: tuple[Any, ...], kwargs: dict[str, Any], bound: Any = None) -> Any: ...


@final
class BoundAttribution(nn.Module, Generic[R]):
    """What `bind` returns: a function of the remaining arguments, and a module, so that torch.export takes it.

    It holds copies of the parameters, and computes once what the rules make of them, such as clamped weights.
    """

    def __init__(self, function: Runnable, params: Any):
        super().__init__()
        self._function = function
        with torch.inference_mode(False):  # so that derivatives can be taken later
            self._params = tree.map_only(Tensor, lambda tensor: tensor.detach().clone(), params)
        self._bound = Bound(sum(isinstance(leaf, Tensor) for leaf in tree.leaves(params)))

    if TYPE_CHECKING:  # torch says only that a module can be called

        @overload
        def __call__(self, x: Tensor, /, *args: Any, target: Target = None, **kwargs: Any) -> R: ...
        @overload
        def __call__(self, *args: Any, target: Target = None, **kwargs: Any) -> Any: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def forward(self, *args: Any, target: Target = None, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            from lrpfunc._api.dynamo import call_in_graph  # imports torch._dynamo

            return call_in_graph(self, args, kwargs, target)
        return self.run(args, kwargs, target)

    @property
    def reads(self) -> tuple[Any, ...]:
        """What a call reads besides its arguments and what is bound."""
        return self._function.reads

    @property
    def bound_tensors(self) -> Sequence[Tensor]:
        """What is bound, as a list."""
        return [leaf for leaf in tree.leaves(self._params) if isinstance(leaf, Tensor)]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Target) -> Any:
        return self._function.run((self._params, *args), kwargs, target, self._bound)

    def value(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._function.value((self._params, *args), kwargs, self._bound)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BoundAttribution[R]:
        """What `to`, `float` and the like call."""
        self._params = tree.map_only(Tensor, fn, self._params)
        self._bound = Bound(self._bound.count)
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        return f"{self._function!r}.bind(<{len(self.bound_tensors)} tensors>)"

    def __reduce__(self) -> Any:
        return type(self), (self._function, self._params)
