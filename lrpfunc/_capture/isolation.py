"""A trace apart from whatever is going on around it, and from other traces."""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Generic

import torch

from lrpfunc._errors import CaptureError
from lrpfunc._torch import T, disable_current_modes, global_forward_hooks, plainly, uncompiled

# NOTE: [one capture at a time] torch keeps the stack of modes that trace before dispatch per process, not per thread.
_turn = threading.RLock()

# The thread that traces, for those that wait for their turn.
_tracing: int | None = None

# For how many seconds the trace that they wait for may itself be waiting for another thread.
PATIENCE = 5.0

_inside = threading.local()


def is_capturing() -> bool:
    """Whether this code is part of what is being captured."""
    return hasattr(_inside, "thread")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Waits for a turn to capture; others wait until it is over."""
    try:
        if is_capturing() or not _has_turn():
            raise CaptureError(
                "the model function itself calls an lrpfunc transform that has not seen these shapes yet, and one "
                "capture cannot run inside another. Call the inner transform once with inputs of the same shapes first"
            )
        yield
    finally:
        _end_turn()


def _has_turn() -> bool:
    """Waits for a turn, unless that would be for ever: the model function may wait for a thread that calls lrpfunc.

    No thread knows who started it, so a trace that stands in a wait of `threading` for long is taken to be such a one.
    """
    waits, looks = 0, 20
    while not _turn.acquire(timeout=PATIENCE / looks):
        frame = sys._current_frames().get(_tracing or 0)
        waits = waits + 1 if frame is not None and frame.f_code.co_filename == threading.__file__ else 0
        if waits == looks:
            return False
    return _tracing is None  # else this is a signal handler in the thread that waits for the trace


def _end_turn() -> None:
    with contextlib.suppress(RuntimeError):  # an interrupt, or the lack of patience, came before the turn
        _turn.release()


# NOTE: [forks] A child has none of the threads of its parent, but their locks and what they left half done. So a fork
# waits for its turn; one in the middle of a trace, by the model function itself, leaves the child without a lock.


def _before_fork() -> None:
    if not is_capturing():
        _has_turn()


def _after_fork_in_child() -> None:
    global _turn, _tracing
    _turn, _tracing = threading.RLock(), None


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_before_fork, after_in_parent=_end_turn, after_in_child=_after_fork_in_child)


def isolated(fn: Callable[[], T]) -> T:
    """Runs `fn` in a fresh thread, which has none of the caller's transform levels, modes or compile state."""
    with contextlib.nullcontext() if is_capturing() else alone():
        return _Thread(fn).result()


class _Thread(threading.Thread, Generic[T]):
    """A thread that runs a function, in the autocast, on the device and on the stream of the one that makes it."""

    def __init__(self, fn: Callable[[], T]):
        super().__init__(name="lrpfunc-capture")
        self.is_interrupted = False
        self._fn = fn
        self._context = contextvars.copy_context()
        self._autocast = [
            (device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        ]
        self._device = torch.get_default_device()
        # What really runs, such as what `bind` prepares, must come after what the caller has begun.
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self._results: list[T] = []
        self._failures: list[BaseException] = []
        self._has_begun = False
        self._has_ended = threading.Event()

    def result(self) -> T:
        """What the function returns, or raises."""
        self._finish()
        self.join()
        if self._failures:
            raise self._failures[0]
        return self._results[0]

    def _finish(self) -> None:
        """Begins, and waits for the end. What interrupts that interrupts the function, and is raised after the end."""
        # `join` is of no use for that: when it is interrupted, it takes the thread for ended.
        try:
            if not self._has_begun:
                self._has_begun = True
                self.start()
            while not self._has_ended.wait(1) and self.ident in sys._current_frames():
                pass
        except BaseException:
            self.is_interrupted = True
            self._finish()
            raise

    def run(self) -> None:
        global _tracing
        around, _tracing, _inside.thread = _tracing, self.ident, self
        try:
            self._context.run(self._run)
        except BaseException as error:
            self._failures.append(error)
        finally:
            _tracing = around
            self._has_ended.set()

    def _run(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(disable_current_modes())  # those before dispatch are the process's, see above
            stack.enter_context(uncompiled())
            stack.enter_context(plainly())
            if self._device != torch.device("cpu"):
                stack.enter_context(self._device)
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            self._results.append(self._fn())


# NOTE: [interrupts] Python interrupts the main thread, and there only the wait for the trace, which must nevertheless
# end before anybody goes on: it has changed torch for the whole process, and puts that back. It ends at its next
# operation: an exception anywhere would end the process, since torch calls Python where nothing may be raised.


def stop_if_interrupted() -> None:
    """Called at each operation that is recorded."""
    thread = getattr(_inside, "thread", None)
    if thread is not None and thread.is_interrupted:
        raise KeyboardInterrupt


def surroundings() -> Iterator[Hashable]:
    """What an operation depends on beside its arguments."""
    yield torch.get_default_dtype()
    yield torch.get_default_device()
    yield tuple(global_forward_hooks())
    for device in ("cpu", "cuda"):
        yield torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
