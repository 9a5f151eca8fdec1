"""A functional program as a list of layers, with what is known of them before any number is."""

from __future__ import annotations

import enum
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from lrpfunc import _operations as ops
from lrpfunc._simplify import Affine, Program, merge
from lrpfunc._simplify.merge import affine
from lrpfunc._torch import jvp, map_arg, vjp


class Kind(enum.StrEnum):
    """What a layer is, for the choice of its rule."""

    DENSE = "Dense"
    CONVOLUTION = "Convolution"
    SUM = "Sum"
    AVERAGE = "AvgPool"
    LINEAR = "Linear"
    SCALE = "Scale"
    SELECT = "Select"
    WINNER = "Winner"
    BATCH_NORM = "BatchNorm"
    ACTIVATION = "Activation"
    PRODUCT = "Product"
    NORMALIZATION = "Normalization"
    NON_LINEAR = "Non-linear"


STRUCTURAL = frozenset({Kind.SELECT, Kind.WINNER, Kind.SCALE})
"""Kinds that only move or scale what they are given; composites do not see them."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One step from the explained input to the output: an operation, or several that are explained as one.

    Selectors and rules see these attributes; the nodes are the walk's.

    Attributes:
        kind: What the layer is.
        name: The module's path, with `@k` for its call `k > 0`; in a function without modules the path of the
            layer's parameter, or the operation's name, likewise numbered.
        operation: The name of the torch operation, such as `"conv2d"`.
        modules: The paths of all modules around the operation, from the outside in.
        depth: The share of the way through the dense layers and convolutions, from 0 to 1.
        linear: Whether the layer is affine in its inputs, so that it needs no rule.
        nonnegative: Whether the input is known to be non-negative.
        siblings: All layers on a path from the explained input to the output, in order of execution.
    """

    kind: Kind
    name: str
    operation: str
    modules: tuple[str, ...]
    depth: float
    linear: bool
    nonnegative: bool
    siblings: Sequence[Layer]
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    taps: tuple[fx.Node, ...]
    outputs: tuple[fx.Node | None, ...]
    affine: Affine | None
    is_tap: bool = False

    @property
    def output(self) -> fx.Node:
        """The one output of a layer that has one."""
        (output,) = (node for node in self.outputs if node is not None)
        return output

    @property
    def places(self) -> int:
        """How many operands the inputs are: more than there are inputs in `x * x`."""
        operands = pytree.tree_leaves([(node.args, node.kwargs) for node in self.nodes])
        return sum(operands.count(node) for node in self.inputs)

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(node.meta["val"].shape) for node in self.inputs)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return next(tuple(node.meta["val"].shape) for node in self.outputs if node is not None)

    def __repr__(self) -> str:
        shapes = ", ".join(map(str, self.input_shapes))
        return f"{self.name}   {self.operation}   {shapes} -> {self.output_shape}"


@dataclass(frozen=True)
class BoundLayer:
    """A layer with the values of one forward pass: what a rule computes with.

    Attributes:
        layer: The layer.
        values: The value of every node.
    """

    layer: Layer
    values: Mapping[fx.Node, Any]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The activations that depend on the explained input."""
        return tuple(self.values[node] for node in self.layer.inputs)

    @property
    def input(self) -> Tensor:
        (x,) = self.inputs
        return x

    @property
    def output(self) -> Tensor:
        return self.values[self.layer.output]

    @cached_property
    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """The effective weight and bias of a dense layer or convolution, a merged batch norm included."""
        assert self.layer.affine is not None
        return self.layer.affine.parameters(self.values)

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        r""":math:`f(x; W, b)` of a dense layer or convolution, shaped like the output."""
        assert self.layer.affine is not None
        return self.layer.affine(self.values, x, weight, bias)

    def transpose(self, s: Tensor, weight: Tensor) -> Tensor:
        r""":math:`J_W^T(s)`, shaped like the input."""
        _, pullback = vjp(lambda x: self.affine(x, weight, None), self.input)
        return pullback(s.to(self.output.dtype))[0]

    def shift(self, bias: Tensor | None) -> Tensor:
        """What the bias adds to each element of the output."""
        x = torch.zeros_like(self.input)
        return self.affine(x, torch.zeros_like(self.parameters[0]), bias)

    def function(self, wrt: Sequence[fx.Node]) -> Callable[..., Any]:
        """The layer as a function of some of its operands."""

        def evaluate(*tensors: Tensor) -> Any:
            inner: dict[fx.Node, Any] = dict(zip(wrt, tensors, strict=True))

            def read(node: fx.Node) -> Any:
                return inner[node] if node in inner else self.values[node]

            for node in self.layer.nodes:
                args, kwargs = map_arg((node.args, node.kwargs), read)
                inner[node] = ops.call(node, args, kwargs, walking=True)
            result = inner[self.layer.nodes[-1]]
            if isinstance(result, Tensor):
                return result
            return tuple(result[i] for i, node in enumerate(self.layer.outputs) if node is not None)

        return evaluate

    def vjp(self, *cotangents: Tensor, wrt: Sequence[fx.Node] | None = None) -> tuple[Tensor, ...]:
        """The plain VJP, with respect to the inputs unless told otherwise."""
        wrt = self.layer.inputs if wrt is None else wrt
        output, pullback = vjp(self.function(wrt), *(self.values[node] for node in wrt))
        return pullback(cotangents[0] if isinstance(output, Tensor) else tuple(cotangents))

    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The derivative in a direction, one tensor an output."""
        tangent = jvp(self.function(self.layer.inputs), self.inputs, tuple(tangents))
        return (tangent,) if isinstance(tangent, Tensor) else tangent

    def at_zero(self) -> Tensor:
        """The output for inputs of zero: the constants of an affine layer."""
        return self.function(self.layer.inputs)(*map(torch.zeros_like, self.inputs))


@dataclass(eq=False)
class Graph:
    """The layers between what is explained and the output.

    Attributes:
        program: The whole forward pass.
        sources: The nodes of the explained leaves, `None` for an integer leaf.
        on_path: The nodes from which relevance may come to what is explained.
        starts: The nodes at which relevance ends its way: those leaves, or the layers explained in their place.
        layers: In order of execution.
        entries: Where `layers=` may ask for relevance: name, leaves (`None`: no relevance there) and spec.
    """

    program: Program
    sources: list[fx.Node | None]
    on_path: set[fx.Node]
    starts: list[fx.Node]
    layers: list[Layer]
    entries: list[tuple[str, list[fx.Node | None], Any]]


def _is_float(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves)


def _reached(program: Program, seeds: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend, differentiably, on the seeds."""
    reached = set(seeds)
    for node in program.graph.nodes:
        if node.op != "call_function" or node.meta["no_grad"] or not _is_float(node):
            continue
        if ops.operation_name(node) not in ops.UNDIFFERENTIABLE and any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return reached


def _leading_to(outputs: Iterable[fx.Node], reached: set[fx.Node]) -> set[fx.Node]:
    """The nodes among `reached` from which a path through such nodes leads to an output."""
    leading: set[fx.Node] = set()
    pending = [node for node in outputs if node in reached]
    while pending:
        node = pending.pop()
        if node not in leading:
            leading.add(node)
            pending.extend(n for n in node.all_input_nodes if n in reached)
    return leading


def build_graph(
    program: Program, data: Sequence[fx.Node], taps: Sequence[fx.Node], sources: list[fx.Node | None]
) -> Graph:
    """The layers that depend on `data`, or on parameters that are explained themselves, the `taps`."""
    active = _reached(program, data)
    tapped = _reached(program, taps) - active
    on_path = _leading_to(program.outputs, active | tapped)
    kept = set(program.outputs)
    layers: list[Layer] = []
    merged: dict[fx.Node, Layer] = {}
    heads = _affines(program, active, on_path, kept)
    tails = {found.nodes[-1]: found for found in heads}
    inner = {node: found for found in heads for node in found.nodes[:-1]}
    nonnegative = _nonnegative(program)
    sources_set = set(data) | set(taps)
    total = sum(1 for _ in heads)
    passed = 0
    counts: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node not in on_path or node in sources_set or node in inner or node.op != "call_function":
            continue
        if node.target is operator.getitem and node.args[0] in on_path:
            continue
        found = tails.get(node)
        layer = _layer(program, node, found, active, tapped, layers, nonnegative, passed / max(total, 1), counts)
        passed += found is not None
        layers.append(layer)
        merged.update(dict.fromkeys(layer.nodes, layer))
    return Graph(
        program,
        sources,
        on_path,
        list(dict.fromkeys(data)),
        layers,
        _entries(program, layers, merged, active & on_path),
    )


def _affines(program: Program, active: set[fx.Node], on_path: set[fx.Node], kept: set[fx.Node]) -> list[Affine]:
    found = (affine(node, active) for node in program.graph.nodes if node in active & on_path)
    return [merge(a, active, kept) for a in found if a is not None]


def _layer(
    program: Program,
    node: fx.Node,
    found: Affine | None,
    active: set[fx.Node],
    tapped: set[fx.Node],
    siblings: list[Layer],
    nonnegative: set[fx.Node],
    depth: float,
    counts: Counter[str],
) -> Layer:
    nodes = (node,) if found is None else found.nodes
    operands = dict.fromkeys(operand for n in nodes for operand in n.all_input_nodes if operand not in nodes)
    is_tap = node in tapped
    inputs = tuple(n for n in operands if n in (tapped if is_tap else active) and _is_float(n))
    taps = () if is_tap else tuple(n for n in operands if n in tapped and _is_float(n))
    kind, linear = _kind(node, found, inputs)
    first = nodes[0]
    scopes = first.meta["scopes"]
    operation = ops.operation_name(first)
    name = scopes[-1] if scopes else _parameter_name(program, found) or operation
    if not scopes:
        counts[name] += 1
        name = f"{name}@{counts[name] - 1}" if counts[name] > 1 else name
    return Layer(
        kind=kind,
        name=name,
        operation=operation,
        modules=tuple(scopes),
        depth=depth,
        linear=linear,
        nonnegative=all(n in nonnegative for n in inputs),
        siblings=siblings,
        nodes=nodes,
        inputs=inputs,
        taps=taps,
        outputs=_outputs(node),
        affine=found,
        is_tap=is_tap,
    )


def _outputs(node: fx.Node) -> tuple[fx.Node | None, ...]:
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return (node,)
    outputs: list[fx.Node | None] = [None] * len(value)
    for user in node.users:
        if user.target is operator.getitem and _is_float(user):
            outputs[user.args[1]] = user  # type: ignore[call-overload]
    return tuple(outputs)


def _parameter_name(program: Program, found: Affine | None) -> str | None:
    if found is None:
        return None
    node = found.weight_node
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.meta.get("path")


# --------------------------------------------------------------------------------------------------------------
# Kinds


def _kind(node: fx.Node, found: Affine | None, inputs: tuple[fx.Node, ...]) -> tuple[Kind, bool]:
    """The kind of a layer, and whether it is linear."""
    if found is not None:
        return (Kind.CONVOLUTION if found.convolution else Kind.DENSE), True
    if any(_is_complex(n) for n in (node, *inputs)):
        return Kind.NON_LINEAR, False  # relevance of a complex number is not defined
    name = ops.operation_name(node)
    places = sum(pytree.tree_leaves((node.args, node.kwargs)).count(n) for n in inputs)
    if name == "batch_norm_eval":
        return Kind.BATCH_NORM, node.args[0] in inputs and len(inputs) == 1
    if name == "batch_norm_train":
        return Kind.BATCH_NORM, False
    if name in ("index_put", "_unsafe_index_put") and len(node.args) > 3 and node.args[3]:
        return Kind.LINEAR, True
    if name == "scatter" and "reduce" in node.kwargs:
        return Kind.NON_LINEAR, False
    if name == "view" and getattr(node.target, "_overloadname", "") == "dtype":
        return Kind.NON_LINEAR, False
    if name in ops.SELECT:
        return Kind.SELECT, True
    if name in ("max", "min", "median") and not isinstance(node.meta["val"], Tensor):
        return Kind.WINNER, True
    if name in ops.WINNER:
        return (Kind.WINNER, True) if _against_itself(node, inputs) else (Kind.ACTIVATION, False)
    if name in ops.SCALE:
        return _scaling(node, inputs, places)
    if name in ("sum", "nansum") or (name in ("add", "sub", "subtract", "rsub") and places > 1):
        return Kind.SUM, True
    if name in ops.AVERAGE:
        return Kind.AVERAGE, True
    if name in ops.LINEAR and (places == 1 or name in ("scatter_add", "index_add", "lerp")):
        # grid_sample is linear in the image only, lerp in its two ends.
        varying = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a in inputs]
        limits = {"lerp": {0, 1}, "grid_sampler": {0}, "grid_sampler_2d": {0}, "grid_sampler_3d": {0}}
        return (Kind.LINEAR, True) if set(varying) <= limits.get(name, set(varying)) else (Kind.NON_LINEAR, False)
    if name in ops.ACTIVATION and inputs == node.args[:1]:
        return Kind.ACTIVATION, False
    if name in ops.NORMALIZATION:
        return Kind.NORMALIZATION, False
    if name in ops.MULTILINEAR:
        return (Kind.LINEAR, True) if places == 1 or not _multiplied(node, inputs) else (Kind.PRODUCT, False)
    return Kind.NON_LINEAR, False


def _multiplied(node: fx.Node, inputs: tuple[fx.Node, ...]) -> bool:
    """Whether two operands that depend on the explained input are multiplied, rather than one added to the other."""
    name = ops.operation_name(node)
    added = {"linear": 2, "addmm": 0, "baddbmm": 0, "addmv": 0, "addcmul": 0}.get(name, 2 if "conv" in name else None)
    factors = pytree.tree_leaves([a for i, a in enumerate(node.args) if i != added])
    return sum(factors.count(n) for n in inputs) > 1


def _is_complex(node: fx.Node) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in pytree.tree_leaves(node.meta.get("val")))


def _against_itself(node: fx.Node, inputs: tuple[fx.Node, ...]) -> bool:
    """Whether only activations compete: `maximum(x, 0)` is an activation, not a choice among inputs."""
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    return all(a in inputs for a in tensors)


def _scaling(node: fx.Node, inputs: tuple[fx.Node, ...], places: int) -> tuple[Kind, bool]:
    if ops.operation_name(node) in ("div", "divide", "true_divide"):
        if places == 1 and node.args[0] in inputs and "rounding_mode" not in node.kwargs:
            return Kind.SCALE, True
        return Kind.NON_LINEAR, False
    return (Kind.SCALE, True) if places == 1 else (Kind.PRODUCT, False)


def _nonnegative(program: Program) -> set[fx.Node]:
    """The nodes whose values are known not to be negative, whatever the input."""
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and _is_float(node) and _never_negative(node, known):
            known.add(node)
    return known


def _never_negative(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether no argument whatever can make the result negative; what is not listed may."""
    name = ops.operation_name(node)
    first, *others = (*node.args, None)
    if name in ops.POSITIVE:
        return True
    if name == "softplus":
        return len(node.args) == 1 and not node.kwargs
    if name in ("clamp", "clamp_min", "clip", "hardtanh"):
        low = node.kwargs.get("min", others[0])
        high = node.kwargs.get("max", others[1] if len(others) > 2 else None)
        return _not_below_zero(low, known) and (high is None or _not_below_zero(high, known))
    if name == "pow":
        return isinstance(others[0], int) and others[0] % 2 == 0
    if name in ("cat", "concat", "concatenate", "stack"):
        return all(part in known for part in first)  # type: ignore[union-attr]
    if name in ("add", "mul", "div"):
        operands = (first, others[0], node.kwargs.get("alpha", 1))
        return "rounding_mode" not in node.kwargs and all(_not_below_zero(a, known) for a in operands)
    if name in ("pad", "constant_pad_nd"):
        numbers: list[Any] = [a for a in others[1:] if isinstance(a, (int, float))] + [node.kwargs.get("value") or 0]
        return first in known and all(a >= 0 for a in numbers)
    if name in ("avg_pool1d", "avg_pool2d", "avg_pool3d") and len(node.args) > 6:
        return False  # a divisor of the user's own
    return name in ops.KEEPS_SIGN and first in known


def _not_below_zero(value: Any, known: set[fx.Node]) -> bool:
    return value >= 0 if isinstance(value, (int, float)) else value in known


# --------------------------------------------------------------------------------------------------------------
# Where relevance may be asked for


def _entries(
    program: Program, layers: list[Layer], merged: dict[fx.Node, Layer], active: set[fx.Node]
) -> list[tuple[str, list[fx.Node | None], Any]]:
    def place(node: fx.Node | None) -> fx.Node | None:
        if node is None or node not in active:
            return None
        # Inside a merged layer there is no relevance but at its end.
        return merged[node].outputs[0] if node in merged and len(merged[node].nodes) > 1 else node

    if program.modules:
        return [(name, [place(leaf) for leaf in leaves], spec) for name, leaves, spec in program.modules]
    leaf_spec = pytree.tree_structure(0)
    return [(layer.name, [layer.output], leaf_spec) for layer in layers if len(layer.outputs) == 1 and not layer.is_tap]
