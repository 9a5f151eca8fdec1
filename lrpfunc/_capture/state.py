"""Memory that is changed in place, as the values that it holds one after another."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lrpfunc._capture.program import is_float
from lrpfunc._errors import CaptureError
from lrpfunc._ops.functions import assigned, overwrite
from lrpfunc._ops.symbols import OpenGraph
from lrpfunc._torch import aten, map_aggregate, map_arg


@dataclass(frozen=True)
class Step:
    """One view operation: how a view is derived from what it is a view of."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    like: Any
    no_grad: bool


@dataclass(frozen=True)
class View:
    """A chain of view operations as one function: where in the memory a view lies."""

    chain: tuple[Step, ...]

    def __call__(self, whole: Any) -> Any:
        for step in self.chain:
            whole = step.target(whole, *step.args, **step.kwargs)
        return whole

    def with_sizes(self, read: Callable[[torch.SymInt], Any]) -> View:
        """The view with other sizes in place of those that are open."""
        steps = ((step, with_sizes((step.args, step.kwargs), read)) for step in self.chain)
        return View(tuple(replace(step, args=args, kwargs=kwargs) for step, (args, kwargs) in steps))


def with_sizes(arguments: Any, read: Callable[[torch.SymInt], Any]) -> Any:
    """Arguments of an operation with `read(size)` in place of each open size, those of views included."""

    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, View):
            return leaf.with_sizes(read)
        return read(leaf) if isinstance(leaf, torch.SymInt) else leaf

    return map_aggregate(arguments, replaced)


@dataclass(eq=False)
class Memory:
    """What tensors of the trace share.

    The numbers in it are the same for all of them. What they are derived from is not: `detach` gives another name for
    the same numbers, without the history of the first, and what is written by one name becomes the history of that one
    alone. For

        h = x @ w
        v = h.detach()
        v += x

    the contents are `assigned(h, detach(h) + x)` to `h`, with the derivatives of `x @ w`, and `detach(h) + x` to `v`.

    Attributes:
        root: The first of the tensors.
        contents: The value of that one by now, to whoever shares its history, `None`, and to each `detach` whose result
            has got a history of its own.
        version: How many there were.
    """

    root: fx.Node
    contents: dict[fx.Node | None, Any]
    version: int = 0


@dataclass(eq=False)
class _Read:
    """A tensor of the trace: the `detach` it is by, its place in memory, and its value at the version read last."""

    memory: Memory
    name: fx.Node | None
    chain: tuple[Step, ...]
    value: Any
    version: int


class State:
    """The functional graph as far as it is written, and what each tensor of the trace is in it by now.

    A node of a functional graph is one value for good. The memory of a traced tensor may hold several: each write gives
    its `Memory` new content, and what is read afterwards is derived from that anew, by the tensor's chain of views. For

        y = x * 2
        row = y[0]
        row.relu_()
        return y + row

    `y` is the root of memory that `row` is in too, by one step, and the functional graph is

        mul = aten.mul.Tensor(x, 2)
        select = aten.select.int(mul, 0, 0)
        relu = aten.relu.default(select)
        overwrite = overwrite(mul, relu, View(select))   # `mul`, with `relu` where the row lies: version 1
        select_1 = aten.select.int(overwrite, 0, 0)      # `row` is read again, since it was version 0
        add = aten.add.Tensor(overwrite, select_1)

    Args:
        given: The nodes of the trace that stand for arguments of the model function.
        held: Those that stand for tensors in objects that it was given. Such an object, a cache of keys and values for
            example, is its own to change for as long as it runs, and is afterwards what it was.

    Attributes:
        graph: The functional graph.
        scopes: The modules around the traced operation, from the outside in.
        no_grad: Whether it runs without gradients.
        autocast: The arguments of each autocast around it.
    """

    def __init__(self, given: Collection[fx.Node], held: Collection[fx.Node]):
        self.graph = OpenGraph()
        self.scopes: list[str] = []
        self.no_grad = False
        self.autocast: dict[fx.Node, tuple[Any, ...]] = {}
        self._given = given
        self._held = held
        self._tensors: dict[fx.Node, _Read] = {}

    # -- the functional graph

    def emit(self, target: Any, args: Any, kwargs: Any = None, like: Any = None) -> fx.Node:
        """Adds an operation, which runs under what the traced one did; `like` is a fake tensor like its result."""
        node = self.graph.call_function(target, tuple(args), kwargs or {})
        node.meta = {
            "val": like,
            "scopes": tuple(self.scopes),
            "no_grad": self.no_grad,
            "autocast": tuple(self.autocast.values()),
        }
        return node

    def emit_new(self, target: Any, *args: Any, signal: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """Adds an operation that the trace does not have, so that what its result is like is yet to be seen."""
        fakes, fake_kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        node = self.emit(target, args, kwargs, target(*fakes, **fake_kwargs))
        if signal is not None:
            node.meta["signal"] = signal
        return node

    # -- tensors of the trace

    def define(self, old: fx.Node, new: Any) -> None:
        """Says that `old` is `new`, in memory of its own."""
        self._tensors[old] = _Read(Memory(old, {None: new}), None, (), new, 0)

    def define_view(self, old: fx.Node, new: Any, parent: fx.Node, *steps: Step) -> None:
        """Says that `old` is `new`, a view of `parent`."""
        viewed = self._tensors[parent]
        places = [step for step in steps if step.target is not aten.detach.default]
        name = viewed.name if len(places) == len(steps) else old
        self._tensors[old] = _Read(viewed.memory, name, (*viewed.chain, *places), new, viewed.memory.version)

    def memory(self, old: fx.Node) -> Memory | None:
        """The memory that `old` is in, `None` for what has no value."""
        return self._tensors[old].memory if old in self._tensors else None

    def read(self, old: fx.Node) -> Any:
        """What `old` is by now; a tuple for what was written as several nodes."""
        tensor = self._tensors[old]
        if tensor.version != tensor.memory.version:
            value = self._content(tensor.memory, tensor.name)
            for step in tensor.chain:
                value = self.emit(step.target, (value, *step.args), step.kwargs, step.like)
                value.meta["no_grad"] = step.no_grad
            tensor.value, tensor.version = value, tensor.memory.version
        return tensor.value

    def operands(self, node: fx.Node) -> tuple[Any, Any]:
        """The arguments of a traced operation and its keyword arguments, as they are by now."""
        return map_arg((node.args, node.kwargs), self.read)  # type: ignore[return-value]

    def write(self, old: fx.Node, new: fx.Node) -> None:
        """Says that `old` was set to `new`, and with it whatever shares its memory."""
        tensor = self._tensors[old]
        memory, chain = tensor.memory, tensor.chain
        self.check(memory.root)
        if chain and _overlaps(chain[-1].like):
            raise CaptureError(
                "the model function writes through a view whose elements may share memory (as_strided, unfold, "
                "expand), where it is not clear which value stays. Write to a clone of it"
            )
        before = self._content(memory, tensor.name)
        after = self.emit(overwrite, (before, new, View(chain)), None, before.meta["val"]) if chain else new
        contents = memory.contents if self.no_grad else memory.contents | {tensor.name: before}
        memory.contents = {
            name: after if name is tensor.name and not self.no_grad else self._without_gradients(content, after)
            for name, content in contents.items()
        }
        memory.version += 1

    def _content(self, memory: Memory, name: fx.Node | None) -> Any:
        """The value of the memory's root, with the history that it has by that name."""
        if name in memory.contents:
            return memory.contents[name]
        whole = memory.contents[None]
        return self.emit(aten.detach.default, (whole,), None, whole.meta["val"])

    def _without_gradients(self, before: fx.Node, after: fx.Node) -> fx.Node:
        """A tensor keeps its history when it is written to without gradients, however often."""
        if not is_float(before):
            return after  # there is none
        like = before.meta["val"]
        history = before.args[0] if before.target is assigned else before
        content = self.emit(assigned, (history, self.emit(aten.detach.default, (after,), None, like)), None, like)
        content.meta["no_grad"] = False
        return content

    def check(self, root: fx.Node) -> None:
        """Refuses a write to an input of the trace."""
        if root.op == "call_function" or root in self._held:
            return
        kind = "was given" if root in self._given else "closes over"
        scope = self.scopes[-1] if self.scopes else ""
        raise CaptureError(
            f"the model function changes in place a tensor of shape {tuple(root.meta['val'].shape)} that it {kind}"
            + (f", in the module `{scope}`. " if scope else ". ")
            + "A function that is transformed must leave its arguments alone. The usual reason is a batch norm in "
            "training mode, which updates its running statistics, or a spectral norm: capture it with\n\n"
            "    model_fn, params = lrpfunc.from_module(module, return_buffers=True)\n"
            "    relevance_fn = lrpfunc.attribute(model_fn, rules, has_aux=True)   # aux: the updated buffers\n\n"
            "or call module.eval(). For an operation such as `x += 1`, write `x = x + 1`"
        )


Handler = Callable[[State, fx.Node], None]
"""Writes into the functional graph what a traced operation does, and says what its result is there."""


def _overlaps(x: Tensor) -> bool:
    """Whether elements may share memory."""
    reach = 0
    for step, n in sorted((step, n) for step, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if step <= reach:
            return True
        reach += step * (n - 1)
    return False
