"""The walk back for some of the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._capture.numbers import has_numbers
from lrpfunc._errors import InputError
from lrpfunc._layers.graph import Graph
from lrpfunc._torch import outside_transforms
from lrpfunc.rules._message import Message

Pull = Callable[[Sequence[Message]], Any]
TOLERANCE = 1e-6
"""How much of the largest relevance may reach samples that none started at."""
ROUNDING = 1e-3
"""How far the walk for some samples may be from that for all of them, in any precision; a wrong one is far away."""


def chosen(rows: Any, output: Any) -> Tensor:
    """The numbers of the samples that `rows` picks, as it would index the output."""
    tensor = next((leaf for leaf in tree.leaves(output) if isinstance(leaf, Tensor)), None)
    if tensor is None or tensor.ndim == 0:
        raise InputError("rows= picks samples, the first dimension of the output, and the output has none")
    places = torch.arange(len(tensor), device=tensor.device)
    try:
        picked = places[torch.tensor(rows, dtype=None if rows else torch.int64) if isinstance(rows, list) else rows]
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"rows={rows!r} picks no samples of an output of shape {tuple(tensor.shape)}: {error}. Give what would "
            "index it: integers, a mask of booleans for all of them, or a slice"
        ) from None
    if picked.ndim != 1:
        raise InputError(
            f"rows={rows!r} picks {'one sample' if picked.ndim == 0 else f'a grid of samples, {tuple(picked.shape)}'}, "
            "and a list of them is wanted, for example rows=[3]"
        )
    if has_numbers([picked]) and len(picked.unique()) < len(picked):
        raise InputError(f"rows={rows!r} picks a sample several times; each has one walk: give every one once")
    return picked


def within_all(graph: Graph, pull: Pull, output: Any, start: Sequence[Message], rows: Tensor) -> Any:
    """The answer for some samples, by the walk for all of them, in which no relevance starts at the others."""
    outputs = [leaf for leaf in tree.leaves(output) if isinstance(leaf, Tensor)]
    whole = [
        type(message)(torch.zeros_like(like, dtype=message.value.dtype).index_copy(0, rows, message.value))  # type: ignore[call-arg]
        for message, like in zip(start, outputs, strict=True)
    ]
    return of_rows(graph, pull(whole), rows, len(outputs[0]))


def of_rows(graph: Graph, answer: Any, rows: Tensor, count: int) -> Any:
    """What an answer for `count` samples says of some, where no relevance started at the others."""
    relevances, spec = tree.flatten(answer)
    found = dict(zip(graph.requested, (r for r in relevances if isinstance(r, Tensor)), strict=True))
    taps = set(graph.sources) - set(graph.starts)
    if wrong := [r for node, r in found.items() if node in graph.starts and not (r.ndim and len(r) == count)]:
        raise InputError(
            f"rows= picks samples, the output has {count} samples in its first dimension, and what is explained has "
            f"shape {tuple(wrong[0].shape)}. Let its samples stand first, for example\n\n"
            "    lrpfunc.vjp(lambda params, x: model_fn(params, x.transpose(0, 1)), rules, params, x.transpose(0, 1))"
        )
    samples = {node: r for node, r in found.items() if node not in taps and r.ndim and len(r) == count}
    _check_apart(samples, rows)
    picked = iter([r[rows] if node in samples else r for node, r in found.items()])
    return tree.unflatten([next(picked) if isinstance(r, Tensor) else r for r in relevances], spec)


def _check_apart(samples: dict[fx.Node, Tensor], rows: Tensor) -> None:
    """Refuses a walk that mixes samples: what each is given would not be its own."""
    if not has_numbers([*samples.values(), rows]):
        return
    with torch.no_grad():
        for relevance in samples.values():
            others = relevance.detach().abs().index_fill(0, rows, 0)
            if others.numel() and others.amax() > TOLERANCE * relevance.detach().abs().amax():
                raise InputError(
                    "rows= walks back for some samples, and in this model relevance goes from one sample to another, "
                    f"up to {float(others.amax()):.3g} of it here, as it does through the statistics of a batch with "
                    "gradient(), or by attention across a batch. Start with zeros for the other samples instead:\n\n"
                    "    pullback(start)  # shaped like the whole output, zero where nothing should start"
                )


def is_apart(
    narrow: Callable[[Sequence[Message], Tensor], Any],
    whole: Callable[[Sequence[Message], Tensor], Any],
    form: type[Message],
    output: Any,
) -> bool:
    """Whether the walk for some samples alone gives what that for all of them gives, seen on every other sample.

    Relevance starts at random there: a target may start with zeros, and ask for samples that come last or for all.

    Args:
        narrow: From messages at some samples to the answer by their own walk; `None` if there is none.
        whole: The same by the walk for all samples.
        form: The form of the messages.
        output: The output.
    """
    outputs = [leaf for leaf in tree.leaves(output) if isinstance(leaf, Tensor)]
    picked = torch.arange(1, len(outputs[0]), 2, device=outputs[0].device)
    generator = torch.Generator().manual_seed(0)  # so that nobody's random numbers are drawn
    with outside_transforms(), torch.no_grad():
        drawn = (torch.randn(leaf[picked].shape, generator=generator).to(leaf) for leaf in outputs)
        start = [form(values) for values in drawn]  # type: ignore[call-arg]
        if (found := narrow(start, picked)) is None:
            return False
        try:
            expected = whole(start, picked)
        except InputError:  # samples are mixed
            return False
        pairs = [(a, b) for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True) if a is not None]
        return all(a.shape == b.shape and bool(b.any()) and _are_close(a, b) for a, b in pairs)


def _are_close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().amax() <= ROUNDING * other.abs().amax())
