"""What lrpfunc uses of torch that torch does not type or export, in one place.

Each private name says what it is for, and what would replace it. `tests/test_torch.py` lists those that are missing in
another version of torch.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.fx.graph
import torch.utils._python_dispatch
from torch import Tensor, fx

# Runs code outside of the transforms around it, to mark where modules begin and end. Nothing public does.
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

# An operation of a recorded graph, to tell it from Python functions. `torch.library` may export it one day.
from torch._ops import OpOverload as OpOverload

# Tensors without data, which a model function is recorded on. `torch.export` makes its own, and exports neither.
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

# Prints a tensor with all its digits, as code. `torch.set_printoptions` would change them for everybody.
from torch._tensor_str import printoptions as printoptions

# The recorder. `torch.export.export(strict=False)` is its public face, for modules and whole operations only.
from torch.fx.experimental.proxy_tensor import get_proxy_mode as get_proxy_mode
from torch.fx.experimental.proxy_tensor import get_proxy_slot
from torch.fx.experimental.proxy_tensor import make_fx as make_fx

# Documented for graph passes, but not typed.
from torch.fx.node import map_aggregate as map_aggregate
from torch.fx.node import map_arg as map_arg

# Tells a reentrant checkpoint, which no trace can see through, from other code under `no_grad`. torch means to drop the
# reentrant form, and this with it.
from torch.utils.checkpoint import CheckpointFunction as CheckpointFunction

# Tensors as keys by identity, which `weakref` does not have.
from torch.utils.weak import WeakIdKeyDictionary

from lrpfunc import _tree as tree

aten: Any = torch.ops.aten

# Programs that take a list and empty it, so that each tensor is freed after its last use. AOTAutograd's own;
# a subclass of the public `fx.CodeGen` could write the same.
BoxedCodeGen: Any = torch.fx.graph._BoxedCodeGen

# Runs an operation on real numbers while a model function is recorded. Nothing public does.
disable_current_modes: Any = torch.utils._python_dispatch._disable_current_modes

# What a recorded graph calls where the gradient mode changes. `torch.set_grad_enabled` is a class around it.
set_grad_enabled: Any = torch._C._set_grad_enabled

# How many modes see each operation, of a trace or a counter. `torch.utils` exports the modes, and not how many run.
dispatch_modes: Any = torch._C._len_torch_dispatch_stack

# The levels of `vmap`, `grad` and `jvp` around a tensor. `torch.func` exports transforms, and no way to ask for them.
functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

T = TypeVar("T")


def fake_mode(environment: Any = None) -> FakeTensorMode:
    """Where tensors without data are made for a recording; its symbolic sizes are those of the `environment`.

    Without a `ShapeEnv` they refuse operations whose shape depends on numbers with an error that says less. It imports
    sympy, so that it is imported with the first recording. `torch.export` makes its own, and exports neither.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Two sizes that happen to be equal are two symbols.
    environment = ShapeEnv(duck_shape=False) if environment is None else environment
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=environment)


def open_sizes(mode: FakeTensorMode, sizes: Sequence[int], dims: Collection[int], name: str) -> list[Any]:
    """The sizes of a tensor, those in `dims` as new symbols."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    kinds: Any = [DimDynamic.DYNAMIC if d in dims else DimDynamic.STATIC for d in range(len(sizes))]
    with mode:
        like = torch.empty(tuple(sizes))
    environment: Any = mode.shape_env
    opened, _, _ = environment.create_symbolic_sizes_strides_storage_offset(
        like, ConstantSource(name), symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds)
    )
    return list(opened)


def python_code(expression: Any) -> str:
    """An expression of symbolic sizes as Python."""
    from torch.utils._sympy.printers import PythonPrinter

    return PythonPrinter().doprint(expression)


def proxied(expression: Any, known: dict[Any, Any]) -> Any:
    """One step of an expression of symbolic sizes on proxies of a graph, for its arguments, or for itself."""
    from torch.utils._sympy.interp import _run_sympy_handler, sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    if not expression.args:
        return sympy_interp(PythonReferenceAnalysis, known, expression)
    return _run_sympy_handler(PythonReferenceAnalysis, [known[argument] for argument in expression.args], expression)


def unseen(is_open: bool) -> contextlib.AbstractContextManager[Any]:
    """Works on symbolic sizes where no recorder around sees it, which would look for its own in them."""
    return disable_current_modes() if is_open else contextlib.nullcontext()


@contextlib.contextmanager
def keeping_symbols(mode: FakeTensorMode | None, is_open: bool = True) -> Iterator[None]:
    """Runs operations on tensors without data so that their sizes stay symbols.

    Outside of it some factory functions and composite operations ask for numbers. `torch.export` enters the same.
    """
    from torch._dispatch.python import enable_python_dispatcher

    with contextlib.ExitStack() as stack:
        if is_open:
            if mode is not None:
                stack.enter_context(mode)
            stack.enter_context(enable_python_dispatcher())
        yield


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Runs what is compiled inside of it, by anybody, as if it were not.

    A function that contains a compiled one would wait for a lock that its caller holds. The option is not documented:
    without it a compiled function refuses to be recorded; what it wants instead is `torch.export`.
    """
    with torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        yield


# Where torch says at length what an operation on tensors without data has failed on, before it raises that.
_RECORDING_LOGS = (
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.fx.experimental.recording",
    "torch.fx.experimental.proxy_tensor",
)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Runs what is recorded without torch's logs of it, and without a check for NaN in gradients that have no numbers.

    Only this thread is quiet, and nothing of how logs are set up is changed. The check is for the whole process.
    TorchScript runs operation by operation: what it has optimized is detached from its inputs for whoever records.
    """
    thread = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    loggers = [logging.getLogger(name) for name in _RECORDING_LOGS]
    for logger in loggers:
        logger.addFilter(is_of_others)
    try:
        with torch.autograd.set_detect_anomaly(False), torch.jit.optimized_execution(False):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_of_others)


def install_guard(obj: Any, state: Callable[[Any], Any], reason: str) -> None:
    """Makes Dynamo trace what it is tracing anew as soon as `state(obj)` is another.

    Dynamo itself guards what it sees Python code read, and it sees nothing of how a model function is recorded. Nothing
    public adds a guard; the `guard_fn` of torch's custom classes (`torch._library.opaque_object`) may become that.
    """
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource
    from torch._guards import Guard

    reference = weakref.ref(obj)

    def create(builder: Any, guard: Guard) -> None:
        expected = state(obj)
        # Last of the guards, because it is the dearest.
        builder.guard_manager.root.add_epilogue_lambda_guard(
            lambda _: (alive := reference()) is not None and state(alive) == expected, [reason], None
        )

    install_guard(Guard(GlobalStateSource(), create))


def origin(tensor: Tensor) -> tuple[fx.Node, torch.nn.Module] | None:
    """What gave a tensor of the recording that is going on in this thread, and the module of its constants."""
    mode: Any = get_proxy_mode()
    slot: Any = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    return None if mode is None or slot is None else (slot.proxy.node, mode.tracer.root)


_constants: WeakIdKeyDictionary = WeakIdKeyDictionary()


def constant(tensors: Iterable[Any]) -> list[Any]:
    """Tensors that are no inputs; a compiler that traces the call takes them for constants."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    return [_lifted(value) if type(value) in (Tensor, torch.nn.Parameter) else value for value in tensors]


def _lifted(tensor: Tensor) -> Tensor:
    _constants[tensor] = True
    return torch.ops.aten.lift_fresh_copy(tensor)


def is_constant(tensor: Tensor) -> bool:
    """Whether a compiler has taken the tensor for a constant."""
    return tensor in _constants


def version_of(tensor: Tensor) -> int | None:
    """How often somebody has written to a tensor; `None` if it does not count. Nothing public tells."""
    return None if tensor.is_inference() else tensor._version


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a torch.func transform that is running has wrapped the tensor."""
    return functorch.is_functorch_wrapped_tensor(tensor)


def is_differentiated(tensor: Any) -> bool:
    """Whether somebody may take derivatives with respect to `tensor`, by torch.func or by autograd."""
    if not isinstance(tensor, Tensor):  # a random generator
        return False
    return is_wrapped(tensor) or (tensor.requires_grad and torch.is_grad_enabled()) or _has_tangent(tensor)


def beyond_first_derivative(tensor: Tensor) -> bool:
    """Whether `tensor` is under several derivatives, a forward derivative or a `vmap`."""
    if _has_tangent(tensor):
        return True
    levels = 0
    while functorch.is_functorch_wrapped_tensor(tensor):
        if not functorch.is_gradtrackingtensor(tensor):
            return True
        levels += 1
        tensor = functorch.get_unwrapped(tensor)
    return levels + tensor.requires_grad > 1


def mapped_over(tensor: Tensor) -> frozenset[int] | None:
    """The levels of `vmap` that a tensor is mapped over; `None` if somebody may take derivatives of it."""
    levels: set[int] = set()
    while functorch.is_functorch_wrapped_tensor(tensor):
        if not functorch.is_batchedtensor(tensor):
            return None
        levels.add(functorch.maybe_get_level(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return None if is_differentiated(tensor) else frozenset(levels)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a `vmap` that is running maps over the tensor, whatever else does."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def unmapped(tensor: Tensor) -> Tensor | None:
    """All that a tensor stands for inside of `vmap`, mapped dimensions first; `None` if that is not how it lies."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if not functorch.is_batchedtensor(tensor) or functorch.maybe_get_bdim(tensor) != 0:
            return None
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _has_tangent(tensor: Tensor) -> bool:
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def innermost(tensor: Tensor) -> Tensor:
    """The tensor that the levels of transforms are around."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def inside_transform() -> bool:
    """Whether a torch.func transform is running in this thread."""
    return functorch.peek_interpreter_stack() is not None


class _Nothing:
    """Stands for `None` in what a function returns to a `vmap` around it, which takes tensors and containers alone.

    It is a container of nothing, and is `None` again when the last `vmap` has gone.
    """

    def __repr__(self) -> str:
        return "None"


tree.register_container(_Nothing, lambda _: ([], None), lambda *_: _nothing(_transforms()[:-1]))


def nothing() -> Any:
    """`None`, as something that a function may return under `vmap`."""
    return None if torch.compiler.is_compiling() else _nothing(_transforms())


def _nothing(around: list[Any]) -> Any:
    return _Nothing() if functorch.TransformType.Vmap in around else None


def _transforms() -> list[Any]:
    """The kinds of the transforms that are running in this thread, from the outside in."""
    return [interpreter.key() for interpreter in functorch.get_interpreter_stack() or ()]


def outside_transforms() -> contextlib.AbstractContextManager[Any]:
    """Runs what is in it as if none of them were."""
    return temporarily_clear_interpreter_stack()


def grad_level() -> int:
    """How many `grad`, `vjp` and the like are running in this thread; others have no grad mode of their own."""
    stack = functorch.get_interpreter_stack() or ()
    return sum(interpreter.key() == functorch.TransformType.Grad for interpreter in stack)


def global_forward_hooks() -> Iterator[int]:
    """What tells the hooks apart that all modules run.

    `register_module_forward_hook` is public, and says nothing of those that are registered.
    """
    module: Any = torch.nn.modules.module
    yield from (*module._global_forward_hooks, *module._global_forward_pre_hooks)


def is_operator(kind: type) -> bool:
    """Whether objects of that type are operators of torch, or hold them: `torch.ops` is public, its types are not."""
    return kind.__module__ == "torch._ops"


def scripted_state(scripted: torch.jit.ScriptModule) -> dict[str, Any]:
    """What a scripted module may assign: its attributes and its buffers. Python shows those that Python has set."""
    inner: Any = scripted
    if not isinstance(scripted, torch.jit.RecursiveScriptModule):
        return {}
    names = [*inner._concrete_type.get_attributes(), *(name for name, _ in scripted.named_buffers(recurse=False))]
    return {name: inner._c.getattr(name) for name in names}


def forget_optimized(scripted: torch.jit.ScriptModule | torch.jit.ScriptFunction) -> None:
    """Has TorchScript compile a module or a function anew: what it has optimized runs apart from who records it."""
    inner: Any = scripted
    if isinstance(scripted, torch.jit.ScriptFunction):
        inner._debug_flush_compilation_cache()
    elif isinstance(scripted, torch.jit.RecursiveScriptModule):
        for name in inner._c._method_names():
            inner._c._get_method(name)._debug_flush_compilation_cache()


def set_scripted_state(scripted: torch.jit.ScriptModule, state: dict[str, Any]) -> None:
    """Assigns them, as TorchScript does."""
    inner: Any = scripted
    for name, value in state.items():
        inner._c.setattr(name, value)


def schema(target: Any) -> Any:
    """What torch declares of an operation: its arguments, and which of them it writes to; `None` for functions.

    `OpOverload` has it under a private name, and `torch.library.infer_schema` is for functions of one's own.
    """
    return target._schema if isinstance(target, OpOverload) else None


def overload_name(target: Any) -> str:
    """The `dtype` of `aten.view.dtype`; `str(target)` has it too, with the rest."""
    return target._overloadname if isinstance(target, OpOverload) else ""


def decomposition(target: Any) -> Callable[..., Any] | None:
    """What an operation expands to: itself, if it is made of others, or else what torch's own table has for it.

    Of the table, `torch.export` exports only the part that it applies by default. It imports torch's references of all
    operations, so that it is imported with the first one that is asked for.
    """
    from torch._decomp import decomposition_table

    if not isinstance(target, OpOverload):
        return None
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return target if is_composite else decomposition_table.get(target)


def storage_of(tensor: Tensor) -> int:
    """What tells the memory of a tensor apart, also of one without data; `data_ptr` is only for those that have.

    A sparse tensor has several, which no other tensor is a view of.
    """
    if tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.untyped_storage()._cdata
