"""How the suite runs: the same hypothesis examples everywhere, and one thread of torch's for each worker."""

import gc
import os
from typing import Any

import pytest
import torch
from hypothesis import settings

from lrpfunc._capture import capture as capture_module

settings.register_profile("lrpfunc", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("lrpfunc")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each use all cores wait for one another most of the time.
    torch.set_num_threads(1)

# A trace makes many objects that stay, and the collector looks through all there are each time their number has grown
# by a quarter: a third of the suite's time.
gc.set_threshold(20_000, 20, 100)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a model function was recorded."""
    found: list[int] = []
    capture_module.clear_cache()
    trace = capture_module.trace

    def counted(*args: Any) -> Any:
        found.append(1)
        return trace(*args)

    monkeypatch.setattr(capture_module, "trace", counted)
    return found
