"""Inside of attention, fused or written out: its weights and its heads, where relevance may be asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from lrpfunc._layers.bound import BoundLayer
from lrpfunc._layers.layer import STRUCTURAL, Kind, Layer, Role
from lrpfunc._ops.call import call
from lrpfunc._ops.functions import attended, attention_weights, scaled_dot_product_attention
from lrpfunc._torch import map_arg


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention, whose weights and value depend on the explained input.

    Attributes:
        layer: The layer that gives the heads: fused attention, or the product of the weights with the value.
        weights: The node of the weights.
        product: In fused attention, where there is no such node, the product as it would be written out, with nodes of
            its own. It has the rule of the whole, which shares out between weights and value as between factors.
    """

    layer: Layer
    weights: fx.Node
    product: Layer | None = None

    def bound(self, values: Mapping[fx.Node, Any]) -> BoundLayer:
        """The product of fused attention, with the values of a forward pass."""
        assert self.product is not None
        (fused,) = self.layer.nodes
        operands = self.weights.all_input_nodes
        inner = {own: values[node] for own, node in zip(operands, fused.all_input_nodes, strict=True)}
        args, kwargs = map_arg((self.weights.args, self.weights.kwargs), inner.__getitem__)
        inner[self.weights] = call(self.weights, args, kwargs)
        inner[self.product.output] = values[self.layer.output]
        return BoundLayer(self.product, inner)


def attentions(layers: Sequence[Layer]) -> Iterator[Attention]:
    """Each attention among the layers, in order of execution."""
    made_by = {node: layer for layer in layers for node in layer.outputs if node is not None}
    for layer in layers:
        if layer.is_tap:
            continue
        if layer.nodes[0].target is scaled_dot_product_attention and layer.signals and _weighs(layer):
            product = _written_out(layer)
            yield Attention(layer, product.inputs[0], product)
        elif layer.kind is Kind.PRODUCT and layer.operation in ("matmul", "bmm"):
            weights = next((node for node in layer.inputs if _is_softmax(node, made_by)), None)
            if weights is not None:
                yield Attention(layer, weights)


def _weighs(fused: Layer) -> bool:
    """Whether the weights of fused attention depend on the explained input."""
    query, key, _, *rest = fused.nodes[0].args
    return any(operand in fused.inputs for operand in (query, key, *rest[:1], fused.nodes[0].kwargs.get("attn_mask")))


def _is_softmax(node: fx.Node, made_by: Mapping[fx.Node, Layer]) -> bool:
    """Whether a tensor is a softmax, with dropout or in another shape at most."""
    layer = made_by.get(node)
    while layer is not None and layer.kind in STRUCTURAL and len(layer.inputs) == 1:
        layer = made_by.get(layer.inputs[0])
    return layer is not None and layer.kind is Kind.SOFTMAX


def _written_out(attention: Layer) -> Layer:
    (fused,) = attention.nodes
    graph = fx.Graph()
    operands = {node: graph.placeholder(node.name) for node in fused.all_input_nodes}
    args, kwargs = map_arg((fused.args, fused.kwargs), operands.__getitem__)
    weights = graph.call_function(attention_weights, args, kwargs)
    product = graph.call_function(attended, (weights, args[2]))
    weights.meta = product.meta = {name: fused.meta[name] for name in ("no_grad", "autocast")}
    return replace(
        attention,
        kind=Kind.PRODUCT,
        operation="matmul",
        nodes=(product,),
        inputs=(weights, args[2]),
        outputs=(product,),
        role=Role.GATE,
        signals=(args[2],),
        shares=(0.5, 0.5),
    )
