"""What a trace leaves in memory is taken back, and what a model function returns beside tensors is its own."""

from __future__ import annotations

import collections
import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import register_pytree_node

import lrpfunc as lrp
from lrpfunc._capture import memory


class Info:
    count: int
    names: list[str]
    last: Any

    def __init__(self, **attributes: Any):
        vars(self).update(attributes)


# --------------------------------------------------------------------------------------------------------------
# What a trace leaves, and what others write meanwhile


def test_what_a_trace_leaves_is_taken_back_everywhere() -> None:
    class Holder:
        shared: Any = None

        def __init__(self) -> None:
            self.last: Any = None

    class Thin:
        __slots__ = ("last",)

    holder, thin, kept = Holder(), Thin(), torch.zeros(1)
    listed, unique, bounded = [kept], {kept}, collections.deque([1.0, 2.0], maxlen=2)
    table: dict[Any, Any] = {"old": kept}
    late: Any

    def model(x: Tensor) -> Tensor:
        nonlocal late
        global stored
        late = stored = x * 2
        holder.last = Holder.shared = thin.last = x * 3
        holder.more = types.SimpleNamespace(inside=[x * 4])  # type: ignore[attr-defined]
        listed.insert(0, x * 5)
        listed.append((x * 6, "pair"))  # type: ignore[arg-type]
        unique.add(x * 7)
        bounded.append(x * 8)  # type: ignore[arg-type]
        table.update(old=x * 9, new=lambda y=x: y)
        table[x] = "key"
        vmap(lambda row: (listed.append(row * 2), row)[1])(x[None])  # type: ignore[func-returns-value]
        return x * 10

    def arguments(x: Tensor, given: Any) -> Tensor:
        given.last = x
        return x

    given = types.SimpleNamespace(last=None)
    for fn, extra in ((model, ()), (arguments, (given,))):
        lrp.attribute(fn, lrp.gradient(), argnums=0)(torch.ones(1), *extra)
    assert "stored" not in globals()
    assert model.__closure__ is not None
    assert holder.last is Holder.shared is None
    assert "more" not in vars(holder)
    assert not hasattr(thin, "last")
    assert listed == [kept]
    assert unique == {kept}
    assert list(bounded) == [1.0, 2.0]
    assert table == {"old": kept}
    assert given.last is None
    with pytest.raises(NameError, match="late"):
        late  # noqa: B018  # pyright: ignore


def test_what_another_thread_writes_meanwhile_stays() -> None:
    table: dict[Any, Any] = {"before": 1.0}
    listed: list[Any] = ["before"]
    runs = []

    @functools.lru_cache
    def cached(n: int) -> Tensor:
        runs.append(n)
        return torch.full((1,), float(n))

    @functools.cache
    def unlimited(n: int) -> Tensor:
        runs.append(-n)
        return torch.full((1,), float(n))

    begun, written = threading.Event(), threading.Event()

    def other() -> None:
        begun.wait(10)
        table["other"] = 2.0
        listed.append("other")
        for function in (cached, unlimited):
            function(1)
        written.set()

    def model(x: Tensor) -> Tensor:
        table["mine"] = x * 2
        listed.append(x * 3)
        begun.set()
        written.wait(10)
        listed.append(x * 4)
        return x * cached(2) * unlimited(3)

    thread = threading.Thread(target=other)
    thread.start()
    assert lrp.attribute(model, lrp.gradient(), argnums=0)(torch.ones(1)).item() == 6
    thread.join()
    assert table == {"before": 1.0, "other": 2.0}
    assert listed == ["before", "other"]
    runs.clear()
    assert [cached(1).item(), unlimited(1).item()] == [1.0, 1.0]
    assert runs == []  # they were not forgotten
    assert [cached(2).item(), unlimited(3).item()] == [2.0, 3.0]
    assert runs == [2, -3]  # what the trace put there was


def test_containers_are_never_empty_for_a_moment() -> None:
    table = dict.fromkeys(range(100), 0.0)
    stop, missed = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            if len(table) < 100:
                missed.append(len(table))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for scale in range(5):

            def model(x: Tensor, scale: int = scale) -> Tensor:
                table["mine"] = x  # type: ignore[index,assignment]
                return x * scale

            lrp.attribute(model, lrp.gradient(), argnums=0)(torch.ones(1))
    finally:
        stop.set()
        thread.join()
    assert not missed
    assert len(table) == 100


def test_caches_of_others_are_left_alone() -> None:
    """Also those that hold tensors without numbers, of somebody else's trace."""
    mode = torch._subclasses.FakeTensorMode()

    @functools.lru_cache
    def theirs(n: int) -> Tensor:
        with mode:
            return torch.zeros(n)

    first = theirs(3)
    leaked: list[Any] = []

    class Leaky:
        def __call__(self, x: Tensor) -> Tensor:
            leaked.append(weakref.ref(x))
            memory.KEPT = x * 2  # type: ignore[attr-defined]  # so that a trace searches
            return x

    try:
        lrp.attribute(Leaky(), lrp.gradient(), argnums=0)(torch.ones(1))
    finally:
        del memory.KEPT  # type: ignore[attr-defined]
    assert theirs(3) is first


def test_single_results_leave_a_cache() -> None:
    for cache in (functools.lru_cache(2), functools.lru_cache(None), functools.lru_cache(64, typed=True)):
        runs: list[Any] = []

        @cache
        def f(*args: Any, **kwargs: Any) -> Any:
            runs.append(args)  # noqa: B023
            return [object(), *args]

        for _ in range(3):
            _ = f("foreign"), f("own")
            memory._forget_results(f, lambda value: value == "foreign")
        assert runs == [("foreign",), ("own",), ("foreign",), ("foreign",)]
        for k in range(100):  # it stays sound
            _ = f(k % 3), f("foreign")
            memory._forget_results(f, lambda value: value == "foreign")
        assert f(0)[1] == 0


# --------------------------------------------------------------------------------------------------------------
# What is returned beside tensors


def auxiliary(make: Callable[..., Any], *extra: Any) -> Any:
    fn = lrp.attribute(lambda x, *extra: (x * 2, make(x, *extra)), lrp.gradient(), argnums=0, has_aux=True)
    return lambda: fn(torch.ones(2), *extra)[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Info(hidden=x * 2),
        lambda x: {"info": Info(deep=[{"hidden": (x * 2,)}])},
        lambda x: {x * 2},
        lambda x: functools.partial(torch.add, x * 2),
        lambda x: lambda: x,
        lambda x: Info(real=torch.zeros(1)),
        lambda x: Info(batched=vmap(lambda row: row)(x)),
    ],
)
def test_tensors_in_unknown_objects_are_refused(make: Any) -> None:
    with pytest.raises(lrp.CaptureError, match=r"(?s)with a tensor inside.*Return the tensors in a tuple"):
        auxiliary(make)()


@pytest.mark.parametrize("make", [lambda x: iter([1]), lambda x: (i for i in [1]), lambda x: threading.Lock()])
def test_what_cannot_be_copied_is_refused(make: Any) -> None:
    with pytest.raises(lrp.CaptureError, match="cannot be copied"):
        auxiliary(make)()


@pytest.mark.parametrize(
    "make", [lambda x: Info(names=["a"]), lambda x: {"a"}, lambda x: np.zeros(2), lambda x: bytearray(2)]
)
def test_what_calls_could_change_is_copied(make: Any) -> None:
    call = auxiliary(make)
    first, second = call(), call()
    assert first is not second
    if isinstance(first, Info):
        first.names.append("b")
        assert second.names == call().names == ["a"]
    elif isinstance(first, set):
        first.add("b")
        assert second == call() == {"a"}
    else:
        first[0] = 1
        assert second[0] == call()[0] == 0


def test_containers_of_the_output_are_each_calls_own() -> None:
    call = auxiliary(lambda x: {"list": [1, "a"], "tensor": x})
    first = call()
    first["list"].append(2)
    assert call()["list"] == [1, "a"]


@pytest.mark.parametrize("value", [None, 3, 2.5, "a", b"a", (1, 2), torch.float64, Info, len, slice(1, 2)])
def test_plain_values_come_back(value: Any) -> None:
    call = auxiliary(lambda x: (value, x))
    assert call()[0] == call()[0] == value


def test_objects_of_the_users_own_come_back_themselves() -> None:
    own = Info(names=["a"], tensor=torch.ones(1))
    assert auxiliary(lambda x: own)() is own
    assert auxiliary(lambda x, given: given, own)() is own

    def writes(x: Tensor) -> Any:
        own.last = x
        return own

    with pytest.raises(lrp.CaptureError, match="with a tensor inside"):
        auxiliary(writes)()


def test_what_a_pytree_keeps_beside_its_leaves_is_each_calls_own() -> None:
    class Labelled:
        def __init__(self, x: Any, labels: Any):
            self.x, self.labels = x, labels

    register_pytree_node(
        Labelled,
        lambda c: ([c.x], c.labels),
        lambda xs, labels: Labelled(next(iter(xs)), labels),
        serialized_type_name="test.Labelled",
    )
    call = auxiliary(lambda x: Labelled(x, Info(names=["a"])))
    call().labels.names.append("b")
    assert call().labels.names == ["a"]
    with pytest.raises(lrp.CaptureError, match="with a tensor inside"):
        auxiliary(lambda x: Labelled(x, Info(hidden=x)))()
