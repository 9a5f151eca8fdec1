"""A forward pass, recorded number by number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CONSTANT = 0
"""The id of every number that does not depend on the explained input."""

MOVES = {
    *("clone", "contiguous", "cat", "stack", "pad", "flip", "roll", "repeat", "repeat_interleave", "index_select"),
    *("masked_fill", "where", "reshape", "flatten", "getitem", "take_along_dim", "gather", "expand_as", "tril"),
}
"""What only moves numbers. A view of the same memory is no operation at all."""

WRITES = {"setitem", "copy", "zero", "fill"}
FRESH = {"zeros_like", "ones_like", "full_like", "new_zeros", "detach"}


@dataclass(frozen=True, eq=False)
class Entry:
    """One operation: `y = function(*xs)`.

    Attributes:
        name: The operation, without the underscore of one that works in place.
        inputs: For each active operand the ids of its elements.
        output: The ids of the elements of the result.
        function: The result from the active operands; of what only moves numbers there is none.
        moved: Where each element of the result comes from, of what only moves numbers.
        arguments: The places of each active operand among the arguments.
        constants: The shapes of the other tensors that it reads.
        given: All arguments, in their order.
    """

    name: str
    inputs: list[Tensor]
    output: Tensor
    function: Callable[..., Tensor] | None = None
    moved: Tensor | None = None
    arguments: tuple[tuple[int, ...], ...] = ()
    constants: tuple[torch.Size, ...] = ()
    given: tuple[Any, ...] = ()

    @property
    def places(self) -> int:
        return sum(map(len, self.arguments))

    @property
    def reads(self) -> int:
        return len(self.inputs) + len(self.constants)


class UnknownOperationError(Exception):
    """The oracle has no words for an operation."""


@dataclass(eq=False)
class Tape(TorchFunctionMode):
    """Records what runs under it; ids are given to the elements of the explained tensor first."""

    entries: list[Entry] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=lambda: [torch.zeros(1, dtype=torch.float64)])
    count: int = 1

    def __post_init__(self) -> None:
        super().__init__()
        self.signals: dict[Entry, tuple[int, ...]] = {}
        self._memory: dict[int, Tensor] = {}
        self._alive: list[Any] = []

    def modulated(self, gate: Tensor, signal: Tensor) -> Tensor:
        """A product of which it is known what carries the signal."""
        count = len(self.entries)
        product = gate * signal
        for entry in self.entries[count:]:
            self.signals[entry] = key(self.ids(signal))
        return product

    def ids(self, tensor: Tensor) -> Tensor:
        """The ids of a tensor's elements, a view of those of its memory."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._memory:
            self._alive.append(tensor)  # so that no other tensor gets its place in memory
            self._memory[storage.data_ptr()] = torch.zeros(storage.nbytes() // 8, dtype=torch.int64)
        return self._memory[storage.data_ptr()].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def fresh(self, values: Tensor) -> Tensor:
        ids = torch.arange(self.count, self.count + values.numel()).reshape(values.shape)
        self.count += values.numel()
        self.numbers.append(values.detach().clone().flatten())
        return ids

    def explain(self, x: Tensor) -> Tensor:
        """Gives ids to the explained tensor."""
        ids = self.fresh(x)
        self.ids(x).copy_(ids)
        return ids

    @cached_property
    def values(self) -> Tensor:
        """The number of each id, once all is recorded."""
        return torch.cat(self.numbers)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        raw = getattr(func, "__name__", "")
        name = raw.strip("_")
        if name in WRITTEN_OUT:
            with self:
                return WRITTEN_OUT[name](self, *args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        floats = [leaf for leaf in leaves if is_real(leaf)]
        before = [self.ids(leaf).clone() if is_real(leaf) else None for leaf in leaves]
        active = [place for place, ids in enumerate(before) if ids is not None and bool((ids != CONSTANT).any())]
        values = {place: leaves[place].detach().clone() for place in active}
        first = args[0] if args and is_real(args[0]) else None
        in_place = name == "setitem" or kwargs.get("inplace") is True or (raw.endswith("_") and raw[:2] != "__")
        result = func(*args, **kwargs)
        self._alive.append(result)
        if not active or name in FRESH or name == "get":
            return result
        target: Any = first if in_place else result
        if not is_real(target):
            return result
        memories = {leaf.untyped_storage().data_ptr() for leaf in floats}
        if not in_place and target.untyped_storage().data_ptr() in memories:
            return result  # a view
        if name in WRITES:
            self._write(name, args, leaves, spec, before)
        elif name in MOVES:
            self._move(name, func, leaves, spec, before, target)
        else:
            self._compute(name, func, args, kwargs.values(), leaves, spec, before, values, target)
        return result

    def _compute(
        self,
        name: str,
        func: Any,
        args: Any,
        extra: Any,
        leaves: Any,
        spec: Any,
        before: Any,
        values: Any,
        target: Tensor,
    ) -> None:
        groups = grouped(before)
        constants = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def function(*operands: Tensor) -> Tensor:
            given = list(constants)
            for operand, places in zip(operands, groups.values(), strict=True):
                for place in places:
                    same = operand.numel() == values[place].numel()
                    given[place] = (operand.reshape(values[place].shape) if same else operand).clone()
            arguments, kwargs = pytree.tree_unflatten(given, spec)
            return func(*arguments, **kwargs)

        inputs = [before[places[0]] for places in groups.values()]
        output = self.fresh(target)
        self.entries.append(Entry(name, inputs, output, function, None, *_read(leaves, groups), (*args, *extra)))
        self._store(target, output)

    def _move(self, name: str, func: Any, leaves: Any, spec: Any, before: Any, target: Tensor) -> None:
        moving = [
            ids if ids is not None else 0 if isinstance(leaf, float) else leaf
            for ids, leaf in zip(before, leaves, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(moving, spec)
        moved = func(*args, **kwargs)
        output = self.fresh(target)
        groups = grouped(before)
        inputs = [before[places[0]] for places in groups.values()]
        self.entries.append(Entry(name, inputs, output, None, moved, *_read(leaves, groups)))
        self._store(target, output)

    def _write(self, name: str, args: Any, leaves: Any, spec: Any, before: Any) -> None:
        target = args[0]
        source = args[2] if name == "setitem" else args[1] if name == "copy" else None
        old = self.ids(target)
        marked = torch.full_like(old, -1)
        moved = (
            before[next(i for i, leaf in enumerate(leaves) if leaf is source)] if is_real(source) else torch.tensor(0)
        )
        if name == "setitem":
            marked[args[1]] = moved
        else:
            marked.copy_(moved)
        written = marked >= 0
        whole = bool(written.all()) and target.numel() * 8 == target.untyped_storage().nbytes()
        if whole and not bool(moved.any()):
            old.zero_()
            return
        output = self.fresh(target[written])
        self.entries.append(Entry("write", [moved] if bool(moved.any()) else [], output, moved=marked[written]))
        new = old.clone()
        new[written] = output
        self._store(target, new)

    def _store(self, target: Tensor, ids: Tensor) -> None:
        """Puts ids into memory; what is constant beside them depends on the input as far as anyone can tell."""
        self.ids(target).copy_(ids)
        storage = target.untyped_storage()
        memory = self._memory[storage.data_ptr()]
        numbers = torch.empty(0, dtype=torch.float64).set_(storage, 0, memory.shape, (1,))
        beside = memory == CONSTANT
        memory[beside] = self.fresh(numbers[beside])


def is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype is torch.float64


def grouped(before: list[Tensor | None]) -> dict[tuple[int, ...], list[int]]:
    """The places of the active operands; a tensor that stands in two places is one operand."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, ids in enumerate(before):
        if ids is not None and bool((ids != CONSTANT).any()):
            groups.setdefault(key(ids), []).append(place)
    return groups


def _read(leaves: list[Any], groups: dict[Any, list[int]]) -> tuple[Any, Any]:
    active = {place for places in groups.values() for place in places}
    others = (leaf.shape for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and place not in active)
    return tuple(map(tuple, groups.values())), tuple(others)


def key(ids: Tensor) -> tuple[int, ...]:
    return tuple(ids.flatten().tolist())


# --------------------------------------------------------------------------------------------------------------
# Operations that are several, written out


def _glu(tape: Tape, x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * torch.sigmoid(gate)


def _lstm(
    tape: Tape, x: Tensor, start: Any, params: Any, biases: bool, layers: int, *options: Any
) -> tuple[Tensor, ...]:
    """Hochreiter and Schmidhuber's cell, with a gate that forgets."""
    (w_in, w_state, b_in, b_state), (h, c) = params, (part[0] for part in start)
    batch_first = options[-1]
    pre = F.linear(x.transpose(0, 1) if batch_first else x, w_in, b_in)
    states = []
    for step in pre.unbind(0):
        i, f, g, o = (step + F.linear(h, w_state, b_state)).chunk(4, -1)
        kept, new = tape.modulated(torch.sigmoid(f), c), tape.modulated(torch.sigmoid(i), torch.tanh(g))
        c = kept + new
        h = tape.modulated(torch.sigmoid(o), torch.tanh(c))
        states.append(h)
    y = torch.stack(states)
    return (y.transpose(0, 1) if batch_first else y), h[None], c[None]


def _gru(
    tape: Tape, x: Tensor, start: Any, params: Any, biases: bool, layers: int, *options: Any
) -> tuple[Tensor, ...]:
    """Cho's cell, with its reset behind the matrix, as torch has it."""
    (w_in, w_state, b_in, b_state), h = params, start[0]
    batch_first = options[-1]
    pre = F.linear(x.transpose(0, 1) if batch_first else x, w_in, b_in)
    states = []
    for step in pre.unbind(0):
        parts = list(zip(step.chunk(3, -1), F.linear(h, w_state, b_state).chunk(3, -1), strict=True))
        reset, update = (torch.sigmoid(a + b) for a, b in parts[:2])
        candidate = torch.tanh(parts[2][0] + tape.modulated(reset, parts[2][1]))
        h = tape.modulated(1 - update, candidate) + tape.modulated(update, h)
        states.append(h)
    y = torch.stack(states)
    return (y.transpose(0, 1) if batch_first else y), h[None]


def _attention(
    tape: Tape, query: Tensor, key_: Tensor, value: Tensor, size: int, heads: int, *given: Any, **rest: Any
) -> Any:
    """A sequence's attention to itself, time first."""
    w_in, b_in, _, _, _, _, w_out, b_out = given
    time, batch, _ = query.shape
    q, k, v = (part.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for part in F.linear(query, w_in, b_in).chunk(3, -1))
    y = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).reshape(time * batch, size)
    return F.linear(y, w_out, b_out).reshape(time, batch, size), None


WRITTEN_OUT: dict[str, Callable[..., Any]] = {
    "glu": _glu,
    "lstm": _lstm,
    "gru": _gru,
    "multi_head_attention_forward": _attention,
}


def record(model: Callable[[Any, Tensor], Tensor], params: Any, x: Tensor) -> tuple[Tape, Tensor, Tensor, Tensor]:
    """The tape of a model, the ids of its input and of its output, and the output."""
    tape, x = Tape(), x.clone()
    ids = tape.explain(x)
    with torch.no_grad(), tape:
        output = model(params, x)
    return tape, ids, tape.ids(output).clone(), output
