"""Where in a module a traced operation stands: markers that modules leave in the trace."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lrpfunc import _tree as tree
from lrpfunc._torch import outside_transforms, unmapped

_local = threading.local()


class Recorder:
    """Leaves markers in a trace: an `alias` of one scalar at every module's entry, and of its outputs at its exit.

    Where a module has no floating-point output, its exit too is marked by the scalar, and so it is inside a transform
    whose tensors do not exist outside of it.

    The markers are returned from the traced function, so that the graph's outputs tell where they stand. An alias
    taken at exit still names the value at that moment when the tensor is changed in place afterwards.

    Attributes:
        events: `(kind, path, markers, spec)` in order of execution; `kind` is "enter" or "exit".
        module_types: The class of the module behind each path.
    """

    def __init__(self, tick: Tensor):
        self.tick = tick
        self.events: list[tuple[str, str, list[Tensor | None], Any]] = []
        self.module_types: dict[str, type] = {}
        self._calls: Counter[str] = Counter()
        self._stack: list[str] = []

    @property
    def markers(self) -> list[Tensor]:
        return [marker for _, _, markers, _ in self.events for marker in markers if marker is not None]

    def handed_over(self) -> list[tuple[str, str, list[bool], Any]]:
        """The events, with whether there is a marker instead of the marker; the recorder is empty afterwards."""
        events, self.events = self.events, []
        return [(kind, path, [marker is not None for marker in markers], spec) for kind, path, markers, spec in events]

    def watch(self, module: nn.Module) -> None:
        """Marks the calls of all submodules; `module` must be the recorder's own copy."""
        for path, child in module.named_modules():
            if path and not isinstance(child, torch.jit.ScriptModule):
                child.register_forward_pre_hook(self._enter(path), prepend=True)
                child.register_forward_hook(self._exit)

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            call = self._calls[path]
            self._calls[path] += 1
            self._stack.append(f"{path}@{call}" if call else path)
            self.module_types[self._stack[-1]] = type(module)
            self.events.append(("enter", self._stack[-1], [self._marker(self.tick)], None))

        return hook

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self._stack.pop()
        leaves, spec = tree.flatten(output)
        floats = [leaf if isinstance(leaf, Tensor) and leaf.is_floating_point() else None for leaf in leaves]
        markers = [None if leaf is None else self._marker(unmapped(leaf)) for leaf in floats]
        tick = self._marker(self.tick) if all(marker is None for marker in markers) else None
        self.events.append(("exit", path, [tick, *markers], spec))

    def _marker(self, tensor: Tensor | None) -> Tensor | None:
        with outside_transforms():  # no tensor of a transform must leave it
            return None if tensor is None else torch.ops.aten.alias(tensor)


def current_recorder() -> Recorder | None:
    return getattr(_local, "recorder", None)


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    previous, _local.recorder = current_recorder(), recorder
    try:
        yield
    finally:
        _local.recorder = previous
