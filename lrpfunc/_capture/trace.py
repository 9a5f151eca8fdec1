"""Records what a model function does: a graph of whole operations."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._capture.environment import Environment
from lrpfunc._capture.identity import describe_tensor
from lrpfunc._capture.isolation import isolated
from lrpfunc._capture.leftovers import holder, restoring_scripts
from lrpfunc._capture.markers import Recorder, recording
from lrpfunc._capture.memory import forget_cached, is_cached, restoring
from lrpfunc._capture.numbers import Number
from lrpfunc._capture.returned import Returned, returned
from lrpfunc._capture.shapes import Shapes, inlined
from lrpfunc._capture.watch import BeginsTransform, Watch, custom_functions, refusing, unknown_number
from lrpfunc._errors import CaptureError
from lrpfunc._torch import FakeTensor, FakeTensorMode, fake_mode, innermost, keeping_symbols, make_fx


@dataclass(eq=False)
class Trace:
    """What one run of the model function on fake tensors left behind.

    Attributes:
        module: The traced operations; the placeholders are the tick, the environment's tensors and the arguments.
        outputs: How to rebuild the output from the first graph outputs.
        aux: The same for the auxiliary output.
        events: Where modules begin and end, as the recorder saw it, with `True` for each marker; the markers are the
            last graph outputs.
        module_types: The class of the module behind each path.
        closed: How many placeholders stand for tensors of the environment.
        held: The places of those that are in arguments of types that torch's pytree does not know.
        constants: Tensors that are no inputs, by the name they are read by: made by the function, mostly.
        numbers: Numbers in tensors that became part of it.
        stable: Whether the trace may be used again, where those are the same.
        changed: The name of what the function reads and has changed itself.
        shapes: Which sizes it leaves open.
    """

    module: fx.GraphModule
    outputs: Returned
    aux: Returned
    events: list[tuple[str, str, list[bool], Any]]
    module_types: dict[str, type]
    closed: int
    held: set[int]
    constants: dict[str, Tensor]
    numbers: list[Number]
    stable: bool
    changed: str | None
    shapes: Shapes | None
    after_dispatch: bool

    @property
    def markers(self) -> int:
        """How many of the graph outputs are markers."""
        return sum(sum(marked) for _, _, marked, _ in self.events)


@dataclass(frozen=True, eq=False)
class Call:
    """What is recorded: a call of a model function.

    Attributes:
        model_fn: The function.
        leaves: The leaves of its arguments.
        spec: Their structure.
        has_aux: Whether it returns `(output, aux)`.
        inline: Whether a custom `autograd.Function` is taken for the operations of its forward.
        reads: What it read when the program was looked for.
        roots: What that was read from.
    """

    model_fn: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    has_aux: bool
    inline: bool
    reads: Environment
    roots: Sequence[Any]

    @cached_property
    def given(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


_Traced = tuple[fx.GraphModule, list[Any], dict[str, Any], Watch]


def fake_like(tensor_keys: Sequence[Any], mode: FakeTensorMode) -> list[Tensor]:
    with mode:
        return [
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for shape, strides, dtype, device in tensor_keys
        ]


def _trace(
    recorded: Call,
    open_dims: Mapping[int, Collection[int]],
    custom: dict[types.CodeType, str],
    before_dispatch: bool,
    made: list[weakref.ref[Tensor]],
    mode: FakeTensorMode,
    before: Environment,
) -> _Traced:
    closed, given = recorded.reads.tensors, recorded.given
    # Numbers in what can be explained are none that a program may be for.
    known = [None if _is_continuous(tensor) else tensor for tensor in given]
    found: dict[str, Any] = {}

    def call(tensors: list[Tensor]) -> list[Any]:
        fakes = iter(tensors)
        leaves = [next(fakes) if isinstance(leaf, Tensor) else leaf for leaf in recorded.leaves]
        args, kwargs = tree.unflatten(leaves, recorded.spec)
        output = recorded.model_fn(*args, **kwargs)
        aux = None
        if recorded.has_aux:
            if not (isinstance(output, tuple) and len(output) == 2):
                raise TypeError(
                    f"with has_aux=True the model function must return a pair (output, aux), not "
                    f"{'Tensor' if isinstance(output, Tensor) else type(output).__name__}"
                )
            output, aux = output
        values, output_spec = tree.flatten(output)
        # What is not a tensor is refused later, when it is known what is explained.
        found["outputs"] = Returned([None if isinstance(v, Tensor) else (v, False) for v in values], output_spec)
        found["aux"] = returned(aux, before, functools.partial(is_fake, mode=mode))
        return [leaf for leaf in (*values, *tree.leaves(aux)) if isinstance(leaf, Tensor)]

    scalar = ((), (), torch.float32, torch.device("cpu"))
    shapes = Shapes(mode) if open_dims else None
    inputs = fake_like([scalar, *map(describe_tensor, closed)], mode)
    for place, tensor in enumerate(given):
        dims = open_dims.get(place)
        opened = None if shapes is None or dims is None else shapes.open(place, tensor, dims)
        inputs.append(fake_like([describe_tensor(tensor)], mode)[0] if opened is None else opened)
    made.extend(map(weakref.ref, inputs))
    watches: list[Watch] = []
    recorders: list[Recorder] = []

    def marked(tick: Tensor, *tensors: Tensor) -> list[Tensor]:
        fakes = {id(real): fake for real, fake in zip(closed, tensors, strict=False)}
        watch = Watch(fakes, [None, *closed, *known], made, before_dispatch)
        recorder = Recorder(tick)
        watches.append(watch)
        recorders.append(recorder)
        with recording(recorder), watch, refusing(custom):
            outputs = [watch._replaced(output) for output in call(list(tensors[len(closed) :]))]
        return [*outputs, *recorder.markers]

    # `decomposition_table={}`: without it torch 2.15 turns `detach` into `alias`, which stops nothing.
    options: dict[str, Any] = {"pre_dispatch": True} if before_dispatch else {"decomposition_table": {}}
    kind = "real" if open_dims else "fake"  # which is what `make_fx` calls it where the tensors and sizes are ours
    with keeping_symbols(mode, bool(open_dims)):
        module = make_fx(marked, tracing_mode=kind, _allow_non_fake_inputs=True, **options)(*inputs)
    if open_dims:
        inlined(module.graph)
    found["module_types"] = recorders[-1].module_types
    found["shapes"] = shapes
    return module, recorders[-1].handed_over(), found, watches[-1]


def is_fake(value: Any, mode: FakeTensorMode | None = None) -> bool:
    """Whether it is a tensor without numbers, of that trace, be it inside of a transform's."""
    if not isinstance(value, Tensor):
        return False
    value = innermost(value)
    return isinstance(value, FakeTensor) and (mode is None or value.fake_mode is mode)


def _held(closed: Sequence[Tensor], model_fn: Callable[..., Any]) -> set[int]:
    own = set(map(id, Environment(model_fn, transformed=True).tensors))
    return {place for place, tensor in enumerate(closed) if id(tensor) not in own}


def _check_nothing_is_left(made: Sequence[weakref.ref[Tensor]]) -> None:
    """Names what still holds a tensor of a trace, which has no numbers: nobody could go on with it."""
    left = [tensor for tensor in (reference() for reference in made) if tensor is not None]
    name = holder(left) if left else None
    if name is not None:
        raise CaptureError(
            f"the model function keeps a tensor that it computed, in `{name}`, where it is not looked for. While it is "
            "recorded the tensor has no numbers, and whoever finds it there cannot go on: set it to what it was "
            "before. Return the tensor beside the output instead, for example\n\n"
            "    return output, hidden  # lrpfunc.attribute(model_fn, rules, has_aux=True)"
        )


def _is_sparse(constant: Any) -> bool:
    return isinstance(constant, Tensor) and constant.is_sparse  # it may be a generator of random numbers


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


VALUE_DEPENDENT = (
    "GuardOnDataDependentSymNode",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "PendingUnbackedSymbolNotFound",
)


def trace(recorded: Call, open_dims: Mapping[int, Collection[int]]) -> Trace:
    """Runs the model function on fake tensors, where it does nothing but to be recorded.

    Args:
        recorded: The call.
        open_dims: Which sizes of which of its tensors are left open.
    """
    reads, roots = recorded.reads, recorded.roots
    before = Environment(*roots, transformed=True, remember=True)
    undo = restoring(roots[1:]), restoring_scripts(before.met())
    made: list[weakref.ref[Tensor]] = []

    def attempt(before_dispatch: bool, again: bool = False) -> _Traced | None:
        custom = {} if recorded.inline else custom_functions()
        mode = fake_mode()
        is_own = functools.partial(is_fake, mode=mode)

        def once() -> _Traced | None:
            try:
                traced = _trace(recorded, open_dims, custom, before_dispatch, made, mode, before)
            except BeginsTransform:
                return None  # the exception would keep what the trace has made
            return None if before_dispatch and traced[-1].has_transforms else traced

        try:
            result = isolated(once)
        except Exception as error:
            if type(error).__name__ in VALUE_DEPENDENT:
                raise CaptureError(unknown_number(None, error.__traceback__)) from None
            raise
        finally:
            for put_back in (functools.partial(before.forget, is_own), *undo):
                put_back()
            if any(tensor() is not None for tensor in made):
                forget_cached(is_own)
        if result is not None and all(leaf is None or leaf[0] is None for leaf in result[2]["outputs"].leaves):
            _check_nothing_is_left(made)  # an object among the outputs holds its tensors, and is refused later
        if not (recorded.inline or again or custom_functions().keys() <= custom.keys()):
            return attempt(before_dispatch, again=True)  # the model function defines such a class when it is called
        return result

    whole = attempt(before_dispatch=True)
    module, events, found, watch = whole or cast(_Traced, attempt(before_dispatch=False))
    constants = [node for node in module.graph.nodes if node.op == "get_attr"]
    # A constant that the function made is copied at once; any other one may be a tensor that was missed.
    values = {node.target: getattr(module, node.target) for node in constants}
    met = set(map(id, before.met()))  # a sparse tensor among it is no input, but the same one as long as the key is
    own = all(
        all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users)
        or (id(values[node.target]) in met and _is_sparse(values[node.target]))
        or is_cached(values[node.target])
        for node in constants
    )
    if any(map(is_fake, values.values())):
        raise CaptureError(
            "the model function makes a tensor in a way a trace cannot follow, such as torch.autograd.grad, `.data` "
            "or `set_`. Write torch.func.grad, or detach()"
        )
    # A function that changes what it reads goes on from there at the next call; a program would not.
    after = Environment(*roots, transformed=True, remember=True)
    changed = before.difference(after) if before.key != after.key and not before.unknown else None
    stable = own and not watch.reads and reads.key == after.key
    return Trace(
        module,
        found["outputs"],
        found["aux"],
        events,
        found["module_types"],
        len(reads.tensors),
        _held(reads.tensors, recorded.model_fn),
        values,
        watch.numbers,
        stable,
        changed,
        found["shapes"],
        whole is None,
    )
