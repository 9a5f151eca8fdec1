"""A trace apart from whatever is going on around it."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Hashable, Iterator

import torch

from lrpfunc._errors import CaptureError
from lrpfunc._torch import T, global_forward_hooks

# NOTE: [one capture at a time] torch keeps the stack of modes that trace before dispatch per process, not per thread.
capture_lock = threading.Lock()

_inside = threading.local()


def is_capturing() -> bool:
    """Whether this code is part of what is being captured."""
    return getattr(_inside, "capture", False)


def refuse_nested() -> None:
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


def surroundings() -> Iterator[Hashable]:
    """What an operation depends on beside its arguments."""
    yield torch.get_default_dtype()
    yield torch.get_default_device()
    yield tuple(global_forward_hooks())
    for device in ("cpu", "cuda"):
        yield torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
