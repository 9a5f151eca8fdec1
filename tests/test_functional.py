"""Model functions that change memory in place, as functions that do not: against torch, which runs them as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

import lrpfunc as lrp
from tests.cases import normal
from tests.oracles import largest_difference, plain_vjp

Model = Callable[[Tensor], Tensor]
CASES: dict[str, Model] = {}
"""Of a tensor of shape (2, 4)."""


def case(model_fn: Model) -> Model:
    CASES[model_fn.__name__] = model_fn
    return model_fn


# -- views of views


@case
def view_of_a_view(x: Tensor) -> Tensor:
    y = x * 1.0
    corner = y[1:][:, :2]
    corner.mul_(3)
    corner[0].add_(1)
    return y * 2


@case
def views_read_after_each_other_was_written(x: Tensor) -> Tensor:
    y = x * 1.0
    rows = y[1:]
    corner = rows[:, :2]
    y.mul_(2)
    rows.add_(1)
    corner.relu_()
    return torch.cat([y.flatten(), rows.flatten(), corner.flatten()])


@case
def view_of_a_moved_axis(x: Tensor) -> Tensor:
    y = x * 1.0
    y.movedim(0, 1)[1:3].zero_()
    return y


@case
def diagonal(x: Tensor) -> Tensor:
    y = x[:, :2] * 1.0
    y.diagonal().mul_(5)
    return y


@case
def overlapping_sums(x: Tensor) -> Tensor:
    y = torch.zeros(3, 4, dtype=x.dtype)
    for i in range(2):
        y[i : i + 2] += x
    return y


@case
def wrapped_around(x: Tensor) -> Tensor:
    y = torch.zeros(2, 6, dtype=x.dtype)
    y[:, 1:5] = x
    y[:, 0] = y[:, 4]
    y[:, 5] = y[:, 1]
    return y.unfold(1, 3, 1) * 1.0


@case
def exchanged(x: Tensor) -> Tensor:
    y = x * 1.0
    first = y[0].clone()
    y[0] = y[1]
    y[1] = first
    return y * x


# -- other names of the same memory


@case
def alias(x: Tensor) -> Tensor:
    y = x * 1.0
    a = torch.ops.aten.alias(y)
    a.mul_(2)
    b = torch.ops.aten.alias(a)
    y.add_(1)
    return a * b


@case
def no_copies(x: Tensor) -> Tensor:
    y = x * 1.0
    y.contiguous().mul_(2)
    y.to(x.dtype).mul_(3)
    y.reshape(-1)[:3].add_(1)
    return y * 1.0


@case
def a_copy(x: Tensor) -> Tensor:
    y = x * 1.0
    flat = y.t().reshape(-1)
    flat.mul_(2)
    return y + flat.sum()


@case
def einsum_is_written(x: Tensor) -> Tensor:
    y = x[:, :2] * 1.0
    torch.einsum("ii->i", y).mul_(5)
    return y


@case
def einsum_is_read_later(x: Tensor) -> Tensor:
    y = x * 1.0
    transposed = torch.einsum("ij->ji", y)
    y.mul_(2)
    return transposed * 1.0


@case
def broadcast_is_read_later(x: Tensor) -> Tensor:
    y = x * 1.0
    whole, row = torch.broadcast_tensors(y, y[:1])
    y.mul_(2)
    return whole + row


@case
def broadcast_is_written(x: Tensor) -> Tensor:
    y, z = x * 1.0, x * 2.0
    a, b = torch.broadcast_tensors(y, z)
    a.mul_(3)
    return y + z + b


@case
def mesh_is_read_later(x: Tensor) -> Tensor:
    y = x[0] * 1.0
    a, b = torch.meshgrid(y, y, indexing="ij")
    y.mul_(2)
    return a + b * a


# -- other shapes of the same memory


@case
def unsqueezed(x: Tensor) -> Tensor:
    y = x * 1.0
    row = y[0]
    y.unsqueeze_(1)
    row.mul_(3)
    y[:, 0, 1] = 0
    return y * 1.0 + row.sum()


@case
def transposed(x: Tensor) -> Tensor:
    y = x * 1.0
    before = y.view_as(y)
    y.t_()
    before.mul_(2)
    y[0].add_(1)
    return torch.cat([y, before.t()])


@case
def squeezed_twice(x: Tensor) -> Tensor:
    y = (x * 1.0).view(1, 2, 4)
    inner = y[0]
    y.squeeze_()
    y.squeeze_()
    inner.mul_(3)
    return y * 1.0


@case
def swapped_axes(x: Tensor) -> Tensor:
    y = x * 1.0
    row = y[0]
    y.swapaxes_(0, 1)
    y[0] = 7
    return y + row.sum()


@case
def strided(x: Tensor) -> Tensor:
    y = x * 1.0
    row = y[0]
    y.as_strided_((2, 2), (4, 1))
    y.mul_(2)
    return y + row[:2]


# -- with and without gradients


@case
def regions(x: Tensor) -> Tensor:
    y = x * 1.0
    with torch.no_grad():
        y.mul_(2)
        with torch.enable_grad():
            y.add_(x)
        y.sub_(1)
    y.mul_(x)
    return y


@case
def set_grad_enabled(x: Tensor) -> Tensor:
    y = x * 1.0
    torch.set_grad_enabled(False)
    y[0].mul_(3)
    torch.set_grad_enabled(True)
    y[1].mul_(x[1])
    return y


@case
def detached_view(x: Tensor) -> Tensor:
    y = x * 1.0
    y.view(-1).detach().mul_(2)
    return y * x


@case
def detached_in_place(x: Tensor) -> Tensor:
    y = x * 1.0
    y.detach_()
    y.add_(x)
    return y * x


@case
def booleans_without_gradients(x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape, dtype=torch.bool)
    with torch.no_grad():
        mask |= x > 0
    return x * mask


@case
def integers_without_gradients(x: Tensor) -> Tensor:
    counts = torch.zeros(x.shape, dtype=torch.int64)
    with torch.no_grad():
        counts[0].add_(2)
    return x * counts


@case
def over_nan_without_gradients(x: Tensor) -> Tensor:
    y = torch.full_like(x, torch.nan)
    with torch.no_grad():
        y.fill_(2.0)
    return x * y


@case
def into_out(x: Tensor) -> Tensor:
    buffer = torch.zeros(3, 2, 4, dtype=x.dtype)
    with torch.no_grad():
        torch.mul(x, 2, out=buffer[1])
        torch.add(buffer[1], buffer[1], alpha=3, out=buffer[0])
    return x * buffer.sum(0)


@case
def into_out_of_another_dtype(x: Tensor) -> Tensor:
    doubled = torch.empty(2, 4, dtype=torch.float32)
    with torch.no_grad():
        torch.mul(x, 2, out=doubled)
    return x * doubled


@case
def into_out_of_a_fused_operation(x: Tensor) -> Tensor:
    buffer = torch.empty(2, 2, dtype=x.dtype)
    with torch.no_grad():
        torch.ops.aten.glu.out(x, 1, out=buffer)
    return x[:, :2] * buffer


# -- dtypes


@case
def comparison(x: Tensor) -> Tensor:
    y = x * 1.0
    y.gt_(0)
    return y * x * 0.5


@case
def comparison_of_a_part(x: Tensor) -> Tensor:
    y = x * 1.0
    y[0].eq_(x[0])
    return y * x


@case
def promotion(x: Tensor) -> Tensor:
    y = x.float()
    y.add_(x)
    return y * 2


@case
def integers(x: Tensor) -> Tensor:
    counts = torch.zeros(2, 4, dtype=torch.int32)
    counts.add_(torch.ones(2, 4, dtype=torch.int32)).cumsum_(1)
    counts[1] = 3
    return x * counts


@case
def copied_to_another_dtype(x: Tensor) -> Tensor:
    y = torch.zeros(2, 4, dtype=torch.float32)
    y.copy_(x * x)
    return y * 2


# -- masks and diagonals


@case
def masked(x: Tensor) -> Tensor:
    y = x * 1.0
    y[y > 0] = 0.5
    return y * x


@case
def masked_by_a_value_of_its_own(x: Tensor) -> Tensor:
    y = x * 1.0
    row = y[0]
    row[row > 0] = x[1, 0]
    return y * x


@case
def masked_rows(x: Tensor) -> Tensor:
    y = x * 1.0
    y[torch.tensor([True, False])] = x[1, 1]
    return y * x


@case
def masked_columns(x: Tensor) -> Tensor:
    y = (x * 1.0).view(2, 2, 2)
    y[:, torch.tensor([True, False])] = 2.0
    return y * x.view(2, 2, 2)


@case
def indexed(x: Tensor) -> Tensor:
    y = x * 1.0
    y[[0, 1], [1, 2]] = x[:, 3]
    return y


@case
def filled_diagonal(x: Tensor) -> Tensor:
    y = x * 1.0
    y.fill_diagonal_(3.0)
    return y * x


@case
def filled_diagonal_of_a_mask(x: Tensor) -> Tensor:
    mask = torch.ones(2, 2, dtype=torch.bool).fill_diagonal_(False)
    return (x @ x.t()) * mask


# -- complex numbers


@case
def spectrum_into_zeros(x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x)
    kept = torch.zeros(2, 3, dtype=torch.complex128)
    kept[:, :2] = spectrum[:, :2] * (1 + 2j)
    return torch.fft.irfft(kept, 4)


@case
def real_part(x: Tensor) -> Tensor:
    z = torch.complex(x, 2 * x)
    torch.view_as_real(z)[..., 0].mul_(2)
    z.real.mul_(3)
    return z.real * z.imag


@case
def imaginary_part(x: Tensor) -> Tensor:
    z = torch.complex(x, 2 * x)
    z.imag[0].mul_(3)
    return z.real * z.imag


@case
def conjugate(x: Tensor) -> Tensor:
    z = torch.complex(x, 2 * x)
    z.conj()[0].mul_(2j)
    return z.real * z.imag


@case
def pairs_as_complex(x: Tensor) -> Tensor:
    y = x * 1.0
    torch.view_as_complex(y.view(2, 2, 2))[0].mul_(2j)
    return y


# -- what torch runs and does not differentiate, or not by functions


@case
def parts_of_a_split(x: Tensor) -> Tensor:
    y = x * 1.0
    a, b = y.split(2, 1)
    a.mul_(2)
    b.add_(a)
    return y * x


@case
def unbound_rows(x: Tensor) -> Tensor:
    y = x * 1.0
    for i, row in enumerate(y.unbind(0)):
        row.mul_(i + 2)
    return y


WITHOUT_DERIVATIVE = (parts_of_a_split, unbound_rows)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_torch(name: str) -> None:
    f, x = CASES[name], normal(2, 4)
    output, pullback = lrp.vjp(f, lrp.gradient(), x, argnums=0)
    assert output.dtype == f(x).dtype
    assert torch.equal(output, f(x))
    if f in WITHOUT_DERIVATIVE:
        return
    cotangent = normal(*output.shape, seed=1).to(output.dtype)
    _, plain = plain_vjp(f, x)
    assert largest_difference(pullback(cotangent), plain(cotangent)[0]) < 1e-14


@pytest.mark.parametrize("name", CASES)
def test_samples_are_mapped_over(name: str) -> None:
    f, xs = CASES[name], torch.stack([normal(2, 4, seed=seed) for seed in range(3)])
    fn = lrp.attribute_and_value(f, lrp.gradient(), argnums=0)
    target = torch.ones_like(f(xs[0]))
    relevance, values = vmap(lambda x: fn(x, target=target))(xs)
    assert torch.equal(values, torch.stack([f(x) for x in xs]))
    expected = torch.stack([fn(x, target=target)[0] for x in xs])
    assert largest_difference(relevance, expected) < 1e-14


@pytest.mark.parametrize("name", ["view_of_a_view", "einsum_is_written", "masked", "regions", "real_part"])
def test_derivatives_of_relevance(name: str) -> None:
    f, x = CASES[name], normal(2, 4)
    target = normal(*f(x).shape, seed=1)

    def curved(x: Tensor) -> Tensor:
        return f(torch.sin(x)).square()

    def ours(x: Tensor) -> Tensor:
        return lrp.attribute(curved, lrp.gradient(), argnums=0)(x, target=target).square().sum()

    def theirs(x: Tensor) -> Tensor:
        return grad(lambda x: (curved(x) * target).sum())(x).square().sum()

    assert largest_difference(grad(ours)(x), grad(theirs)(x)) < 1e-13


NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "normal_": lambda x: torch.empty_like(x).normal_(1.0, 0.1),
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(),
    "bernoulli_(p)": lambda x: torch.empty_like(x).bernoulli_(0.3),
    "random_": lambda x: torch.empty_like(x, dtype=torch.int64).random_(10),
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_written_in_place_is_the_same_draw(name: str) -> None:
    x, noise = normal(2, 4), NOISE[name]
    torch.manual_seed(0)
    expected = noise(x)
    torch.manual_seed(0)
    relevance, value = lrp.attribute_and_value(lambda x: x * noise(x), lrp.epsilon(0.0), argnums=0)(x)
    assert torch.equal(value, x * expected)
    assert torch.equal(relevance, x * expected)


class Masking(nn.Module):
    """Scores that are masked in place, as many implementations of attention do."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        scores[scores < -0.2] = -torch.inf
        return F.softmax(scores, -1) @ x.t()


def test_masked_scores_conserve_relevance() -> None:
    torch.manual_seed(0)
    model_fn, params = lrp.from_module(Masking())
    explanation = lrp.explain(model_fn, lrp.attn_lrp())(params, normal(3, 4), target=torch.ones(3, 3).double())
    assert abs(explanation.residual) < 1e-9


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "transposed argument": (lambda x: x.t_() * 2, "changes in place a tensor of shape .* that it was given"),
    "several outputs": (lambda x: torch.max(x, 1, out=(x[:, 0] * 1.0, torch.zeros(2).long()))[0], "aten.max.dim_max"),
    "out of another size": (lambda x: torch.add(x, x, out=torch.empty(0).double()), "aten.add.out"),
    "no function": (lambda x: (x * 1.0).polygamma_(1), "aten.polygamma_.default"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    f, message = REFUSED[name]

    def model_fn(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = f(x)
        return x.sum() * y

    with pytest.raises(lrp.CaptureError, match=message):
        lrp.attribute(model_fn, lrp.gradient(), argnums=0)(normal(2, 4))
