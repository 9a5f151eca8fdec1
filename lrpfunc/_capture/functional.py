"""From a trace to a functional program: no mutation, no markers, no modes.

A trace is what the model function did, one thing after another. For a module with `act = nn.ReLU(inplace=True)` and

    y = x * 2
    self.act(y)
    with torch.no_grad():
        scale = y.mean()
    return y * scale

it is on the left, and the program on the right:

    mul = aten.mul.Tensor(x, 2)                    mul = aten.mul.Tensor(x, 2)
    alias = aten.alias.default(tick)               # `act` begins
    relu_ = aten.relu_.default(mul)                relu = aten.relu.default(mul)                # scopes: ("act",)
    alias_1 = aten.alias.default(relu_)            # `act` ends, and has returned `relu`
    _set_grad_enabled(False)
    mean = aten.mean.default(relu_)                mean = aten.mean.default(relu)               # no_grad: True
    _set_grad_enabled(True)
    mul_1 = aten.mul.Tensor(relu_, mean)           mul_1 = aten.mul.Tensor(relu, mean)
    return mul_1, alias, alias_1                   return mul_1

Every operation of the program says in its `meta` what was around it, so that it can be run by itself. Most are copied;
`HANDLERS` says which are not, and `State` what becomes of memory that is written to.
"""

from __future__ import annotations

from torch import Tensor, fx

from lrpfunc._capture.default import default
from lrpfunc._capture.expand import EXPANSIONS, expand
from lrpfunc._capture.inplace import WRITES
from lrpfunc._capture.kernels import ATTENTION_KERNELS, KERNELS
from lrpfunc._capture.program import Program
from lrpfunc._capture.state import Handler, State
from lrpfunc._capture.trace import Trace
from lrpfunc._ops.call import is_random, operation_name
from lrpfunc._torch import keeping_symbols


def functional(trace: Trace) -> Program:
    """The traced model function without side effects."""
    with keeping_symbols(None, trace.shapes is not None):
        return _functional(trace)


def _functional(trace: Trace) -> Program:
    nodes = list(trace.module.graph.nodes)
    tick, *placeholders = (node for node in nodes if node.op == "placeholder")
    returned = list(trace.module.graph.output_node().args[0])  # type: ignore[arg-type]
    markers = _markers(trace, returned)
    handlers = HANDLERS | ATTENTION_KERNELS if trace.after_dispatch else HANDLERS
    state = State(given=placeholders[trace.closed :], held={placeholders[place] for place in trace.held})
    given: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in markers:
            _mark(state, node, trace, *markers[node])
        elif node.op in ("placeholder", "get_attr") and node is not tick:
            given[node] = _input(state, node, trace)
        elif node.op == "call_function":
            handlers.get(operation_name(node), default)(state, node)

    results = [state.read(node) for node in returned[: len(returned) - trace.markers]]
    state.graph.output(tuple(results))
    drop_dead(state.graph)
    count = trace.outputs[0].count(None)
    inputs = [given[node] for node in placeholders]
    constants = [node for node in nodes if node.op == "get_attr"]
    closed: list[tuple[fx.Node, int | Tensor]] = [
        *((node, index) for index, node in enumerate(inputs[: trace.closed]) if node.users),
        *((given[node], trace.constants[str(node.target)]) for node in constants),
    ]
    return Program(
        graph=state.graph,
        inputs=inputs[trace.closed :],
        closed=closed,
        outputs=results[:count],
        output_spec=trace.outputs,
        aux=results[count:],
        aux_spec=trace.aux,
        modules=_modules(state, trace, markers),
        numbers=trace.numbers,
        module_types=trace.module_types,
        shapes=trace.shapes,
    )


# -- inputs, and the modes of torch


def _input(state: State, node: fx.Node, trace: Trace) -> fx.Node:
    new = state.graph.placeholder(node.name)
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        value = getattr(trace.module, str(node.target))
        node.meta["val"] = value
    new.meta = {"val": value, "scopes": (), "no_grad": False, "autocast": ()}
    state.define(node, new)
    return new


def _set_grad_enabled(state: State, node: fx.Node) -> None:
    state.no_grad = not node.args[0]


def _enter_autocast(state: State, node: fx.Node) -> None:
    device, dtype, enabled, cache = (*node.args, *([None] * (4 - len(node.args))))
    state.autocast[node] = (device, dtype, True if enabled is None else enabled, cache)


def _exit_autocast(state: State, node: fx.Node) -> None:
    state.autocast.pop(node.args[0], None)  # type: ignore[arg-type]


HANDLERS: dict[str, Handler] = {
    "_set_grad_enabled": _set_grad_enabled,
    "_enter_autocast": _enter_autocast,
    "_exit_autocast": _exit_autocast,
    **dict.fromkeys(EXPANSIONS, expand),
    **KERNELS,
    **WRITES,
}
"""By the name of the operation; what has none here is served by `default`."""


# -- where modules begin and end

_Place = tuple[int, int]
"""An event, and one of the markers that it left."""


def _markers(trace: Trace, returned: list[fx.Node]) -> dict[fx.Node, _Place]:
    """The nodes whose only purpose is to mark, which are the last that the trace returns."""
    places = [
        (event, place)
        for event, (_, _, marked, _) in enumerate(trace.events)
        for place, is_marked in enumerate(marked)
        if is_marked
    ]
    return dict(zip(returned[len(returned) - len(places) :], places, strict=True))


def _mark(state: State, node: fx.Node, trace: Trace, event: int, place: int) -> None:
    kind, path, marked, _ = trace.events[event]
    if place > 0:
        state.define(node, state.read(node.args[0]))  # type: ignore[arg-type]
    if kind == "enter":
        state.scopes.append(path)
    elif not any(marked[:place]):
        state.scopes.pop()


def _modules(
    state: State, trace: Trace, markers: dict[fx.Node, _Place]
) -> list[tuple[str, list[fx.Node | None], object]]:
    """The name of each module, what it returned as far as that is in the graph, and the structure of that."""
    alive = set(state.graph.nodes)
    marks = {place: state.read(node) for node, place in markers.items() if place[1] > 0}
    modules = []
    for event, (kind, path, marked, spec) in enumerate(trace.events):
        if kind == "exit":
            leaves = [marks.get((event, place)) for place in range(1, len(marked))]
            modules.append((path, [leaf if leaf in alive else None for leaf in leaves], spec))
    return modules


def drop_dead(graph: fx.Graph) -> None:
    """Drops what no output needs; random operations stay, for the next one draws what follows."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and not is_random(node):
            graph.erase_node(node)
