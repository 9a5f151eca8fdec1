"""What a trace cannot show: reads of numbers, grad modes, transforms and functions with a backward of their own."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import traceback
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lrpfunc import _tree as tree
from lrpfunc._capture.identity import is_custom_function
from lrpfunc._capture.isolation import stop_if_interrupted
from lrpfunc._capture.numbers import Number, number
from lrpfunc._errors import CaptureError
from lrpfunc._torch import (
    CheckpointFunction,
    FakeTensor,
    disable_current_modes,
    get_proxy_mode,
    grad_level,
    inside_transform,
    set_grad_enabled,
)

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


def unknown_number(tensor: Tensor | None, where: types.FrameType | types.TracebackType | None) -> str:
    """What to say where a model function asks for a number that is not known."""
    shape = "" if tensor is None else f" of shape {tuple(tensor.shape)}"
    return (
        f"the model function asks for a number inside a tensor{shape}, which is not known when it is recorded"
        f"{_line(where)}The usual reason is Python control flow that depends on the numbers inside a tensor "
        "(`if x.sum() > 0:`, `int(mask.sum())`). Write it with torch.where or a mask, or pass the number as a Python "
        "argument"
    )


_OURS = tuple(os.path.join(folder, "") for folder in (os.path.dirname(os.path.dirname(__file__)), *torch.__path__))
_PYTHONS = ("<frozen", os.path.join(os.path.dirname(os.__file__), ""))


def _is_models(file: str) -> bool:
    """Whether it is neither torch's, nor ours, nor Python's own, in whose folder packages may be installed."""
    return not file.startswith(_OURS) and ("-packages" in file or not file.startswith(_PYTHONS))


def _line(where: types.FrameType | types.TracebackType | None) -> str:
    """The line of the model function's own code that was running, as a part of a sentence."""
    if isinstance(where, types.TracebackType):
        frames = traceback.StackSummary.extract(traceback.walk_tb(where))
    else:
        frames = traceback.StackSummary.extract(reversed(list(traceback.walk_stack(where))))
    own = [frame for frame in frames if frame.line and _is_models(frame.filename)]
    return f", in {own[-1].filename}, line {own[-1].lineno}:\n\n    {own[-1].line}\n\n" if own else ". "


class BeginsTransform(BaseException):
    """The model function has a transform of its own, whose levels a trace before dispatch does not see."""


class Watch(TorchFunctionMode):
    """Sees what a trace cannot show, and keeps it away from real tensors.

    A tensor the function closes over is replaced, wherever an operation reads it, by an input of the trace. Without
    that an operation on such tensors alone would really run, and change them if it works in place.

    Args:
        inputs: The inputs of the trace, by the identity of the tensors that they replace.
        known: What stands for each input of the trace, as far as numbers may be read from it; `None` for a walk.
        made: What operations returned. What is alive of it after the trace, something remembers.
        before_dispatch: How a model function is traced; `None` for a walk.

    Attributes:
        reads: Whether a number inside a tensor became part of the program, and nobody can tell whether it holds.
        numbers: The numbers that became part of the program, and hold as long as what they were computed from.
        no_grad: Whether something was computed without gradients.
        has_transforms: Whether the function has transforms of its own.
    """

    _RECURRENT = ("lstm", "gru", "lstm_cell", "gru_cell")

    _SHOWS = ("__repr__", "__str__", "__format__")
    _READS = (
        *("item", "tolist", "numpy", "__array__", "__float__", "__int__", "__bool__", "__index__", "__complex__"),
        *("__contains__", *_SHOWS),
    )

    def __init__(
        self,
        inputs: dict[int, Tensor] | None = None,
        known: Sequence[Tensor | None] | None = None,
        made: list[weakref.ref[Tensor]] | None = None,
        before_dispatch: bool | None = None,
    ) -> None:
        super().__init__()
        self.inputs = {} if inputs is None else inputs
        self.known = known
        self.numbers: list[Number] = []
        self.made = [] if made is None else made
        self.before_dispatch = before_dispatch
        self._grad_modes: dict[int, bool] = {}
        self.has_transforms = False
        self.reads = False
        self.no_grad = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stop_if_interrupted()
        self.has_transforms |= inside_transform()
        if self.has_transforms and self.before_dispatch:
            raise BeginsTransform
        if func is set_grad_enabled and args[0] is False:
            self.no_grad = True
            if _is_called_by(CheckpointFunction.forward):
                raise CaptureError(_REENTRANT)
        if func is set_grad_enabled and self.before_dispatch is False:
            self._mark_grad_mode(args[0])
        name = getattr(func, "__name__", "")
        if name.partition(".")[0] in self._RECURRENT and self.before_dispatch is False:
            raise CaptureError(_GATED)
        if name == "_pack_padded_sequence":
            raise CaptureError(_PACKED)
        if name in self._READS:
            return self._read(name, func, args, kwargs or {})
        if name != "__get__":
            _check_layouts((args, kwargs))
        if func == _DATA:  # a trace does not see `.data`
            result = self._replaced(args[0]).detach()
        else:
            result = func(*self._replaced(args), **self._replaced(kwargs or {}))
        self.made += (weakref.ref(leaf) for leaf in tree.leaves(result) if isinstance(leaf, Tensor))
        return result

    def _read(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Reads numbers out of a tensor, if they are known."""
        tensor = args[0] if self.known is None else self._replaced(args[0])
        if not isinstance(tensor, FakeTensor):
            self.reads = True  # the program must not be used again
            with disable_current_modes():
                return func(*args, **kwargs)
        known = None if self.known is None else number(tensor, self.known)
        if known is not None:
            self.numbers.append(known)
            with disable_current_modes():
                return func(known.value.clone(), *args[1:], **kwargs)
        if self.known is not None and name not in self._SHOWS:
            raise CaptureError(unknown_number(tensor, sys._getframe()))
        return func(*args, **kwargs)

    def _mark_grad_mode(self, enabled: bool) -> None:
        """Writes into the trace what one before dispatch has by itself: whether what follows has derivatives.

        It has those outside of all transforms of the function only if they are enabled on every level.
        """
        level = grad_level()
        self._grad_modes = {k: mode for k, mode in self._grad_modes.items() if k < level} | {level: enabled}
        mode: Any = get_proxy_mode()
        mode.tracer.create_node("call_function", set_grad_enabled, (all(self._grad_modes.values()),), {})

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.inputs.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(map(self._replaced, value))
        if type(value) is dict:
            return {key: self._replaced(item) for key, item in value.items()}
        return value


def _check_layouts(operands: Any) -> None:
    for leaf in tree.leaves(operands):
        if isinstance(leaf, Tensor) and leaf.layout not in (torch.strided, torch.sparse_coo):
            raise CaptureError(
                f"the model function computes with a tensor of layout {leaf.layout}, which cannot be recorded. Convert "
                "it once, outside of the function: tensor.to_sparse_coo()"
            )


def _is_called_by(function: Any) -> bool:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


def custom_functions() -> dict[types.CodeType, str]:
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
def refusing(custom: dict[types.CodeType, str]) -> Iterator[None]:
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
