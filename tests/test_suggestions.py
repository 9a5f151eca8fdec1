"""Every line that an error suggests works: it is taken out of the error, run, and the call made again."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torchvision.ops import deform_conv2d

import lrpfunc as lrp
from tests.cases import normal

W, X = normal(4, 4), normal(2, 4, seed=1).abs() + 0.5


def deformed(w: Tensor, x: Tensor) -> Tensor:
    images = (x @ w).reshape(1, 2, 2, 2)
    return deform_conv2d(images, 0.1 * images, w[:2, :2].reshape(2, 2, 1, 1)).flatten(1) + x.reshape(1, -1)


def filtered(w: Tensor, x: Tensor) -> Tensor:
    """A product of complex numbers, beside one of real ones that a rule covers."""
    return torch.fft.ifft(torch.fft.fft(x @ w) * torch.fft.fft(x)).real * x


def flexible(w: Tensor, x: Tensor) -> Tensor:
    y = (x @ w).reshape(1, 1, 2, 4)
    return (flex_attention(y, y, y) + y).reshape(2, 4)  # type: ignore[operator]


def sampled(w: Tensor, x: Tensor) -> Tensor:
    images, places = (x @ w).reshape(1, 1, 2, 2, 2), x[:, :3].reshape(1, 1, 1, 2, 3) - 1
    return F.grid_sample(images, places, align_corners=False).reshape(1, 2)


ATTN = lrp.attn_lrp()
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "activation": (lambda w, x: torch.relu(x @ w), [], r"\(lrp.Activation, lrp.Pass\(\)\)"),
    "product": (lambda w, x: (x @ w) * x, [], r"lrp.attn_lrp\(\) \+ rules"),
    "quotient": (lambda w, x: (x @ w) / x.sum(), [], r"lrp.attn_lrp\(\) \+ rules"),
    "complex": (lambda w, x: torch.fft.rfft(x @ w).real, ATTN, "'fft_rfft'"),
    "matrix": (lambda w, x: torch.linalg.eigh(x @ x.T)[1] @ (x @ w).softmax(0), [], r"'linalg_eigh'.* \+ lrp.attn_lrp"),
    "several outputs": (lambda w, x: torch.linalg.eigh((x @ w).T @ x)[1], ATTN, "'linalg_eigh'"),
    "exponent": (lambda w, x: (x @ w).abs() ** x, ATTN, "'pow'"),
    "scatter": (lambda w, x: (x @ w).scatter(0, x.long()[:1] * 0, x, reduce="add"), ATTN, "'scatter'"),
    "a name that others have": (filtered, ATTN, r"\(layer.kind, layer.operation\) == \('Non-linear', 'mul'\)"),
    "no transform takes its derivative": (deformed, ATTN, r"'deform_conv2d'\), lrp.Stop\(\)"),
    "a function of functions": (flexible, ATTN, r"'flex_attention'\), lrp.Stop\(\)"),
    "grid": (sampled, ATTN, r"'grid_sampler'\), lrp.Gradient\(\)"),
    "no derivative of one operand": (lambda w, x: torch.igamma((x @ w).abs(), x), ATTN, r"'igamma'\), lrp.Stop\(\)"),
    "no derivative": (
        lambda w, x: torch.special.bessel_j0(x @ w),
        [(lrp.Activation, lrp.Gradient())],
        r"'special_bessel_j0'\), lrp.Pass\(\)",
    ),
    "stopped": (lambda w, x: (x @ w).softmax(-1), lrp.cp_lrp(), r"\(lrp.Softmax, lrp.TaylorSoftmax\(\)\)"),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", REFUSED)
def test_the_line_works(name: str) -> None:
    model_fn, rules, line = REFUSED[name]
    with pytest.raises((lrp.UncoveredLayerError, lrp.RuleError, lrp.NoPathError), match=line) as caught:
        lrp.attribute(model_fn, rules)(W, X, target=0)
    (suggested,) = re.findall(r"^ {4}(rules = .*)$", str(caught.value), re.MULTILINE)
    names = {"lrp": lrp, "rules": rules}
    exec(suggested, names)
    relevance = lrp.attribute(model_fn, names["rules"])(W, X, target=0)
    assert relevance.isfinite().all()
    assert lrp.explain(model_fn, names["rules"])(W, X, target=0).relevance.shape == X.shape


def test_an_operation_whose_derivative_cannot_be_taken_says_so() -> None:
    with pytest.raises(lrp.RuleError, match=r"no derivative of `deform_conv2d`.*\n\n.*\n\nHold it constant"):
        lrp.attribute(deformed, [(lrp.operation("deform_conv2d"), lrp.Gradient()), *ATTN])(W, X, target=0)
