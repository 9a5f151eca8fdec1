"""A capture beside interrupts, forks and other threads. Each test is a process of its own, which must end in time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lrpfunc

BEGIN = """
import os, signal, sys, threading, time, warnings
from concurrent.futures import ThreadPoolExecutor
import torch
import lrpfunc as lrp
from lrpfunc._capture import isolation

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests behind itself ignores it
warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
torch.set_num_threads(1)
x = torch.arange(6.0).reshape(2, 3)
begun, go_on = threading.Event(), threading.Event()

def slow(x):
    begun.set()
    while not go_on.is_set():
        time.sleep(0.001)
        x = x.relu()
    return x * 2

def check():
    weight = torch.randn(3, 2)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    model_fn, params = lrp.from_module(module)
    relevance, value = lrp.attribute_and_value(model_fn, lrp.gradient())(params, x, target=1)
    assert torch.equal(value, module(x))
    assert relevance.shape == x.shape
"""


def run(script: str, seconds: float = 240) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(lrpfunc.__file__).parents[1])}
    command = [sys.executable, "-c", BEGIN + script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


INTERRUPTED = """
call = torch.nn.Module.__call__
for delay in (0, 0.01, 0.1, 0.5):
    begun.clear()

    def interrupt():
        begun.wait()
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    try:
        lrp.attribute(lambda x: slow(x), lrp.gradient(), argnums=0)(x)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("not interrupted")
    other.join()
    assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
    assert torch._ops.mode_stack_state_for_pre_dispatch().count() == 0
    assert torch.nn.Module.__call__ is call
    check()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no signals of that kind")
def test_an_interrupt_ends_the_trace() -> None:
    run(INTERRUPTED)


# The model function goes on for as long as nobody is told to stop it, so the trace is what the interrupt has ended.
SWALLOWED = """
def swallows(x):
    begun.set()
    try:
        while True:
            x = x.relu()
    except BaseException:
        time.sleep(1)
        ended.append(True)
    return x

ended = []
threading.Thread(target=lambda: (begun.wait(), os.kill(os.getpid(), signal.SIGINT))).start()
try:
    lrp.attribute(swallows, lrp.gradient(), argnums=0)(x)
except KeyboardInterrupt:
    assert ended == [True]  # it was waited for
else:
    raise AssertionError("not interrupted")
check()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no signals of that kind")
def test_an_interrupted_trace_is_waited_for() -> None:
    run(SWALLOWED)


FORKED = """
other = threading.Thread(target=lambda: lrp.attribute(slow, lrp.gradient(), argnums=0)(x))
other.start()
begun.wait()
threading.Timer(1, go_on.set).start()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # two threads of a child that ask torch for its pool at once crash it
    assert torch._ops.mode_stack_state_for_pre_dispatch().count() == 0
    check()
    os._exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
other.join()
check()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_waits_for_the_capture_of_another_thread() -> None:
    run(FORKED)


LOCKED = """
from lrpfunc._capture import cache

fn = lrp.attribute(lambda x: x * 2, lrp.gradient(), argnums=0)
fn(x)
holds, let_go = threading.Event(), threading.Event()

def hold():
    with cache._lock:
        holds.set()
        let_go.wait()

other = threading.Thread(target=hold)
other.start()
holds.wait()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # two threads of a child that ask torch for its pool at once crash it
    fn(x)
    os._exit(0)
let_go.set()
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
other.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_another_thread_looks_into_a_cache() -> None:
    run(LOCKED)


FORKS = """
def forks(x):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # two threads of a child that ask torch for its pool at once crash it
        os._exit(0)
    os.waitpid(child, 0)
    return x * 2

assert torch.equal(lrp.attribute(forks, lrp.gradient(), argnums=0)(x), torch.full_like(x, 2))

def forks_elsewhere(x):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(forks, x.new_zeros(1)).result()
    return x * 3

isolation.PATIENCE = 1
assert torch.equal(lrp.attribute(forks_elsewhere, lrp.gradient(), argnums=0)(x), torch.full_like(x, 3))
check()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_model_function_may_fork() -> None:
    run(FORKS)


NESTED = """
isolation.PATIENCE = 1
constant = torch.ones(2, 3)
inner = lrp.attribute(lambda x: x * x, lrp.gradient(), argnums=0)

def in_thread(x):
    with ThreadPoolExecutor(1) as pool:
        return x * pool.submit(inner, constant).result()

def in_place(x):
    return x * inner(constant)

for model_fn in (in_place, in_thread):
    try:
        lrp.attribute(model_fn, lrp.gradient(), argnums=0)(x)
    except lrp.CaptureError as error:
        assert "itself calls an lrpfunc transform" in str(error), error
    else:
        raise AssertionError("not refused")

inner(constant)
for model_fn in (in_place, in_thread):
    assert torch.equal(lrp.attribute(model_fn, lrp.gradient(), argnums=0)(x), torch.full_like(x, 2))
check()
"""


def test_nested_calls_from_another_thread() -> None:
    run(NESTED)


PATIENT = """
isolation.PATIENCE = 0.2  # much shorter than the trace, which works and does not wait
other = threading.Thread(target=lambda: lrp.attribute(slow, lrp.gradient(), argnums=0)(x))
other.start()
begun.wait()
threading.Timer(3, go_on.set).start()
check()
assert go_on.is_set()
other.join()
"""


def test_a_capture_waits_for_another() -> None:
    run(PATIENT)
