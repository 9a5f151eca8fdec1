"""Losses of relevance, to train on beside a task's own.

Each takes relevance of shape `(N, ...)`, as `attribute` or a pullback gives it, and returns a number: the mean over
samples, of which `annotated` picks those that somebody has said something about. Each is free of scale: twice the
relevance has the same loss, so that no model gets away with less of it. A sample without any relevance has loss 0.

    output, pullback, buffers = lrp.vjp(model_fn, rules, params, x, has_aux=True)  # one forward pass
    relevance = pullback(labels)
    loss = cross_entropy(output, labels) + lrp.losses.outside(relevance, masks)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrpfunc._errors import InputError

__all__ = ["alignment", "consistency", "outside", "sparsity", "total_variation"]


def outside(relevance: Tensor, mask: Tensor, *, power: float = 2.0, annotated: Tensor | None = None) -> Tensor:
    r"""The share of relevance that lies outside of a mask: right for the right reasons.

    .. math:: \sum_i (1 - m_i) |R_i|^p \,/\, \sum_i |R_i|^p

    Args:
        relevance: Of shape `(N, ...)`.
        mask: 1 where relevance belongs, 0 elsewhere, of a shape that broadcasts to the relevance's.
        power: `p`.
        annotated: Which samples have a mask, of shape `(N,)`: booleans, or a weight for each. All, if it is `None`.

    Returns:
        A number between 0 and 1.

    Example:
        >>> import torch
        >>> from lrpfunc import losses
        >>> losses.outside(torch.tensor([[3.0, -4.0]]), torch.tensor([1.0, 0.0]))
        tensor(0.6400)

    References:
        Ross, Hughes and Doshi-Velez, *Right for the right reasons: training differentiable models by constraining their
        explanations* (2017), where the penalty is that of gradients, and not free of scale.
    """
    amount = relevance.abs() ** power
    outer = _broadcast(1 - mask.to(relevance.dtype), relevance, "mask")
    return _mean(_ratio(_sums(amount * outer), _sums(amount)), annotated)


def alignment(relevance: Tensor, map: Tensor, *, annotated: Tensor | None = None) -> Tensor:
    r"""How far relevance points away from a map, such as where people looked.

    .. math:: 1 - \langle R, M \rangle \,/\, \lVert R \rVert \lVert M \rVert

    Args:
        relevance: Of shape `(N, ...)`.
        map: Of a shape that broadcasts to it.
        annotated: As for `outside`.

    Returns:
        A number: 0 where they have the same direction, 1 where they have nothing in common, 2 where they are opposed.

    Example:
        >>> import torch
        >>> from lrpfunc import losses
        >>> losses.alignment(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.4000)

    References:
        Fel, Rodriguez, Linsley and Serre, *Harmonizing the object recognition strategies of deep neural networks with
        humans* (2022).
    """
    map = _broadcast(map.to(relevance.dtype), relevance, "map")
    known = (_norms(relevance) > 0) & (_norms(map) > 0)
    cosine = _ratio(_sums(relevance * map), _norms(relevance) * _norms(map))
    return _mean(torch.where(known, 1 - cosine, 0), annotated)


def consistency(relevance: Tensor, other: Tensor, *, annotated: Tensor | None = None) -> Tensor:
    """How far two explanations of the same samples disagree, such as those of two augmentations, laid over one another.

    `alignment` of one with the other; both get gradients.

    Args:
        relevance: Of shape `(N, ...)`.
        other: Likewise. Undo flips and shifts of the augmentation first.
        annotated: As for `outside`.

    Returns:
        A number between 0 and 2.

    Example:
        >>> import torch
        >>> from lrpfunc import losses
        >>> flipped = torch.tensor([[0.0, 2.0]])  # the relevance of x.flip(-1)
        >>> losses.consistency(torch.tensor([[1.0, 0.0]]), flipped.flip(-1))
        tensor(0.)

    References:
        Guo, Zheng, Fan, Yu and Wang, *Visual attention consistency under image transforms for multi-label image
        classification* (2019).
    """
    return alignment(relevance, other, annotated=annotated)


def sparsity(relevance: Tensor, *, annotated: Tensor | None = None) -> Tensor:
    r"""How widely relevance is spread.

    .. math:: \lVert R \rVert_1 \,/\, \sqrt{n} \lVert R \rVert_2

    Args:
        relevance: Of shape `(N, ...)`, `n` numbers for each sample.
        annotated: As for `outside`.

    Returns:
        A number: 1 where it is the same everywhere, and the square root of `1 / n` where all is at one place.

    Example:
        >>> import torch
        >>> from lrpfunc import losses
        >>> losses.sparsity(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 5.0, 0.0]]))
        tensor(0.7500)

    References:
        Hoyer, *Non-negative matrix factorization with sparseness constraints* (2004).
    """
    size = relevance[0].numel() if len(relevance) else 1
    return _mean(_ratio(_sums(relevance.abs()), size**0.5 * _norms(relevance)), annotated)


def total_variation(relevance: Tensor, *, dims: int = 2, annotated: Tensor | None = None) -> Tensor:
    r"""How rough relevance is: the differences between neighbours, as a share of it all.

    .. math:: \sum_{i \sim j} |R_i - R_j| \,/\, \sum_i |R_i|

    Args:
        relevance: Of shape `(N, ...)`.
        dims: Along how many of the last dimensions places are neighbours: 2 for images, 1 for signals.
        annotated: As for `outside`.

    Returns:
        A number from 0, where it is the same everywhere.

    Example:
        >>> import torch
        >>> from lrpfunc import losses
        >>> losses.total_variation(torch.tensor([[0.0, 2.0, 2.0, 0.0]]), dims=1)
        tensor(1.)

    References:
        Rudin, Osher and Fatemi, *Nonlinear total variation based noise removal algorithms* (1992).
    """
    if not 1 <= dims < relevance.ndim:
        raise InputError(
            f"dims={dims} of relevance of shape {tuple(relevance.shape)}: the first dimension is that of the samples, "
            f"and neighbours are along some of the {relevance.ndim - 1} others"
        )
    rough = sum(_sums(relevance.diff(dim=-1 - d).abs()) for d in range(dims))
    return _mean(_ratio(torch.as_tensor(rough), _sums(relevance.abs())), annotated)


def _sums(tensor: Tensor) -> Tensor:
    """One for each sample."""
    return tensor.flatten(1).sum(1) if tensor.ndim > 1 else tensor


def _norms(tensor: Tensor) -> Tensor:
    squares = _sums(tensor.square())
    return torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)  # the derivative at zero is zero


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part / torch.where(whole > 0, whole, 1)


def _broadcast(tensor: Tensor, relevance: Tensor, name: str) -> Tensor:
    try:
        return tensor.expand(relevance.shape)
    except RuntimeError:
        raise InputError(
            f"`{name}` of shape {tuple(tensor.shape)} does not broadcast to relevance of shape "
            f"{tuple(relevance.shape)}. One for each sample of images with channels has shape (N, 1, H, W): "
            f"{name}[:, None]"
        ) from None


def _mean(losses: Tensor, annotated: Tensor | None) -> Tensor:
    if annotated is None:
        return losses.mean() if len(losses) else losses.sum()
    if annotated.shape != losses.shape:
        raise InputError(
            f"`annotated` has shape {tuple(annotated.shape)}, and there are {len(losses)} samples: one number for each"
        )
    weights = annotated.to(losses.dtype)
    return (losses * weights).sum() / torch.where(weights.sum() > 0, weights.sum(), 1)
