"""Relevance per token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrpfunc import _tree as tree
from lrpfunc._errors import InputError


def per_token(relevance: Any, dim: int = -1) -> Any:
    """Adds the relevance of embeddings up to one number a token.

    Args:
        relevance: Relevance of embeddings, of shape `(N, tokens, width)`; or what `attribute(..., layers=...)` returns,
            whose integer inputs have `None`, and any other pytree of such tensors.
        dim: The axis of the embedding.

    Returns:
        The same, with tensors of shape `(N, tokens)`.

    Raises:
        InputError: If a tensor has no axis of embeddings next to that of the tokens.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> net = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> model_fn, params = lrp.from_module(net)
        >>> relevance_fn = lrp.attribute(model_fn, layers="0")
        >>> _, layers = lrp.per_token(relevance_fn(params, torch.tensor([[1, 5, 2]]), target=1))
        >>> layers["0"].shape
        torch.Size([1, 3])
    """

    def add_up(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.ndim < 2:
            raise InputError(
                f"per_token adds up relevance of shape (N, tokens, width) over the width, not of {tuple(leaf.shape)}: "
                "explain the embeddings, with layers='name.of.the.embedding'"
            )
        return leaf.sum(dim)

    return tree.map(add_up, relevance)
