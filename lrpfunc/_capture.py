"""From a model function to a graph of whole operations, cached for as long as it is true."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointFunction

from lrpfunc._environment import Environment, describe_tensor, forget_cached, is_cached, is_custom_function
from lrpfunc._errors import CaptureError, RuleError, opaque
from lrpfunc._record import Recorder, recording
from lrpfunc._torch import grad_level, inside_transform

T = TypeVar("T")


@dataclass(eq=False)
class Trace:
    """What one run of the model function on fake tensors left behind.

    Attributes:
        module: The traced operations; the placeholders are the tick, the environment's tensors and the arguments.
        outputs: How to rebuild the output from the first graph outputs: the leaves (`None` for a tensor) and the spec.
        aux: The same for the auxiliary output.
        events: Where modules begin and end, as the recorder saw it, with `True` for each marker; the markers are the
            last graph outputs.
        closed: How many placeholders stand for tensors of the environment.
        constants: Tensors that are no inputs, by the name they are read by: made by the function, mostly.
        stable: Whether the trace may be used again.
    """

    module: fx.GraphModule
    outputs: tuple[list[Any], Any]
    aux: tuple[list[Any], Any]
    events: list[tuple[str, str, list[bool], Any]]
    closed: int
    constants: dict[str, Tensor]
    stable: bool
    after_dispatch: bool

    @property
    def markers(self) -> int:
        """How many of the graph outputs are markers."""
        return sum(sum(marked) for _, _, marked, _ in self.events)


# --------------------------------------------------------------------------------------------------------------
# Isolation

# NOTE: [one capture at a time] torch keeps the stack of modes that trace before dispatch per process, not per thread.
_lock = threading.Lock()
_inside = threading.local()


def is_capturing() -> bool:
    """Whether this code is part of what is being captured."""
    return getattr(_inside, "capture", False)


def _refuse_nested() -> None:
    if is_capturing():
        raise CaptureError(
            "the model function itself calls an lrpfunc transform that has not seen these shapes yet, and one capture "
            "cannot run inside another. Call the inner transform once with inputs of the same shapes first"
        )


def isolated(fn: Callable[[], T]) -> T:
    """Runs `fn` in a fresh thread, which has none of the caller's transform levels, modes or compile state."""
    result: list[T] = []
    failure: list[BaseException] = []
    autocast = [
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    ]
    device = torch.get_default_device()
    # What really runs, such as what `bind` prepares, must come after what the caller has begun.
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def run() -> None:
        _inside.capture = True
        try:
            with contextlib.ExitStack() as stack:
                # A function that contains a torch.compile'd one would wait for a lock its caller holds.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(torch._dynamo.config.patch(error_on_nested_fx_trace=False))
                if device != torch.device("cpu"):
                    stack.enter_context(device)
                if stream is not None:
                    stack.enter_context(torch.cuda.stream(stream))
                for kind, dtype in autocast:
                    stack.enter_context(torch.autocast(kind, dtype=dtype))
                result.append(fn())
        except BaseException as error:
            failure.append(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,), name="lrpfunc-capture")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


# --------------------------------------------------------------------------------------------------------------
# Tracing


_DATA: Any = torch.Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]


_PACKED = (
    "the model function packs sequences (pack_padded_sequence or pack_sequence), and what a recurrent network does "
    "with those depends on the numbers in their lengths, which a trace does not see. Give it the padded batch, and "
    "read each sequence where it ends; padding comes after that and changes nothing:\n\n"
    "    states, _ = rnn(x)  # batch_first=True\n"
    "    last = states[torch.arange(len(x)), lengths - 1]\n\n"
    "A bidirectional network reads the padding first: explain sequences of one length at a time, without packing"
)

_REENTRANT = (
    "the model function uses torch.utils.checkpoint in its reentrant form, which runs without gradients, so that no "
    "relevance could pass: write checkpoint(..., use_reentrant=False)"
)


_GATED = (
    "the model function has an LSTM or a GRU and a transform of its own (vmap, grad, jvp, ...). What can be recorded "
    "inside a transform is the arithmetic of the gates alone, which does not say what is gated. Write what the "
    "transform does as operations on a batch, or take it outside:\n\n"
    "    torch.vmap(relevance_fn)(...)  # not attribute(a model_fn that calls vmap)"
)


class _BeginsTransform(BaseException):
    """The model function has a transform of its own, whose levels a trace before dispatch does not see."""


class _Watch(TorchFunctionMode):
    """Sees what a trace cannot show, and keeps it away from real tensors.

    A tensor the function closes over is replaced, wherever an operation reads it, by an input of the trace. Without
    that an operation on such tensors alone would really run, and change them if it works in place.

    Args:
        inputs: The inputs of the trace, by the identity of the tensors that they replace.
        made: What operations returned. What is alive of it after the trace, something remembers.
        before_dispatch: How a model function is traced; `None` for a walk.

    Attributes:
        reads: Whether a number inside a tensor became part of the program.
        no_grad: Whether something was computed without gradients.
        has_transforms: Whether the function has transforms of its own.
    """

    _RECURRENT = ("lstm", "gru", "lstm_cell", "gru_cell")

    _READS = (
        *("item", "tolist", "numpy", "__array__", "__float__", "__int__", "__bool__", "__index__", "__complex__"),
        *("__repr__", "__str__", "__format__", "__contains__"),
    )

    def __init__(
        self, inputs: dict[int, Tensor], made: list[weakref.ref[Tensor]], before_dispatch: bool | None = None
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.made = made
        self.before_dispatch = before_dispatch
        self._grad_modes: dict[int, bool] = {}
        self.has_transforms = False
        self.reads = False
        self.no_grad = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.has_transforms |= inside_transform()
        if self.has_transforms and self.before_dispatch:
            raise _BeginsTransform
        if func is torch._C._set_grad_enabled and args[0] is False:
            self.no_grad = True
            if _is_called_by(CheckpointFunction.forward):
                raise CaptureError(_REENTRANT)
        if func is torch._C._set_grad_enabled and self.before_dispatch is False:
            self._mark_grad_mode(args[0])
        name = getattr(func, "__name__", "")
        if name.partition(".")[0] in self._RECURRENT and self.before_dispatch is False:
            raise CaptureError(_GATED)
        if name == "_pack_padded_sequence":
            raise CaptureError(_PACKED)
        if name in self._READS and not isinstance(args[0], FakeTensor):
            self.reads = True  # the program must not be used again
            with _disable_current_modes():
                return func(*args, **(kwargs or {}))
        if func == _DATA:  # a trace does not see `.data`
            result = self._replaced(args[0]).detach()
        else:
            result = func(*self._replaced(args), **self._replaced(kwargs or {}))
        self.made += (weakref.ref(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _mark_grad_mode(self, enabled: bool) -> None:
        """Writes into the trace what one before dispatch has by itself: whether what follows has derivatives.

        It has those outside of all transforms of the function only if they are enabled on every level.
        """
        level = grad_level()
        self._grad_modes = {k: mode for k, mode in self._grad_modes.items() if k < level} | {level: enabled}
        mode: Any = get_proxy_mode()
        mode.tracer.create_node("call_function", torch._C._set_grad_enabled, (all(self._grad_modes.values()),), {})

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.inputs.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(map(self._replaced, value))
        if type(value) is dict:
            return {key: self._replaced(item) for key, item in value.items()}
        return value


_Traced = tuple[fx.GraphModule, list[Any], dict[str, Any], _Watch]


def _fake(tensor_keys: Sequence[Any], mode: FakeTensorMode) -> list[Tensor]:
    with mode:
        return [
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for shape, strides, dtype, device in tensor_keys
        ]


def _is_called_by(function: Any) -> bool:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


def _custom_functions() -> dict[types.CodeType, str]:
    """The code of every custom `autograd.Function` that there is, and the names of the classes."""
    found: dict[types.CodeType, str] = {}
    pending: list[Any] = [torch.autograd.Function]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if not is_custom_function(cls):  # torch's own have nothing to lose
            continue
        for name in ("forward", "setup_context"):
            method = inspect.unwrap(getattr(cls, name))
            if method is not getattr(torch.autograd.Function, name) and hasattr(method, "__code__"):
                found[method.__code__] = cls.__qualname__
    return found


@contextlib.contextmanager
def _refusing(custom: dict[types.CodeType, str]) -> Iterator[None]:
    """Refuses a custom `autograd.Function`: a trace would inline its forward and lose its backward.

    No mode of torch's sees such a call before dispatch, but this thread's tracer does. It slows a trace down by half,
    so that it is there only where such a class is.
    """

    def see(frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code in custom:
            found.append(custom[frame.f_code])

    found: list[str] = []
    if not custom:
        yield
        return
    # A debugger or a coverage tool may have the cheaper of the two.
    install: Any = sys.settrace if sys.gettrace() is None else sys.setprofile
    previous = None if install is sys.settrace else sys.getprofile()
    install(see)
    try:
        yield
    finally:
        install(previous)
    if found:
        raise CaptureError(
            f"the model function uses the custom autograd.Function {found[0]}, whose backward a trace cannot keep: "
            "relevance would follow the operations of its forward instead. If that is what you want, say so:\n\n"
            "    lrpfunc.attribute(model_fn, rules, inline_functions=True)"
        )


def _trace(
    model_fn: Callable[..., Any],
    leaves: list[Any],
    spec: Any,
    has_aux: bool,
    custom: dict[types.CodeType, str],
    keys: Sequence[Any],
    closed: Sequence[Tensor],
    before_dispatch: bool,
    made: list[weakref.ref[Tensor]],
) -> _Traced:
    found: dict[str, Any] = {}

    def call(tensors: list[Tensor]) -> list[Any]:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(given) if leaf is None else leaf[0] for leaf in leaves], spec)
        output = model_fn(*args, **kwargs)
        aux = None
        if has_aux:
            if not (isinstance(output, tuple) and len(output) == 2):
                raise TypeError(
                    f"with has_aux=True the model function must return a pair (output, aux), not "
                    f"{'Tensor' if isinstance(output, Tensor) else type(output).__name__}"
                )
            output, aux = output
        flat: list[Any] = []
        for name, value in (("outputs", output), ("aux", aux)):
            values, value_spec = pytree.tree_flatten(value)
            found[name] = ([None if isinstance(v, Tensor) else (v,) for v in values], value_spec)
            flat.extend(v for v in values if isinstance(v, Tensor))
        return flat

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    scalar = ((), (), torch.float32, torch.device("cpu"))
    inputs = _fake([scalar, *map(describe_tensor, closed), *keys], mode)
    made.extend(map(weakref.ref, inputs))
    watches: list[_Watch] = []
    recorders: list[Recorder] = []

    def marked(tick: Tensor, *tensors: Tensor) -> list[Tensor]:
        fakes = {id(real): fake for real, fake in zip(closed, tensors, strict=False)}
        watch = _Watch(fakes, made, before_dispatch)
        recorder = Recorder(tick)
        watches.append(watch)
        recorders.append(recorder)
        with recording(recorder), watch, _refusing(custom):
            outputs = [watch._replaced(output) for output in call(list(tensors[len(closed) :]))]
        return [*outputs, *recorder.markers]

    # `decomposition_table={}`: without it torch 2.15 turns `detach` into `alias`, which stops nothing.
    options: dict[str, Any] = {"pre_dispatch": True} if before_dispatch else {"decomposition_table": {}}
    module = make_fx(marked, tracing_mode="fake", _allow_non_fake_inputs=True, **options)(*inputs)
    return module, recorders[-1].handed_over(), found, watches[-1]


def _explain_failure(error: Exception) -> CaptureError:
    first_line, *_ = [*str(error).splitlines(), ""]
    return CaptureError(
        f"the model function could not be traced: {type(error).__name__}: {first_line}\n"
        "The usual reason is Python control flow that depends on the numbers inside a tensor (`if x.sum() > 0:`, "
        "`int(mask.sum())`). Write it with torch.where or a mask, or pass the number as a Python argument"
    )


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


_VALUE_DEPENDENT = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException")


def _capture(
    model_fn: Callable[..., Any], leaves: list[Any], spec: Any, has_aux: bool, inline: bool, closed: list[Tensor]
) -> Trace:
    environment = Environment(model_fn, remember=True)
    keys = [describe_tensor(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    static = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
    made: list[weakref.ref[Tensor]] = []

    def trace(before_dispatch: bool, again: bool = False) -> _Traced | None:
        custom = {} if inline else _custom_functions()

        def attempt() -> _Traced | None:
            try:
                traced = _trace(model_fn, static, spec, has_aux, custom, keys, closed, before_dispatch, made)
            except _BeginsTransform:
                return None  # the exception would keep what the trace has made
            return None if before_dispatch and traced[-1].has_transforms else traced

        try:
            result = isolated(attempt)
        except Exception as error:
            if type(error).__name__ in _VALUE_DEPENDENT:
                raise _explain_failure(error) from error
            raise
        finally:
            environment.forget(_is_fake)
            if any(tensor() is not None for tensor in made):
                forget_cached(_is_fake)
        if not (inline or again or _custom_functions().keys() <= custom.keys()):
            return trace(before_dispatch, again=True)  # the model function defines such a class when it is called
        return result

    before = trace(before_dispatch=True)
    module, events, found, watch = before or cast(_Traced, trace(before_dispatch=False))
    constants = [node for node in module.graph.nodes if node.op == "get_attr"]
    # A constant that the function made is copied at once; any other one may be a tensor that was missed.
    values = {node.target: getattr(module, node.target) for node in constants}
    own = all(
        all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)
        or is_cached(values[node.target])
        for node in constants
    )
    if any(map(_is_fake, values.values())):
        raise CaptureError(
            "the model function makes a tensor in a way a trace cannot follow, such as torch.autograd.grad, `.data` "
            "or `set_`. Write torch.func.grad, or detach()"
        )
    stable = own and not watch.reads
    return Trace(module, found["outputs"], found["aux"], events, len(closed), values, stable, before is None)


def retrace(
    walk: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    tensors: Sequence[Tensor],
    start: Sequence[Tensor],
    rules: Any,
) -> tuple[fx.GraphModule, bool]:
    """A function of tensors as plain operations, which have all the derivatives that it has.

    It may use torch.func and read the tensors in `rules`, which are the last inputs of the result. Operations are
    recorded after dispatch: a trace before it does not see the levels of transforms.

    Returns:
        The operations, and whether they may be used again: not if a number inside a tensor became part of them.
    """
    watches: list[_Watch] = []
    environment = Environment(rules, transformed=True, remember=True)

    def trace() -> fx.GraphModule:
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        # Each is a tensor of its own: a trace takes what is the same object for the same value.
        fakes = [_fake(list(map(describe_tensor, group)), mode) for group in (tensors, start, environment.tensors)]

        def watched(tensors: list[Tensor], start: list[Tensor], lifted: list[Tensor]) -> list[Tensor]:
            watch = _Watch({id(real): fake for real, fake in zip(environment.tensors, lifted, strict=True)}, [])
            watches.append(watch)
            with watch:
                return walk(tensors, start)

        functional: Any = torch.func.functionalize(watched, remove="mutations")
        with mode:
            return make_fx(functional, _allow_non_fake_inputs=True, decomposition_table={})(*fakes)

    _refuse_nested()
    try:
        with _lock:
            module = isolated(trace)
    except Exception as error:
        if type(error).__name__ in _VALUE_DEPENDENT:
            raise RuleError(
                "a rule depends on the numbers inside a tensor (`if z.sum() > 0:`, `float(z)`), which are not known "
                "when the walk is traced. Write it with torch.where, or walk operation by operation:\n\n"
                "    lrpfunc.attribute(model_fn, rules, lowered=False)"
            ) from error
        if isinstance(error, RuntimeError) and ("custom_function_call" in str(error) or "autograd.F" in str(error)):
            raise opaque() from error
        raise
    finally:
        environment.forget(_is_fake)
    if watches[-1].no_grad:
        raise RuleError(
            "a rule computes under torch.no_grad(), which a trace does not keep: the derivatives of relevance would "
            "not stop there. Write x.detach(), or walk operation by operation:\n\n"
            "    lrpfunc.attribute(model_fn, rules, lowered=False)"
        )
    if written := [node.name for node in module.graph.nodes if _writes(node)]:
        raise RuleError(
            f"a rule changes in place a tensor that it was given ({written[0]}), such as the weights of the model. A "
            "function that is transformed must leave its arguments alone: for `weight.clamp_(min=0)`, write "
            "`weight = weight.clamp(min=0)`"
        )
    return module, not watches[-1].reads


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


# --------------------------------------------------------------------------------------------------------------
# The cache


class Cache(Generic[T]):
    """The least recently used entries go first; safe to share between threads."""

    def __init__(self, size: int):
        self._size = size
        self._entries: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Hashable, value: T) -> None:
        with self._lock:
            self._entries[key] = value
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)


def surroundings() -> Iterator[Hashable]:
    """What an operation depends on beside its arguments."""
    yield torch.get_default_dtype()
    yield torch.get_default_device()
    hooks = torch.nn.modules.module
    yield (*hooks._global_forward_hooks, *hooks._global_forward_pre_hooks)
    for device in ("cpu", "cuda"):
        yield torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)


def capture(
    model_fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    has_aux: bool,
    inline: bool,
    build: Callable[[Trace], T],
    cache: Cache[T],
) -> tuple[T, list[Tensor], list[Tensor]]:
    """The result of `build` on a trace of `model_fn(*args, **kwargs)`, from the cache if nothing has changed.

    Returns:
        What was built, the tensor leaves of the arguments and the tensors the function closes over.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    env = Environment(model_fn)
    statics = Environment(*(leaf for leaf in leaves if not isinstance(leaf, Tensor)))
    described = tuple(describe_tensor(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves)
    key = (env.key, statics.key, described, spec, has_aux, inline, *surroundings())
    built = cache.get(key)
    if built is None:
        _refuse_nested()
        with _lock:
            built = cache.get(key)  # another thread may have been first
            if built is None:
                trace = _capture(model_fn, leaves, spec, has_aux, inline, env.tensors)
                built = isolated(lambda: build(trace))
                if trace.stable:
                    cache.put(key, built)
    return built, [leaf for leaf in leaves if isinstance(leaf, Tensor)], env.tensors
