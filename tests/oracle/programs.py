"""Random programs of views and of operations that write in place, as source code."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

VIEWS = [
    *("{v}.transpose(0, 1)", "{v}[1:]", "{v}[:, :-1]", "{v}[:, ::2]", "{v}[0]", "{v}.unsqueeze(0)", "{v}.flatten()"),
    *("{v}.narrow(1, 0, 1)", "{v}[None, :, 0]", "{v}.t()", "{v}.unbind(1)[-1]", "{v}.chunk(2, 1)[0]", "{v}.diagonal()"),
]
CHANGES = [
    *("{v}.mul_(0.5)", "{v}.mul_(-1.5)", "{v}.relu_()", "{v}.tanh_()", "{v}.sigmoid_()", "{v}.add_(0.3)"),
    *("{v}.neg_()", "{v}.mul_({p})", "{v}.add_({p})", "{v}.div_(2.0)", "F.relu({v}, inplace=True)"),
    *("{v}.square_()", "{v}[...] *= 0.7"),
]
WRITES = ["{v}.add_({w})", "{v}.copy_({w})", "{v}[...] = {w}", "{v}.sub_({w})", "{v} += {w}", "{v}.mul_({w})"]
PLACES = [
    *("{v}[0] = {v}[-1] * 2", "{v}[:1] = 0.0", "{v}[-1] = {v}[0]", "{v}[0] += {v}[-1]"),
    "{v}[:1].copy_({v}[-1:].relu())",
]
NEW = [
    *("{v} @ {m}", "{v}.relu()", "{v}.tanh()", "F.gelu({v})", "{v} + {w}", "{v} * {w}", "{v} - 0.5 * {w}"),
    *("{v}.clone()", "F.linear({v}, {m}.t(), {b})", "torch.cat([{v}, {w}], 1)", "{v} * {p}", "{v}.flip(0)"),
    *("torch.zeros_like({v}) + {v}", "{v}.softmax(-1)", "F.layer_norm({v}, [{n}], {b}, {b}, 0.1)"),
    *("{v}.cumsum(0)", "{v} @ {m} + {b}", "{v}.mean(0, keepdim=True) + {v}"),
]
"""What a program is made of: `v` and `w` are tensors that it knows, `m`, `b` and `p` are parameters."""


@dataclass
class Program:
    """A function of parameters and an input, as source code, and what it takes."""

    source: str
    params: dict[str, Tensor]
    x: Tensor
    function: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        names: dict[str, Any] = {"torch": torch, "F": F}
        exec(self.source, names)
        self.function = names["program"]


def program(seed: int) -> Program:
    """A program that runs and that torch can differentiate."""
    for attempt in range(100):
        found = _drawn(random.Random(f"{seed}/{attempt}"), seed)
        if found is not None:
            return found
    raise AssertionError(f"no program runs for the seed {seed}")


def _drawn(rng: random.Random, seed: int) -> Program | None:
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    rows, columns = rng.randint(2, 3), rng.randint(2, 4)
    x = tensor(rows, columns)
    params: dict[str, Tensor] = {}
    lines = ["a = x.clone()" if rng.random() < 0.5 else "a = x @ p['m']"]
    params["m"] = tensor(columns, columns) / columns**0.5
    known: dict[str, Any] = {"a": x.clone()}
    fresh = iter("bcdefghijklmnoqrstuvwyz")
    scope: dict[str, Any] = {"torch": torch, "F": F, "p": params}

    def run(line: str) -> bool:
        try:
            with torch.no_grad():
                exec(line, scope, known)
        except (RuntimeError, IndexError):
            return False
        return True

    for _ in range(rng.randint(3, 8)):
        v = rng.choice(list(known))
        kind = rng.choice([VIEWS, VIEWS, CHANGES, CHANGES, WRITES, PLACES, NEW, NEW])
        text = rng.choice(kind)
        w = rng.choice(list(known))
        size = known[v].shape[-1] if known[v].ndim else 1
        name = f"p{len(params)}"
        if "{m}" in text:
            params[name] = tensor(size, size) / size**0.5
            text = text.replace("{m}", f"p['{name}']")
            name = f"p{len(params)}"
        if "{b}" in text or "{p}" in text:
            params[name] = 1 + 0.5 * tensor(size)
            text = text.replace("{b}", f"p['{name}']").replace("{p}", f"p['{name}']")
        if kind is WRITES and w != v and _memory(known[w]) == _memory(known[v]):
            w += ".clone()"  # what overlapping memory is read as while it is written is for torch to say
        line = text.format(v=v, w=w, n=size)
        if kind in (VIEWS, NEW):
            target = next(fresh)
            if not run(f"{target} = {line}") or not known[target].numel():
                known.pop(target, None)
                continue
            lines.append(f"{target} = {line}")
        elif run(line):
            lines.append(line)
    end = rng.choice(list(known))
    lines.append(f"return {end}.reshape(1, -1) + 0" if rng.random() < 0.1 else f"return {end}.reshape(1, -1)")
    source = "def program(p, x):\n" + "".join(f"    {line}\n" for line in lines)
    try:
        found = Program(source, {n: t for n, t in params.items() if f"'{n}'" in source}, x)
        leaf = x.clone().requires_grad_()
        output = found.function(found.params, leaf)
        if not output.requires_grad or output.abs().max() > 1e3:
            return None
        (gradient,) = torch.autograd.grad(output.sum(), leaf)
    except RuntimeError:
        return None
    return found if bool(gradient.abs().max() > 0) else None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
