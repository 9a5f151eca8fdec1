"""Operators that relevance cannot pass as they are, written out as others that it can.

The forward pass still runs the operator; the walk goes through its pieces. What they are is said in `written`, or by
torch's own table of decompositions. For `cross(x, y)` that is

    cross = aten.linalg_cross.default(x, y)                        fused = fused(aten.linalg_cross.default, x, y)
    return cross                                                   index_select = aten.index_select.default(x, ...)
                                                                   ...
                                                                   sub = aten.sub.Tensor(mul, mul_1)
                                                                   as_computed = as_computed(sub, fused, 0)
                                                                   return as_computed
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._capture.default import default
from lrpfunc._capture.expand import Written, define_written
from lrpfunc._capture.functional import HANDLERS, drop_dead
from lrpfunc._capture.isolation import isolated
from lrpfunc._capture.kernels import ATTENTION_KERNELS
from lrpfunc._capture.program import Program
from lrpfunc._capture.shapes import inlined
from lrpfunc._capture.state import State
from lrpfunc._capture.written import WRITTEN, broadcast
from lrpfunc._ops.call import is_random, of, operation_name
from lrpfunc._torch import decomposition, keeping_symbols, make_fx, map_arg

_HANDLERS = HANDLERS | ATTENTION_KERNELS


def written_out(program: Program, chosen: Collection[fx.Node]) -> tuple[Program, dict[fx.Node, Any]]:
    """The program with some of its operations written out.

    Args:
        program: The program, which stays as it is.
        chosen: The operations.

    Returns:
        The new program, and what each node of the old one is in it. The `meta` of the pieces has in `piece_of` the
        operations that they are pieces of, the whole first. What cannot be written out is there as it was.
    """

    def written() -> tuple[Program, dict[fx.Node, Any]]:
        with keeping_symbols(None, program.shapes is not None):
            return _written_out(program, chosen)

    return isolated(written)


def _written_out(program: Program, chosen: Collection[fx.Node]) -> tuple[Program, dict[fx.Node, Any]]:
    state = State(given=(), held=set())
    new: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            copy = state.graph.placeholder(node.name)
            copy.meta = dict(node.meta)
            state.define(node, copy)
        elif node.op == "call_function" and not (node in chosen and _write_out(state, node)):
            _copy(state, node)
        if node.op != "output":
            new[node] = state.read(node)

    outputs, aux = [new[node] for node in program.outputs], [new[node] for node in program.aux]
    state.graph.output((*outputs, *aux))
    drop_dead(state.graph)
    written = Program(
        graph=state.graph,
        inputs=[new[node] for node in program.inputs],
        closed=[(new[node], source) for node, source in program.closed],
        outputs=outputs,
        output_spec=program.output_spec,
        aux=aux,
        aux_spec=program.aux_spec,
        modules=[(name, [leaf and new[leaf] for leaf in leaves], spec) for name, leaves, spec in program.modules],
        numbers=program.numbers,
        module_types=program.module_types,
        shapes=program.shapes,
    )
    return written, new


def _copy(state: State, node: fx.Node) -> None:
    args, kwargs = state.operands(node)
    if node.target is operator.getitem and isinstance(args[0], tuple):
        return state.define(node, args[0][args[1]])
    new = state.emit(node.target, args, kwargs)
    new.meta = dict(node.meta)
    if "signal" in node.meta:
        new.meta["signal"] = state.read(node.meta["signal"])
    state.define(node, new)


# What a forward kernel saves for them has no derivative of its own: torch's derivative of these includes it, and that
# of their pieces would lack it.
_READ_WHAT_IS_SAVED = frozenset(
    {
        *("native_layer_norm_backward", "native_group_norm_backward", "_fused_rms_norm_backward"),
        *("native_batch_norm_backward", "cudnn_batch_norm_backward", "miopen_batch_norm_backward"),
        *("batch_norm_backward", "log_sigmoid_backward", "rrelu_with_noise_backward"),
    }
)


def _write_out(state: State, node: fx.Node) -> bool:
    """Whether an operation could be written out; nothing is left behind if not."""
    whole = node.meta.get("piece_of", ())
    if node.meta["autocast"] or node.target in {piece.target for piece in whole}:
        return False
    if operation_name(node) in _READ_WHAT_IS_SAVED:
        return False
    state.scopes, state.no_grad = list(node.meta["scopes"]), node.meta["no_grad"]
    count = len(state.graph.nodes)
    args, kwargs = state.operands(node)
    if own := WRITTEN.get(operation_name(node)):
        outputs = own(state.emit_new, *args, **kwargs)
    elif _broadcasts(node):
        outputs = broadcast(state.emit_new, node.target, *args, **kwargs)
    else:
        outputs = _pieces(state, node)
    is_written = outputs is not None and _fits(outputs, node)
    if outputs is not None and is_written:
        define_written(state, node, outputs)
    for piece in list(state.graph.nodes)[: count - 1 : -1]:
        if is_written:
            piece.meta["piece_of"] = (*whole, node)
        else:
            state.graph.erase_node(piece)
    return is_written


def _broadcasts(node: fx.Node) -> bool:
    """Whether a pointwise operation of one tensor and constants repeats the elements of the tensor."""
    shape = node.meta["val"].shape if isinstance(node.meta["val"], Tensor) else None
    operands = [a.meta["val"] for a in node.args if isinstance(a, fx.Node)]
    return of(node).pointwise and shape is not None and any(operand.shape != shape for operand in operands)


def _fits(outputs: Written, node: fx.Node) -> bool:
    """Whether these are the outputs of the operation, as far as anybody uses them."""
    value = node.meta["val"]
    likes = (value,) if isinstance(value, Tensor) else value
    used = [user.args[1] for user in node.users if user.target is operator.getitem and user.users]
    if len(outputs) != len(likes) or any(output is None and index in used for index, output in enumerate(outputs)):
        return False
    return all(
        isinstance(like, Tensor)
        and (o is None or (like.shape, like.dtype) == (o.meta["val"].shape, o.meta["val"].dtype))
        for o, like in zip(outputs, likes, strict=True)
    )


def _pieces(state: State, node: fx.Node) -> Written | None:
    """What torch itself expands an operation to; `None` if that is nothing, or cannot be recorded."""
    function = decomposition(node.target)
    if function is None:
        return None
    arguments = state.operands(node)
    operands: list[fx.Node] = []
    map_arg(arguments, operands.append)  # type: ignore[arg-type]

    def expanded(tensors: list[Tensor]) -> Any:
        given = dict(zip(operands, tensors, strict=True))
        args, kwargs = map_arg(arguments, given.__getitem__)
        return tree.leaves(function(*args, **kwargs))

    try:
        graph = make_fx(expanded, decomposition_table={})([operand.meta["val"] for operand in operands]).graph
        inlined(graph)
    except Exception:  # of whatever kind: one asks for numbers, another does not know tensors without them
        return None
    inner = [n for n in graph.nodes if n.op == "call_function"]
    if any(n.op == "get_attr" for n in graph.nodes) or any(n.target is node.target or is_random(n) for n in inner):
        return None
    for placeholder, operand in zip((n for n in graph.nodes if n.op == "placeholder"), operands, strict=True):
        state.define(placeholder, operand)
    for n in inner:
        _HANDLERS.get(operation_name(n), default)(state, n)
    return tuple(state.read(n) for n in graph.output_node().args[0])  # type: ignore[union-attr]
