"""Nothing stale: what a model function can read is looked up at every call."""

from __future__ import annotations

import array
import ast
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import gc
import importlib
import inspect
import itertools
import os
import pathlib
import random
import re
import site
import sys
import threading
import time
import types
import uuid
import warnings
from collections.abc import Callable
from operator import attrgetter, itemgetter, methodcaller
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

import lrpfunc as lrp
from lrpfunc._capture.capture import capture
from lrpfunc._capture.environment import Environment
from lrpfunc._capture.identity import is_installed, is_own_class, is_own_module
from tests.cases import normal


class Info:
    count: int
    names: list[str]
    last: Any

    def __init__(self, **attributes: Any):
        vars(self).update(attributes)


class Slotted:
    __slots__ = ("number",)

    def __init__(self, number: int):
        self.number = number


class Mangled:
    __slots__ = ("__number",)

    def __init__(self, number: int):
        self.__number = number

    def read(self) -> int:
        return self.__number


class OneSlot:
    __slots__ = "number"


class Number(int):
    note: int


class Table(dict[str, int]):
    note: int


class Point(NamedTuple):
    x: int


class Color(enum.Enum):
    RED = 1
    GREEN = 2
    BLUE = 3
    GREY = 4


@dataclasses.dataclass(slots=True)
class SlottedData:
    number: int


@dataclasses.dataclass(frozen=True)
class Frozen:
    number: int


def noted(obj: Any, number: int) -> Any:
    obj.note = number
    return obj


def one_slot(k: int) -> OneSlot:
    obj = OneSlot()
    obj.number = k
    return obj


number = attrgetter("number")
stop = attrgetter("stop")

# How to make an object for a number, and how to read the number from it.
KINDS: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any]]] = {
    "slice": (lambda k: slice(0, k), stop),
    "range": (lambda k: range(0, k), stop),
    "empty range": (lambda k: range(k, k), stop),
    "complex": (lambda k: complex(k, 1), lambda c: c.real),
    "signed zero": (lambda k: -0.0 if k % 2 else 0.0, lambda z: 1 / torch.tensor(z).sign().copysign(torch.tensor(z))),
    "Decimal": (decimal.Decimal, float),
    "Decimal exponent": (lambda k: decimal.Decimal(f"1.{'0' * k}"), lambda d: d.as_tuple().exponent),
    "Fraction": (lambda k: fractions.Fraction(k, 7), float),
    "date": (lambda k: datetime.date(2000, 1, k), lambda d: d.day),
    "time": (lambda k: datetime.time(k), lambda t: t.hour),
    "datetime": (lambda k: datetime.datetime(2000, 1, k), lambda d: d.day),
    "timedelta": (datetime.timedelta, lambda d: d.days),
    "timezone": (lambda k: datetime.timezone(datetime.timedelta(hours=k)), lambda z: z.utcoffset(None).seconds),
    "UUID": (lambda k: uuid.UUID(int=k), lambda u: u.int),
    "Path": (lambda k: pathlib.Path(str(k)), lambda p: int(p.name)),
    "Pattern": (lambda k: re.compile(f"a{{{k}}}"), lambda p: p.match("a" * 99).end()),
    "itemgetter": (itemgetter, lambda g: g(range(99))),
    "attrgetter": (lambda k: attrgetter("real" if k % 2 else "imag"), lambda g: g(3 + 5j)),
    "methodcaller": (lambda k: methodcaller("__add__", k), lambda call: call(0)),
    "partial": (lambda k: functools.partial(max, k), lambda p: p(0)),
    "partial keyword": (lambda k: functools.partial(int, base=k + 10), lambda p: p("10")),
    "NumPy float": (np.float32, float),
    "NumPy double": (np.float64, float),
    "NumPy integer": (np.int16, int),
    "NumPy date": (lambda k: np.datetime64(k, "D"), lambda d: int(d.astype(int))),
    "NumPy dtype": (lambda k: np.dtype(f"S{k}"), lambda d: d.itemsize),
    "NumPy array": (lambda k: np.array([k]), lambda a: int(a[0])),
    "NumPy array of objects": (lambda k: np.array([Frozen(k)], dtype=object), lambda a: a[0].number),
    "NumPy generator": (np.random.default_rng, lambda g: g.bit_generator.state["state"]["state"] % 97),
    "named tuple": (Point, lambda p: p.x),
    "Signature": (
        lambda k: inspect.Signature([inspect.Parameter("a", inspect.Parameter.KEYWORD_ONLY, default=k)]),
        lambda s: s.parameters["a"].default,
    ),
    "syntax tree": (lambda k: ast.Constant(k), lambda node: node.value),
    "code": (lambda k: compile(str(k), "<test>", "eval"), eval),
    "method of a dict": (lambda k: {"a": k}.get, lambda get: get("a")),
    "method of a list": (lambda k: [*range(k), -1].index, lambda index: index(-1)),
    "method wrapper": (lambda k: k.__add__, lambda add: add(0)),
    "method": (lambda k: Mangled(k).read, lambda read: read()),
    "proxy": (lambda k: types.MappingProxyType({"a": k}), itemgetter("a")),
    "keys": (lambda k: {k: 1}.keys(), lambda v: next(iter(v))),
    "values": (lambda k: {1: k}.values(), lambda v: next(iter(v))),
    "items": (lambda k: {1: k}.items(), lambda v: next(iter(v))[1]),
    "cell": (types.CellType, lambda c: c.cell_contents),
    "set": (lambda k: {k}, lambda s: next(iter(s))),
    "deque": (lambda k: collections.deque([k]), itemgetter(0)),
    "bounded deque": (lambda k: collections.deque(maxlen=k), lambda d: d.maxlen),
    "default dict": (lambda k: collections.defaultdict(lambda: k), lambda d: d.default_factory()),
    "ordered dict": (lambda k: noted(collections.OrderedDict(), k), lambda d: d.note),
    "bytearray": (lambda k: bytearray([k]), itemgetter(0)),
    "memoryview": (lambda k: memoryview(bytes([k])), itemgetter(0)),
    "array": (lambda k: array.array("i", [k]), itemgetter(0)),
    "type of an array": (lambda k: array.array("bB"[k % 2], [0]), lambda a: ord(a.typecode)),
    "random numbers": (random.Random, lambda r: r.getstate()[1][0]),
    "exception": (ValueError, lambda error: error.args[0]),
    "slots": (Slotted, number),
    "slots of a dataclass": (SlottedData, number),
    "mangled slots": (Mangled, lambda obj: obj.read()),
    "slots in one string": (one_slot, number),
    "frozen": (Frozen, number),
    "namespace": (lambda k: types.SimpleNamespace(number=k), number),
    "subclass of int": (lambda k: noted(Number(1), k), lambda n: n.note),
    "subclass of dict": (lambda k: noted(Table(), k), lambda d: d.note),
    "enum": (lambda k: list(Color)[k % 4], lambda c: c.value),
    "static method": (lambda k: staticmethod(lambda: k), lambda s: s.__func__()),
    "attribute of a tensor": (lambda k: noted(torch.zeros(1), k), lambda t: t.note),
    "attribute of a function": (lambda k: noted(lambda: None, k), lambda f: f.note),
}
BY_VALUE = [name for name in KINDS if not name.startswith(("slots", "mangled", "Signature", "namespace", "method"))]
BY_VALUE = [name for name in BY_VALUE if name not in ("exception", "syntax tree", "attribute of a tensor")]


def closed_over(obj: Any, read: Any) -> Any:
    return lambda x: x * read(obj)


def default(obj: Any, read: Any) -> Any:
    return lambda x, obj=obj: x * read(obj)


def global_variable(obj: Any, read: Any) -> Any:
    space = {"obj": obj, "read": read}
    exec("def f(x):\n    return x * read(obj)", space)
    return space["f"]


class Attribute:
    def __init__(self, obj: Any, read: Any):
        self.obj, self.read = obj, read

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.read(self.obj)


WAYS: dict[str, Any] = {
    "closed over": closed_over,
    "default": default,
    "global": global_variable,
    "attribute": Attribute,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [*WAYS, "argument"])
def test_objects_made_anew_are_told_apart(kind: str, way: str) -> None:
    """Each object is gone when the next one is made, often in the same place."""
    make, read = KINDS[kind]
    known: dict[Any, Any] = {}
    for k in itertools.islice(itertools.cycle(range(1, 12)), 40):
        obj = make(k)
        key = Environment(read, obj).key if way == "argument" else Environment(WAYS[way](obj, read)).key
        value = read(obj)
        del obj
        assert known.setdefault(key, value) == value
    assert len(known) > 1


@pytest.mark.parametrize("kind", BY_VALUE)
def test_equal_values_are_recorded_once(kind: str) -> None:
    make, read = KINDS[kind]
    assert Environment(closed_over(make(3), read)).key == Environment(closed_over(make(3), read)).key


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_plain_functions(kind: str) -> None:
    make, read = KINDS[kind]
    ways = itertools.cycle([*WAYS.values(), None])
    x = normal(1, 3)
    for k, way in zip((1, 2, 4), itertools.islice(ways, list(KINDS).index(kind) % 5, None), strict=False):
        obj = make(k)
        if isinstance(obj, Tensor):
            way = closed_over  # what is an argument is an input, without attributes
        f = way(obj, read) if way else lambda x, obj: x * read(obj)
        arguments = (x,) if way else (x, obj)
        _, value = lrp.attribute_and_value(f, lrp.gradient(), argnums=0)(*arguments)
        assert torch.equal(value, f(*arguments))
        del obj, f, arguments


def test_slices_made_anew_in_a_loop() -> None:
    x = normal(1, 4)
    for k in [1, 2, 3, 4] * 5:
        part = slice(0, k)
        fn = lrp.attribute(lambda x, part=part: x[:, part].sum(-1), lrp.gradient(), argnums=0)
        del part
        assert fn(x).count_nonzero() == k


def test_picking_an_output_in_a_loop() -> None:
    class Heads(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x, 2 * x, 3 * x

    module = Heads()
    for k in [0, 1, 2] * 4:
        model_fn, params = lrp.from_module(module, output=itemgetter(k))
        assert torch.equal(lrp.attribute(model_fn, lrp.gradient())(params, normal(1, 2)), (k + 1) * torch.ones(1, 2))


def test_what_cannot_be_seen_is_never_equal() -> None:
    for hidden in ((i for i in [1]), iter([1]), itertools.count(), torch.zeros(1).untyped_storage(), map(abs, [1])):
        environment = Environment(lambda x, hidden=hidden: x)
        assert environment.unknown == [f"<lambda>[0] ({type(hidden).__name__})"]
        assert environment.key != Environment(lambda x, hidden=hidden: x).key


def test_objects_without_references_live_as_long_as_the_key() -> None:
    class Watched:
        __slots__ = ("number", "tensor")

        def __del__(self) -> None:
            gone.append(1)

    gone: list[int] = []
    obj = Watched()
    key = Environment(obj).key
    del obj
    assert not gone
    del key
    gc.collect()
    assert gone


def test_order_and_aliases_are_part_of_the_key() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    assert Environment([a, a]).key != Environment([a, b]).key
    first, second = Environment({8, 16}), Environment({16, 8})
    assert (first.key == second.key) is ([*{8, 16}] == [*{16, 8}])


def test_methods_of_tuples_and_metaclasses_are_read() -> None:
    scale = 2.0

    class Scaled(NamedTuple):
        x: float

        def get(self) -> float:
            return self.x * scale

    class Meta(type):
        @property
        def doubled(cls) -> float:
            return 2 * scale

    class Cls(metaclass=Meta):
        pass

    pair = Scaled(1.0)
    functions = [lambda x: x * pair.get(), lambda x: x * Cls.doubled]
    before = [Environment(f).key for f in functions]
    taking = [lrp.attribute(lambda x, pair: x * pair.get(), lrp.gradient(), argnums=0)(torch.ones(1), pair)]
    scale = 3.0
    taking += [lrp.attribute(lambda x, pair: x * pair.get(), lrp.gradient(), argnums=0)(torch.ones(1), pair)]
    assert all(old != Environment(f).key for old, f in zip(before, functions, strict=True))
    assert [t.item() for t in taking] == [2.0, 3.0]


def test_tensors_in_arguments_of_other_types_are_read_anew() -> None:
    state = types.SimpleNamespace(scale=torch.tensor(2.0), shift=None)
    fn = lrp.attribute(lambda x, state: x * state.scale, lrp.gradient(), argnums=0)
    x = torch.ones(1)
    assert fn(x, state).item() == 2
    state.scale.fill_(3.0)
    assert fn(x, state).item() == 3
    state.scale = torch.tensor(5.0)
    assert fn(x, state).item() == 5


def test_what_a_pytree_keeps_beside_its_leaves_is_read() -> None:
    @dataclasses.dataclass
    class Batch:
        x: Tensor
        config: Any

    torch.export.register_dataclass(Batch)
    config = types.SimpleNamespace(scale=2.0)

    class Context:
        def __init__(self, x: Any, config: Any):
            self.x, self.config = x, config

    register_pytree_node(
        Context,
        lambda c: ([c.x], c.config),
        lambda xs, config: Context(next(iter(xs)), config),
        serialized_type_name="test.Context",
    )
    for kind in (Batch, Context):
        given = kind(torch.ones(1), config)
        fn = lrp.attribute_and_value(lambda x, b: x * b.x * b.config.scale, lrp.gradient(), argnums=0)
        for scale in (2.0, 3.0):
            config.scale = scale
            assert fn(torch.ones(1), given)[1].item() == scale


# --------------------------------------------------------------------------------------------------------------
# The user's own modules


def test_the_users_own_code_is_not_installed(tmp_path: pathlib.Path) -> None:
    package = os.path.dirname(lrp.__file__)
    torch_folder = os.path.dirname(torch.__file__)
    assert is_installed(os.path.join(package, "composites.py"))
    assert is_installed(os.path.join(torch_folder, "functional.py"))
    assert is_installed(os.path.join(site.getsitepackages()[0], "anything", "code.py"))
    assert is_installed(os.__file__)
    assert is_installed("<frozen importlib._bootstrap>")
    own = [
        package + "_study.py",
        os.path.join(package + "_experiments", "code.py"),
        os.path.join(site.getsitepackages()[0] + "_mine", "code.py"),
        str(tmp_path / "my-site-packages-study" / "code.py"),
        str(tmp_path / "site-packages" / "project" / "code.py"),
        "<string>",
        "<ipython-input-1>",
    ]
    assert not any(map(is_installed, own))
    assert not is_own_module(torch.ops)
    assert not is_own_module(torch._C)
    assert not is_own_module(sys)
    assert is_own_module(types.ModuleType("cfg"))
    assert is_own_module(sys.modules[__name__])
    space: dict[str, Any] = {}
    exec("class Made:\n    pass", space)
    assert is_own_class(space["Made"])
    assert not is_own_class(nn.Module)


@pytest.fixture
def project(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Writes modules of the user's own, and gives the model function of the last of them."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(model: str, **modules: str) -> Any:
        for name, source in {**modules, "own_model": model}.items():
            (tmp_path / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return importlib.import_module("own_model").model

    return write


READING = {
    "import inside": "def model(x):\n    import own_cfg\n    return x * own_cfg.SCALE",
    "import as inside": "def model(x):\n    import own_cfg as cfg\n    return x * cfg.SCALE",
    "from import inside": "def model(x):\n    from own_cfg import SCALE\n    return x * SCALE",
    "nested": "def model(x):\n    def f():\n        import own_cfg\n        return own_cfg.SCALE\n    return x * f()",
    "global": "import own_cfg\ndef model(x):\n    return x * own_cfg.SCALE",
    "getattr": "import own_cfg\ndef model(x):\n    return x * getattr(own_cfg, 'SCALE')",
    "computed": "import own_cfg\ndef model(x):\n    return x * getattr(own_cfg, 'SC' + 'ALE')",
    "vars": "import own_cfg\ndef model(x):\n    return x * vars(own_cfg)['SCALE']",
    "dict": "import own_cfg\ndef model(x):\n    return x * own_cfg.__dict__['SCALE']",
    "attrgetter": "import own_cfg, operator\ndef model(x):\n    return x * operator.attrgetter('SCALE')(own_cfg)",
    "globals": "from own_cfg import *\ndef model(x):\n    return x * globals()['SCALE']",
    "eval": "from own_cfg import *\ndef model(x):\n    return x * eval('SCALE')",
    "helper": "import own_cfg\ndef helper(m):\n    return m.SCALE\ndef model(x):\n    return x * helper(own_cfg)",
    "function of a module": "import own_cfg\ndef model(x):\n    return x * own_cfg.scale()",
    "module of a module": "import own_user\ndef model(x):\n    return x * own_user.own_cfg.SCALE",
    "module attribute": "import own_cfg\ndef model(x):\n    return x * own_cfg.MISSING",
    "default": "import own_cfg\ndef model(x, m=own_cfg):\n    return x * m.SCALE",
}


@pytest.mark.parametrize("case", READING)
def test_modules_of_the_users_own_are_read(project: Any, case: str) -> None:
    source = "SCALE = 2.0\ndef scale():\n    return SCALE\n"
    if case == "module attribute":
        source += "def __getattr__(name):\n    return SCALE"
    model = project(READING[case], own_cfg=source, own_user="import own_cfg")
    cfg, x = importlib.import_module("own_cfg"), torch.ones(1)
    fn = lrp.attribute(model, lrp.gradient(), argnums=0)
    space = model.__globals__ if case in ("globals", "eval") else vars(cfg)
    assert [fn(x).item(), fn(x).item()] == [2.0, 2.0]
    space["SCALE"] = 3.0
    assert fn(x).item() == model(x).item() == 3.0
    space["SCALE"] = torch.tensor(5.0)
    assert fn(x).item() == 5.0
    space["SCALE"].fill_(7.0)
    assert fn(x).item() == 7.0


def test_packages_and_relative_imports_are_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_package").mkdir()  # without an `__init__`
    (tmp_path / "own_package" / "cfg.py").write_text("SCALE = 2.0")
    source = "def model(x):\n    from . import cfg\n    from .cfg import SCALE\n    return x * cfg.SCALE * SCALE"
    (tmp_path / "own_package" / "part.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("own_package.part").model
    fn, x = lrp.attribute(model, lrp.gradient(), argnums=0), torch.ones(1)
    assert fn(x).item() == 4
    vars(importlib.import_module("own_package.cfg"))["SCALE"] = 3.0
    assert fn(x).item() == 9


def test_a_module_as_an_argument_is_read() -> None:
    cfg: Any = types.ModuleType("cfg")
    cfg.SCALE = 2.0
    fn = lrp.attribute(lambda x, m: x * m.SCALE, lrp.gradient(), argnums=0)
    assert fn(torch.ones(1), cfg).item() == 2
    cfg.SCALE = 3.0
    assert fn(torch.ones(1), cfg).item() == 3


def test_views_and_proxies_are_read() -> None:
    table = {"a": 2.0}
    proxy, values = types.MappingProxyType(table), table.values()
    fn = lrp.attribute(lambda x: x * proxy["a"] * sum(values), lrp.gradient(), argnums=0)
    assert fn(torch.ones(1)).item() == 4
    table["a"] = 3.0
    assert fn(torch.ones(1)).item() == 9


# --------------------------------------------------------------------------------------------------------------
# clear_cache


def test_clear_cache_forgets_what_was_recorded(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "scale"
    file.write_text("2")
    fn = lrp.attribute(lambda x: x * float(file.read_text()), lrp.gradient(), argnums=0)
    assert fn(torch.ones(1)).item() == 2
    file.write_text("3")
    assert fn(torch.ones(1)).item() == 2
    lrp.clear_cache()
    assert fn(torch.ones(1)).item() == 3


def appears(file: pathlib.Path) -> bool:
    """Waits for a file. Threads speak through files here, because a model function's files are not looked up."""
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return file.exists()


def test_clear_cache_beside_a_recording(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "scale"
    file.write_text("2")

    def model(x: Tensor) -> Tensor:
        scale = float(file.read_text())
        (tmp_path / "read").touch()
        appears(tmp_path / "cleared")
        return x * scale

    fn = lrp.attribute(model, lrp.gradient(), argnums=0)
    answers: list[float] = []
    thread = threading.Thread(target=lambda: answers.append(fn(torch.ones(1)).item()))
    thread.start()
    assert appears(tmp_path / "read")
    file.write_text("3")
    lrp.clear_cache()
    (tmp_path / "cleared").touch()
    thread.join()
    assert answers == [2.0]  # it had begun before
    assert fn(torch.ones(1)).item() == 3


# --------------------------------------------------------------------------------------------------------------
# Functions that change what they read


def values(model_fn: Any, count: int = 4) -> list[float]:
    return [lrp.attribute_and_value(model_fn, lrp.gradient(), argnums=0)(torch.ones(1))[1].item() for _ in range(count)]


def test_a_function_that_counts_is_named_once() -> None:
    calls, log = 0, []

    def counts(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x * calls

    with pytest.warns(
        lrp.CaptureWarning, match=r"(?s)counts\) is recorded anew.*changes `calls`.*has_aux=True"
    ) as found:
        assert values(counts) == [1, 2, 3, 4]
    assert len(found) == 1
    assert found[0].filename == __file__
    with pytest.warns(lrp.CaptureWarning, match="changes `log`") as found:
        values(lambda x: (log.append(1.0), x * len(log))[1])
    assert len(found) == 1


def test_a_hook_that_counts_is_named_once() -> None:
    module, calls = nn.Sequential(nn.Linear(1, 1), nn.ReLU()), Info(count=0)
    module[0].register_forward_hook(lambda *_: setattr(calls, "count", calls.count + 1))
    model_fn, params = lrp.from_module(module)
    with pytest.warns(lrp.CaptureWarning, match=r"\(Sequential\) is recorded anew.*changes `calls.count`") as found:
        [lrp.attribute(model_fn, lrp.epsilon())(params, torch.ones(1, 1)) for _ in range(4)]
    assert len(found) == 1


def test_a_function_that_alternates_goes_on() -> None:
    state = {"flag": 0}

    def alternates(x: Tensor) -> Tensor:
        state["flag"] = 1 - state["flag"]
        return x * state["flag"]

    with pytest.warns(lrp.CaptureWarning, match="changes `state.flag`"):
        assert values(alternates, 6) == [1, 0, 1, 0, 1, 0]


def test_what_changes_once_is_no_reason_to_warn() -> None:
    state: dict[str, Any] = {}
    recorded: list[float] = []

    def lazy(x: Tensor) -> Tensor:
        recorded.append(1.0) if not recorded else None
        state.setdefault("scale", 2.0)
        return x * state["scale"]

    assert values(lazy) == [2.0] * 4


def test_what_cannot_be_seen_is_named_once() -> None:
    scales = iter([2.0, 3.0, 5.0, 7.0])
    with pytest.warns(lrp.CaptureWarning, match=r"can read `scales \(list_iterator\)`") as found:
        assert values(lambda x: x * next(scales)) == [2.0, 3.0, 5.0, 7.0]
    assert len(found) == 1


def test_what_another_thread_changes_during_a_recording_is_not_taken_for_what_was_there(tmp_path: pathlib.Path) -> None:
    state = types.SimpleNamespace(scale=2.0)

    def model(x: Tensor) -> Tensor:
        (tmp_path / "begun").touch()
        appears(tmp_path / "changed")
        return x * state.scale

    def change() -> None:
        appears(tmp_path / "begun")
        state.scale = 3.0
        (tmp_path / "changed").touch()

    thread = threading.Thread(target=change)
    thread.start()
    fn = lrp.attribute(model, lrp.gradient(), argnums=0)
    assert fn(torch.ones(1)).item() == 3
    thread.join()
    state.scale = 2.0
    assert fn(torch.ones(1)).item() == 2


def test_a_program_is_found_again() -> None:
    scale = torch.tensor(2.0)
    f = lambda x: x * scale  # noqa: E731
    with warnings.catch_warnings():
        programs = [capture(f, (torch.ones(1),), {}, has_aux=False, inline=False)[0] for _ in range(2)]
    assert programs[0] is programs[1]
