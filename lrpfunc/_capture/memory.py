"""What a trace leaves in memory, and how that is undone."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import itertools
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from lrpfunc._capture.identity import attributes, is_fixed, slots
from lrpfunc._capture.policy import PLAIN, policy

IsForeign = Callable[[Any], bool]
_ABSENT: Any = object()


class Memory:
    """What stood where, before a trace, so that what the trace left there can be taken back.

    A function may remember what it computed, for example a grid, or the activations that a hook collects. What it
    computed while it was traced is of no use outside of the trace. Only that is touched, one item at a time: beside
    it other threads may write into the same containers.
    """

    # NOTE: [nothing comes between] `if space[key] is value: del space[key]` has no call between the look and the write
    # (of a dict or a list), so that CPython lets no other thread in there. That is why these lines stand as they are.

    def __init__(self) -> None:
        self._undo: list[Callable[[IsForeign], None]] = []

    def forget(self, is_foreign: IsForeign) -> None:
        """Takes back what holds something foreign: removes it, or puts back what stood there."""
        for undo in self._undo:
            undo(is_foreign)

    def mapping(self, space: dict[Any, Any], names: Iterable[str] | None = None) -> None:
        """Remembers a dictionary, or what stands for some names in it."""
        before = dict(dict.items(space)) if names is None else {n: space[n] for n in names if n in space}
        wanted = None if names is None else frozenset(names)

        def undo(is_foreign: IsForeign) -> None:
            for key, value in list(dict.items(space)):
                if wanted is not None and key not in wanted:
                    continue
                old = before.get(key, _ABSENT)
                if value is old or not (holds(value, is_foreign) or holds(key, is_foreign)):
                    continue
                try:
                    if old is _ABSENT:
                        if space[key] is value:
                            del space[key]
                    elif space[key] is value:
                        space[key] = old
                except KeyError:  # another thread has removed it
                    continue

        self._undo.append(undo)

    def sequence(self, items: Any) -> None:
        """Remembers a list or a deque."""
        before = list(items)
        known = set(map(id, before))

        def undo(is_foreign: IsForeign) -> None:
            present = set(map(id, items))
            taken = False
            for index in reversed(range(len(items))):
                try:
                    item = items[index]
                    if id(item) in known or not holds(item, is_foreign):
                        continue
                    taken = True
                    if index < len(before) and id(before[index]) not in present:
                        if items[index] is item:
                            items[index] = before[index]
                    elif items[index] is item:
                        del items[index]
                except IndexError:  # another thread has made it shorter
                    continue
            if taken and getattr(items, "maxlen", None) is not None:
                _refill(items, before)

        self._undo.append(undo)

    def collection(self, items: set[Any]) -> None:
        """Remembers a set."""
        before = list(items)
        known = set(map(id, before))

        def undo(is_foreign: IsForeign) -> None:
            for item in list(items):
                if id(item) not in known and holds(item, is_foreign):
                    items.discard(item)

        self._undo.append(undo)

    def cell(self, cell: types.CellType) -> None:
        """Remembers a variable that a function closes over."""
        before = contents(cell)

        def undo(is_foreign: IsForeign) -> None:
            value = contents(cell)
            if value is before or value is _ABSENT or not holds(value, is_foreign):
                return
            if before is _ABSENT:
                del cell.cell_contents
            elif cell.cell_contents is value:
                cell.cell_contents = before

        self._undo.append(undo)

    def slots(self, obj: Any) -> None:
        """Remembers the attributes of an object that are not in its dictionary."""
        for slot in slots(type(obj)):
            self._attribute(slot, obj)

    def _attribute(self, slot: Any, obj: Any) -> None:
        before = _slot(slot, obj)

        def undo(is_foreign: IsForeign) -> None:
            value = _slot(slot, obj)
            if value is before or value is _ABSENT or not holds(value, is_foreign):
                return
            if before is _ABSENT:
                slot.__delete__(obj)
            else:
                slot.__set__(obj, before)

        self._undo.append(undo)

    def members(self, cls: type) -> None:
        """Remembers the attributes of a class."""
        before = dict(vars(cls))

        def undo(is_foreign: IsForeign) -> None:
            for name, value in list(vars(cls).items()):
                old = before.get(name, _ABSENT)
                if value is old or not holds(value, is_foreign):
                    continue
                if old is _ABSENT:
                    delattr(cls, name)
                else:
                    setattr(cls, name, old)

        self._undo.append(undo)

    def cached(self, function: Any) -> None:
        """Remembers a function with a `functools.lru_cache`."""
        self._undo.append(lambda is_foreign: _forget_results(function, is_foreign))


def contents(cell: types.CellType) -> Any:
    """What the variable is, if it has been assigned."""
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def is_assigned(value: Any) -> bool:
    return value is not _ABSENT


def _slot(slot: Any, obj: Any) -> Any:
    try:
        return slot.__get__(obj)
    except AttributeError:
        return _ABSENT


def _refill(items: collections.deque[Any], before: list[Any]) -> None:
    """Puts back what a full deque has dropped, at the end that it fell off."""
    present = set(map(id, items))
    lost = [item for item in before if id(item) not in present]
    if not lost:
        return
    room = (items.maxlen or 0) - len(items)
    if lost[0] is before[0]:
        items.extendleft(reversed(lost[max(0, len(lost) - room) :]))
    else:
        items.extend(lost[:room])


def holds(value: Any, is_foreign: IsForeign, depth: int = 4) -> bool:
    """Whether something foreign is found at `value`, or a few steps inside."""
    return is_foreign(value) or (depth > 0 and any(holds(part, is_foreign, depth - 1) for part in _parts(value)))


_CLOSED = (int, float, str, bytes, Tensor, type, types.ModuleType, types.CodeType)


def _parts(value: Any) -> list[Any]:
    if value is None or isinstance(value, _CLOSED):
        return []
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return list(iter(value))
    if isinstance(value, types.FunctionType):
        return [*map(contents, value.__closure__ or ()), *(value.__defaults__ or ())]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__]
    return [part for _, part in attributes(value)]


# --------------------------------------------------------------------------------------------------------------
# Arguments


def restoring(arguments: Iterable[Any]) -> Callable[[], None]:
    """Remembers what is in objects and containers that a function is given; what it returns puts all of that back.

    A function that is transformed leaves its arguments alone, also one that appends to a cache of keys and values.
    """
    undo: list[Callable[[], None]] = []
    known: dict[int, Any] = {}  # alive, so that no id is used again
    pending = list(arguments)
    while pending:
        obj = pending.pop()
        kind = type(obj)
        if id(obj) in known or kind in PLAIN or policy(kind) not in ("_mapping", "_sequence", "_instance"):
            continue
        known[id(obj)] = obj
        pending += _parts(obj)
        if isinstance(obj, dict):
            undo.append(functools.partial(_restore_mapping, obj, list(_ordered(obj).items(obj))))
        elif isinstance(obj, (list, collections.deque, set)):
            undo.append(functools.partial(_restore_items, obj, list(iter(obj))))
        if isinstance(own := getattr(obj, "__dict__", None), dict):
            undo.append(functools.partial(_restore_mapping, own, list(own.items())))
        own_slots = (slot for slot in slots(kind) if not is_fixed(slot.__objclass__))
        undo += [functools.partial(_restore_slot, slot, obj, _slot(slot, obj)) for slot in own_slots]

    def put_all_back() -> None:
        for put_back in undo:
            put_back()

    return put_all_back


def _ordered(space: dict[Any, Any]) -> type[dict[Any, Any]]:
    """The class whose methods keep the order of `space`."""
    return collections.OrderedDict if isinstance(space, collections.OrderedDict) else dict


def _restore_mapping(space: dict[Any, Any], before: list[tuple[Any, Any]]) -> None:
    methods = _ordered(space)
    now = list(methods.items(space))
    if [(id(key), id(value)) for key, value in now] != [(id(key), id(value)) for key, value in before]:
        methods.clear(space)
        methods.update(space, before)


def _restore_items(items: Any, before: list[Any]) -> None:
    if list(map(id, items)) != list(map(id, before)):
        items.clear()
        (items.update if isinstance(items, set) else items.extend)(before)


def _restore_slot(slot: Any, obj: Any, before: Any) -> None:
    if _slot(slot, obj) is before:
        return
    slot.__delete__(obj) if before is _ABSENT else slot.__set__(obj, before)


# --------------------------------------------------------------------------------------------------------------
# Caches


def forget_cached(is_foreign: IsForeign) -> None:
    """Takes what a trace made out of each `functools.lru_cache` of the process, installed code's too."""
    objects = gc.get_objects()
    # Without a loop in Python: there are millions of objects in a process that has compiled something.
    cached = map(operator.is_, map(type, objects), itertools.repeat(functools._lru_cache_wrapper))
    for function in itertools.compress(objects, cached):
        _forget_results(function, is_foreign)


def _forget_results(function: Any, is_foreign: IsForeign) -> None:
    """Takes single results out of a `functools.lru_cache`, and leaves the others, which cost somebody their time.

    There is no method for that. But the garbage collector knows what the function refers to: a cache of limited size
    has each key and its result, one after the other, and then comes the dictionary of results. Such a cache allows for
    a key that is gone from the dictionary, because another thread may have taken it out, so that it may be done here.
    """
    referents = gc.get_referents(function)
    results = [value for value in referents if type(value) is dict and value is not vars(function)][-1:]
    for entries in results:
        for key, result in [*itertools.pairwise(referents), *entries.items()]:
            if result is not entries and any(holds(value, is_foreign, depth=2) for value in (key, result)):
                with contextlib.suppress(TypeError):  # not a key
                    entries.pop(key, None)


def is_cached(tensor: Tensor) -> bool:
    """Whether the tensor is a result that a `functools.lru_cache` keeps, which is the same at the next call."""
    return any(type(obj) is functools._lru_cache_wrapper for obj in gc.get_referrers(tensor))
