"""From a trace to a functional program: no mutation, no markers, no modes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lrpfunc import _tree as tree
from lrpfunc._capture.expand import EXPANSIONS
from lrpfunc._capture.program import Program, is_float
from lrpfunc._capture.trace import Trace
from lrpfunc._errors import CaptureError
from lrpfunc._ops.call import REWRITTEN, is_random, operation_name
from lrpfunc._ops.functions import (
    as_computed,
    assigned,
    batch_norm_eval,
    batch_norm_train,
    batch_statistics,
    copied,
    dropout_mask,
    filled,
    fused,
    overwrite,
    scaled_dot_product_attention,
    zeroed,
)
from lrpfunc._ops.strided import free_of_layout
from lrpfunc._ops.table import SHAPED_LIKE
from lrpfunc._torch import OpOverload, aten, map_arg, schema, set_grad_enabled, storage_of

_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")

# What a trace after dispatch has in place of a batch norm, and the same where it writes to nothing.
_BATCH_NORM_KERNELS: dict[str, Any] = {
    "native_batch_norm": aten.native_batch_norm.default,
    "_native_batch_norm_legit": aten.native_batch_norm.default,
    "cudnn_batch_norm": aten.cudnn_batch_norm.default,
}
# And in place of other operations that it does not show whole.
_KERNELS: dict[str, Any] = {
    "native_layer_norm": aten.layer_norm.default,
    "log_sigmoid_forward": aten.log_sigmoid.default,
}


@dataclass(frozen=True)
class _Step:
    """One view operation: how a view is derived from its base."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    like: Any
    no_grad: bool


@dataclass(frozen=True)
class _View:
    """A chain of view operations as one function: where in the base a view lies."""

    chain: tuple[_Step, ...]

    def __call__(self, base: Any) -> Any:
        for step in self.chain:
            if step.target is aten.detach.default:
                continue  # in the same place
            base = step.target(base, *step.args, **step.kwargs)
        return base


def _storages(node: fx.Node) -> set[int]:
    leaves = tree.leaves(node.meta.get("val"))
    return {storage_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)}


def _overlaps(x: Tensor) -> bool:
    """Whether elements may share memory."""
    reach = 0
    for step, n in sorted((step, n) for step, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if step <= reach:
            return True
        reach += step * (n - 1)
    return False


class _Functionalizer:
    """Copies a traced graph node by node; memory that is changed in place gets a node per version.

    Nodes that share memory have one `root`. The memory's current content is `base[root]`, and each of the nodes is
    derived from it by its chain of views, anew whenever it was written to since.
    """

    def __init__(self, trace: Trace):
        self.trace = trace
        self.graph = fx.Graph()
        self.current: dict[fx.Node, Any] = {}
        self.root: dict[fx.Node, fx.Node] = {}
        self.base: dict[fx.Node, Any] = {}
        self.chain: dict[fx.Node, tuple[_Step, ...]] = {}
        self.version: dict[fx.Node, int] = {}
        self.made: dict[fx.Node, int] = {}
        self.scopes: list[str] = []
        self.no_grad = False
        self.autocast: dict[fx.Node, tuple[Any, ...]] = {}

    # -- reading and writing tensors of the traced graph

    def emit(self, target: Any, args: Any, kwargs: Any = None, like: Any = None) -> fx.Node:
        node = self.graph.call_function(target, tuple(args), kwargs or {})
        node.meta = {
            "val": like,
            "scopes": tuple(self.scopes),
            "no_grad": self.no_grad,
            "autocast": tuple(self.autocast.values()),
        }
        return node

    def step(self, node: fx.Node, target: Any) -> _Step:
        return _Step(target, node.args[1:], dict(node.kwargs), node.meta.get("val"), self.no_grad)

    def define(self, old: fx.Node, new: Any) -> None:
        """Says that `old` is `new`, in memory of its own."""
        self.current[old] = self.base[old] = new
        self.root[old], self.chain[old] = old, ()
        self.version[old] = self.made[old] = 0

    def define_view(self, old: fx.Node, new: Any, parent: fx.Node, *steps: _Step) -> None:
        """Says that `old` is `new`, a view of `parent`."""
        self.current[old] = new
        self.root[old], self.chain[old] = self.root[parent], (*self.chain[parent], *steps)
        self.made[old] = self.version[self.root[old]]

    def read(self, old: fx.Node) -> fx.Node:
        root = self.root[old]
        if self.made[old] != self.version[root]:
            value = self.base[root]
            for step in self.chain[old]:
                value = self.emit(step.target, (value, *step.args), step.kwargs, step.like)
                value.meta["no_grad"] = step.no_grad
            self.current[old], self.made[old] = value, self.version[root]
        return self.current[old]

    def write(self, old: fx.Node, new: fx.Node) -> None:
        root = self.root[old]
        if root.op != "call_function":
            self._refuse(root)
        base, chain = self.base[root], self.chain[old]
        if chain and _overlaps(chain[-1].like):
            raise CaptureError(
                "the model function writes through a view whose elements may share memory (as_strided, unfold, "
                "expand), where it is not clear which value stays. Write to a clone of it"
            )
        like = base.meta["val"]
        content = self.emit(overwrite, (base, new, _View(chain)), None, like) if chain else new
        if self.no_grad or any(step.target is aten.detach.default for step in chain):
            # A tensor keeps its history when it is written to without gradients, however often.
            history = base.args[0] if base.target is assigned else base
            content = self.emit(assigned, (history, self.emit(aten.detach.default, (content,), None, like)), None, like)
            content.meta["no_grad"] = False
        self.base[root] = content
        self.version[root] += 1
        if content is new:
            self.current[old], self.made[old] = new, self.version[root]

    def _refuse(self, root: fx.Node) -> None:
        placeholders = [node for node in self.trace.module.graph.nodes if node.op == "placeholder"][1:]
        kind = "closes over" if root not in placeholders[self.trace.closed :] else "was given"
        scope = self.scopes[-1] if self.scopes else ""
        raise CaptureError(
            f"the model function changes in place a tensor of shape {tuple(root.meta['val'].shape)} that it {kind}"
            + (f", in the module `{scope}`. " if scope else ". ")
            + "A function that is transformed must leave its arguments alone. The usual reason is a batch norm in "
            "training mode, which updates its running statistics: capture it with\n\n"
            "    model_fn, params = lrpfunc.from_module(module, return_buffers=True)\n"
            "    relevance_fn = lrpfunc.attribute(model_fn, rules, has_aux=True)   # aux: the updated buffers\n\n"
            "or call module.eval(). For an operation such as `x += 1`, write `x = x + 1`"
        )

    # -- one traced node at a time

    def run(self) -> None:
        markers = self._markers()
        tick, *_ = self.trace.module.graph.nodes
        for node in self.trace.module.graph.nodes:
            if node in markers:
                self._mark(node, *markers[node])
            elif node.op in ("placeholder", "get_attr"):
                if node is not tick:
                    self._input(node)
            elif node.op == "call_function":
                self._call(node)

    def _markers(self) -> dict[fx.Node, tuple[int, int]]:
        """The nodes whose only purpose is to mark: the event each belongs to, and its place there."""
        returned = self._returned()
        markers = {}
        position = len(returned) - self.trace.markers
        for event, (_, _, marked, _) in enumerate(self.trace.events):
            for place, is_marked in enumerate(marked):
                if is_marked:
                    markers[returned[position]] = (event, place)
                    position += 1
        return markers

    def _returned(self) -> list[fx.Node]:
        (output,) = (node for node in self.trace.module.graph.nodes if node.op == "output")
        return list(output.args[0])

    def _mark(self, node: fx.Node, event: int, place: int) -> None:
        kind, path, marked, _ = self.trace.events[event]
        if place > 0:
            self.current[node] = self.read(node.args[0])  # type: ignore[arg-type]
        if kind == "enter":
            self.scopes.append(path)
        elif not any(marked[:place]):
            self.scopes.pop()

    def _input(self, node: fx.Node) -> None:
        new = self.graph.placeholder(node.name)
        value = node.meta.get("val")
        if value is None and node.op == "get_attr":
            value = getattr(self.trace.module, str(node.target))
            node.meta["val"] = value
        new.meta = {"val": value, "scopes": (), "no_grad": False, "autocast": ()}
        self.define(node, new)

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        name = operation_name(node)
        if target is set_grad_enabled:
            self.no_grad = not node.args[0]
        elif name == "_enter_autocast":
            device, dtype, enabled, cache = (*node.args, *([None] * (4 - len(node.args))))
            self.autocast[node] = (device, dtype, True if enabled is None else enabled, cache)
        elif name == "_exit_autocast":
            self.autocast.pop(node.args[0], None)  # type: ignore[arg-type]
        elif name in ("batch_norm", *_BATCH_NORM_KERNELS):
            self._batch_norm(node)
        elif name == "instance_norm" and node.args[3] is not None and node.args[5]:
            self._refuse(node.args[3])  # type: ignore[arg-type]
        elif name.removesuffix("_") in _DROPOUTS and not (node.args[1] and node.args[2]):
            # The result is the operand itself, and a write to one is a write to both.
            self.define_view(node, self.read(node.args[0]), node.args[0])  # type: ignore[arg-type]
        elif name in ("dropout", "feature_dropout", "dropout_", "feature_dropout_"):
            self._dropout(node, name)
        elif name == "native_dropout" and node.args[2] is not False:
            self._dropout_kernel(node)
        elif name in _KERNELS:
            args, kwargs = self._mapped(node)
            new = self.emit(_KERNELS[name], args, kwargs, node.meta["val"][0])
            self._define_kernel(node, new, target, args, kwargs)
        elif isinstance(target, OpOverload) and schema(target).is_mutable:
            self._mutation(node)
        elif name in EXPANSIONS and is_float(node):
            self._expand(node, name)
        elif name.startswith("_scaled_dot_product_") and not name.endswith("_backward") and self.trace.after_dispatch:
            self._attention(node)
        else:
            self._plain(node)

    def _mapped(self, node: fx.Node) -> tuple[Any, Any]:
        return map_arg((node.args, node.kwargs), self.read)  # type: ignore[return-value]

    def _plain(self, node: fx.Node) -> None:
        if node.target is operator.getitem and isinstance(self.current[node.args[0]], tuple):  # type: ignore[index]
            return self.define(node, self.current[node.args[0]][node.args[1]])  # type: ignore[index]
        args, kwargs = self._mapped(node)
        target: Any = REWRITTEN.get(node.target, node.target)
        if target is scaled_dot_product_attention:
            args = self._apart(args)
        if operation_name(node) in SHAPED_LIKE:  # of the other tensor, only the shape or dtype matters
            target, of = SHAPED_LIKE[operation_name(node)]
            args, kwargs = (args[0], of(node.meta["val"])), {}
        target, kwargs = free_of_layout(target, node.args, kwargs)
        new = self.emit(target, args, kwargs, node.meta.get("val"))
        viewed = self._viewed(node)
        if viewed is None or self._is_result(viewed):
            self.define(node, new)
        else:
            self.define_view(node, new, viewed, _Step(target, args[1:], kwargs, node.meta["val"], self.no_grad))

    def _apart(self, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        """The operands, with another name for one that stands at several places: each has a part of its own."""
        seen: set[Any] = set()
        apart = []
        for operand in operands:
            if isinstance(operand, fx.Node) and operand in seen:
                operand = self.emit(aten.alias.default, (operand,), None, operand.meta["val"])
            seen.add(operand)
            apart.append(operand)
        return tuple(apart)

    def _expand(self, node: fx.Node, name: str) -> None:
        """A fused operation, and what it does written out for the walk."""
        args, kwargs = self._mapped(node)
        outputs = EXPANSIONS[name](self._emit_anew, *args, **kwargs)
        if outputs is None:
            return self._plain(node)
        value = node.meta["val"]
        whole = self.emit(fused, (node.target, *args), kwargs, value)
        likes = (value,) if isinstance(value, Tensor) else value
        new = tuple(
            self.emit(as_computed, (written, whole, index), None, like)
            for index, (written, like) in enumerate(zip(outputs, likes, strict=True))
        )
        self.define(node, new[0] if isinstance(value, Tensor) else new)

    def _emit_anew(self, target: Any, *args: Any, signal: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """An operation that the trace does not have."""
        fakes, fake_kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        node = self.emit(target, args, kwargs, target(*fakes, **fake_kwargs))
        if signal is not None:
            node.meta["signal"] = signal
        return node

    def _attention(self, node: fx.Node) -> None:
        """A fused kernel, which a trace after dispatch has, as the operation that chose it."""
        args, kwargs = self._mapped(node)
        call = dict(zip((a.name for a in schema(node.target).arguments), args, strict=False)) | kwargs
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        defaults = {"attn_mask": call.get("attn_bias"), "dropout_p": 0.0, "is_causal": False}
        operands = [call.get(name, defaults.get(name)) for name in names]
        heads = [call[name].meta["val"].shape[-3] for name in ("query", "key")]
        new = self.emit(
            scaled_dot_product_attention,
            self._apart(tuple(operands)),
            {"scale": call.get("scale"), "enable_gqa": heads[0] != heads[1]},
            node.meta["val"][0],
        )
        self._define_kernel(node, new, node.target, args, kwargs)

    def _is_result(self, node: fx.Node) -> bool:
        """Whether `node` is what an operation returned, several new tensors; each has memory of its own."""
        return not isinstance(node.meta.get("val"), Tensor) and self.root[node] is node

    def _viewed(self, node: fx.Node) -> fx.Node | None:
        """The operand that `node` is a view of: the one whose memory it shares."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or first not in self.root:
            return None
        if node.target in (aten.detach.default, aten.alias.default) or _storages(node) & _storages(first):
            return first
        return None

    def _mutation(self, node: fx.Node) -> None:
        target: Any = node.target
        written = [i for i, a in enumerate(schema(target).arguments) if a.alias_info and a.alias_info.is_write]
        found = self._functional(target)
        if written != [0] or found is None or not isinstance(node.args[0], fx.Node):
            raise CaptureError(
                f"the operation `{target}` changes a tensor in place and has no form without side effects that "
                "lrpfunc knows. Write it with the operation that returns its result"
            )
        old = node.args[0]
        args, kwargs = self._mapped(node)
        probability = (0.5,) if operation_name(node) == "bernoulli_" and len(args) == 1 else ()  # the default
        before, after = old.meta["val"], node.meta["val"]
        new = self.emit(found, (*args, *probability), kwargs, after)
        if before.shape != after.shape or before.stride() != after.stride():
            # unsqueeze_, t_: no new numbers, but both names now mean another view of the same memory
            for name in (old, node):
                self.define_view(name, new, old, *([] if name is node else [self.step(node, found)]))
            return
        if found is not copied:
            new = self._keep_dtype(new, args[0], after)
        self.write(old, new)
        self.define_view(node, self.read(old), old)

    def _keep_dtype(self, new: fx.Node, old: fx.Node, like: Tensor) -> fx.Node:
        """An operation in place keeps its tensor's dtype where the functional one would promote."""
        dtypes = {arg.meta["val"].dtype for arg in new.all_input_nodes if isinstance(arg.meta["val"], Tensor)}
        return new if dtypes == {like.dtype} else self.emit(copied, (old, new), None, like)

    @staticmethod
    def _functional(target: Any) -> Any:
        """The operation that returns what `target` writes, found by the types of its arguments."""
        name = schema(target).name.removeprefix("aten::")
        special = {"copy_": copied, "fill_": filled, "zero_": zeroed, "detach_": aten.detach.default}
        if name in special:
            return special[name]
        name = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
        packet: Any = getattr(aten, name, None)
        types = [str(a.type) for a in schema(target).arguments]
        for overload in packet.overloads() if packet is not None else ():
            found = getattr(packet, overload)
            if [str(a.type) for a in schema(found).arguments] == types and not schema(found).is_mutable:
                return REWRITTEN.get(found, found)
        return None

    def _dropout(self, node: fx.Node, name: str) -> None:
        old: Any = node.args[0]
        (x, p, _), _ = self._mapped(node)
        like = node.meta["val"]
        mask = self.emit(dropout_mask, (x, p, name.removesuffix("_")), None, like)
        new = self.emit(aten.mul.Tensor, (x, mask), None, like)
        if name.endswith("_"):
            self.write(old, new)
            self.define_view(node, self.read(old), old)
        else:
            self.define(node, new)

    def _dropout_kernel(self, node: fx.Node) -> None:
        (x, p, *_), _ = self._mapped(node)
        like, kept = node.meta["val"]
        mask = self.emit(dropout_mask, (x, p, "dropout"), None, like)
        new = self.emit(aten.mul.Tensor, (x, mask), None, like)
        self.define(node, (new, self.emit(aten.ne.Scalar, (mask, 0), None, kept)))

    def _batch_norm(self, node: fx.Node) -> None:
        args: Any = self._mapped(node)[0]
        if node.target is aten._native_batch_norm_legit.no_stats:
            args = (*args[:3], None, None, *args[3:])
        x, weight, bias, mean, var, training, momentum, eps, *_ = args
        is_kernel = operation_name(node) in _BATCH_NORM_KERNELS
        like = node.meta["val"][0] if is_kernel else node.meta["val"]
        if not training:
            new = self.emit(batch_norm_eval, (x, weight, bias, mean, var, eps), None, like)
        else:
            new = self.emit(batch_norm_train, (x, weight, bias, eps), None, like)
            self._update_statistics(node, x, mean, var, momentum)
        if not is_kernel:
            return self.define(node, new)
        kernel = _BATCH_NORM_KERNELS[operation_name(node)]
        statistics = (None, None) if training else (mean, var)  # a kernel would write to them
        self._define_kernel(node, new, kernel, (x, weight, bias, *statistics, training, momentum, eps))

    def _define_kernel(self, node: fx.Node, first: fx.Node, kernel: Any, args: Any, kwargs: Any = None) -> None:
        """Says that the first result of a kernel is `first`.

        The others are read by the kernels of derivatives inside the model function. Those have, as derivatives of
        their own with respect to the input, all of what depends on it.
        """
        whole = self.emit(kernel, args, kwargs, node.meta["val"])
        results = [first]
        for index, like in enumerate(node.meta["val"][1:], 1):
            result = self.emit(operator.getitem, (whole, index), None, like)
            results.append(self.emit(aten.detach.default, (result,), None, like))
        self.define(node, tuple(results))

    def _update_statistics(self, node: fx.Node, x: fx.Node, mean: Any, var: Any, momentum: float) -> None:
        if mean is None and var is None:
            return
        statistics = self.emit(batch_statistics, (x, mean, var, momentum), None, None)
        for index, old in enumerate(node.args[3:5]):
            if isinstance(old, fx.Node):
                like = old.meta["val"]
                self.write(old, self.emit(operator.getitem, (statistics, index), None, like))


def functional(trace: Trace) -> Program:
    """The traced model function without side effects."""
    functionalizer = _Functionalizer(trace)
    functionalizer.run()
    current = functionalizer.current
    returned = functionalizer._returned()
    results = [functionalizer.read(node) for node in returned[: len(returned) - trace.markers]]
    count = trace.outputs[0].count(None)
    functionalizer.graph.output(tuple(results))
    _drop_dead(functionalizer.graph)

    alive = set(functionalizer.graph.nodes)
    markers = {place: node for node, place in functionalizer._markers().items()}
    modules = []
    for event, (kind, path, marked, spec) in enumerate(trace.events):
        if kind == "exit":
            leaves = [current[markers[event, i]] if m else None for i, m in enumerate(marked[1:], 1)]
            modules.append((path, [leaf if leaf in alive else None for leaf in leaves], spec))
    placeholders = [current[node] for node in trace.module.graph.nodes if node.op == "placeholder" and node in current]
    constants = [node for node in trace.module.graph.nodes if node.op == "get_attr"]
    closed: list[tuple[fx.Node, int | Tensor]] = [
        *((node, index) for index, node in enumerate(placeholders[: trace.closed]) if node.users),
        *((current[node], trace.constants[str(node.target)]) for node in constants),
    ]
    return Program(
        graph=functionalizer.graph,
        inputs=placeholders[trace.closed :],
        closed=closed,
        outputs=results[:count],
        output_spec=trace.outputs,
        aux=results[count:],
        aux_spec=trace.aux,
        modules=modules,
    )


def _drop_dead(graph: fx.Graph) -> None:
    """Drops what no output needs; random operations stay, for the next one draws what follows."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and not is_random(node):
            graph.erase_node(node)
