"""Attention, fused and written out, and the expansion of its softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lrpfunc as lrp
from tests.cases import ATTENTION_MODELS, in_front, normal, randomized
from tests.oracles import largest_difference

RULES = {"attn_lrp": lrp.attn_lrp(), "cp_lrp": lrp.cp_lrp()}
Operands = tuple[Tensor, Tensor, Tensor]
BATCH, HEADS, KEY_HEADS, QUERIES, KEYS, WIDTH = 2, 4, 2, 3, 4, 2


# ---------------------------------------------------------------------------------------------------------------------
# Fused attention has the relevance of the same attention written out


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1) @ v


def both(of: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Functions of `None` for the parameters, and of tensors; `of` tells which attention to call."""
    return [lambda _, *tensors, attend=attend: of(attend, *tensors) for attend in (fused, written_out)]


def operands(*samples: int, key_heads: int = HEADS) -> Operands:
    return (
        normal(*samples, HEADS, QUERIES, WIDTH),
        normal(*samples, key_heads, KEYS, WIDTH, seed=1),
        normal(*samples, key_heads, KEYS, WIDTH, seed=2),
    )


def boolean(*shape: int) -> Tensor:
    """Nothing is masked from everything: the first key is always seen."""
    mask = normal(*shape, seed=3) > 0
    mask[..., 0] = True
    return mask


def infinite(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64).masked_fill(~boolean(*shape), -torch.inf)


BATCHED, GROUPED = operands(BATCH), operands(BATCH, key_heads=KEY_HEADS)
SPELLINGS: dict[str, tuple[Operands, Tensor | None, dict[str, Any]]] = {
    "plain": (BATCHED, None, {}),
    "causal": (BATCHED, None, {"is_causal": True}),
    "one_sample": (operands(), None, {"is_causal": True, "scale": 0.7}),
    "grouped": (GROUPED, None, {"enable_gqa": True}),
    "grouped_causal": (GROUPED, None, {"enable_gqa": True, "is_causal": True}),
    "grouped_masked": (GROUPED, boolean(HEADS, 1, KEYS), {"enable_gqa": True}),
    "masked": (BATCHED, boolean(QUERIES, KEYS), {"scale": 0.7}),
    "padded": (BATCHED, boolean(BATCH, 1, 1, KEYS), {}),
    "biased": (BATCHED, normal(HEADS, QUERIES, KEYS, seed=4), {}),
    "infinitely_biased": (BATCHED, infinite(BATCH, HEADS, QUERIES, KEYS), {}),
    "infinitely_padded": (BATCHED, infinite(BATCH, 1, 1, KEYS), {}),
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fused_equals_written_out(spelling: str, rules: str) -> None:
    """Whichever kernel runs: the fused one, the one that autograd differentiates, or none at all under `vmap`."""
    (q, k, v), mask, options = SPELLINGS[spelling]
    ours, theirs = both(lambda attend, *tensors: attend(*tensors, mask, **options))
    expected = lrp.attribute(theirs, RULES[rules], argnums=(1, 2, 3))(None, q, k, v)
    fn = lrp.attribute_and_value(ours, RULES[rules], argnums=(1, 2, 3))
    with torch.no_grad():
        results = [fn(None, q, k, v)]
    results += [fn(None, q, k, v), fn(None, q.clone().requires_grad_(), k, v)]
    for relevance, value in results:
        assert torch.equal(value, fused(q, k, v, mask, **options))
        assert largest_difference(relevance, expected) < 1e-12
    batched, _ = vmap(lambda q: fn(None, q, k, v))(torch.stack([2 * q, q]))
    assert largest_difference([part[1] for part in batched], list(expected)) < 1e-12


class Calls(TorchDispatchMode):
    """The names of all operations that run, those in derivatives too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rules", RULES)
def test_the_fused_kernel_runs_where_it_can(rules: str) -> None:
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    case = ATTENTION_MODELS["fused"]()
    fn = lrp.attribute(case.model_fn, RULES[rules])
    fn(case.params, case.x, target=1)  # captures
    with torch.no_grad(), Calls() as calls:
        fn(case.params, case.x, target=1)
    assert calls.names.count(f"{kernel}_backward") == 1
    assert {"_safe_softmax", "_softmax"}.isdisjoint(calls.names)
    with Calls() as calls:
        grad(lambda x: fn(case.params, x, target=1).square().sum())(case.x)
    assert calls.names.count(kernel) == 1  # for the value; the kernel has one derivative only
    assert not {"_safe_softmax", "_softmax"}.isdisjoint(calls.names)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("explained", ["".join(names) for n in (1, 2, 3, 4) for names in combinations("qkvm", n)])
def test_operands_that_are_constants_take_nothing(explained: str, rules: str) -> None:
    """Queries, keys, values and a mask that is added, or some of them; derivatives agree as well."""
    tensors = dict(zip("qkvm", (*BATCHED, normal(HEADS, QUERIES, KEYS, seed=4)), strict=True))
    given = tuple(tensors[name] for name in explained)
    model_fns = both(lambda attend, *given: attend(*(tensors | dict(zip(explained, given, strict=True))).values()))
    fns = [lrp.attribute(f, RULES[rules], argnums=tuple(range(1, len(given) + 1))) for f in model_fns]

    def squares(given: tuple[Tensor, ...], fn: Any) -> Tensor:
        return torch.stack([part.square().sum() for part in fn(None, *given)]).sum()

    relevance, expected = (fn(None, *given) for fn in fns)
    assert largest_difference(relevance, expected) < 1e-12
    assert largest_difference(*(grad(squares)(given, fn) for fn in fns)) < 1e-11
    takes = [bool(part.abs().max() > 0) for part in relevance]
    assert takes == [rules == "attn_lrp" or operand == "v" for operand in explained]


SHARED: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "all": lambda attend, x, y: attend(x, x, x) + y,
    "keys_and_values": lambda attend, x, y: attend(x, y, y),
    "queries_and_keys": lambda attend, x, y: attend(x, x, y),
    "queries_and_values": lambda attend, x, y: attend(x, y, x),
    "mask_too": lambda attend, x, y: attend(x, x, x, x) + y,
    "views": lambda attend, x, y: attend(x, x.mT, x[:]) + y,
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", SHARED)
def test_one_tensor_may_stand_for_several_operands(name: str, rules: str) -> None:
    x, y = normal(2, 3, 3), normal(2, 3, 3, seed=1)
    results = [lrp.attribute(f, RULES[rules], argnums=(1, 2))(None, x, y) for f in both(SHARED[name])]
    assert largest_difference(*results) < 1e-12


@pytest.mark.parametrize("make", [boolean, infinite])
@pytest.mark.parametrize("rules", RULES)
def test_a_query_that_sees_nothing_explains_nothing(rules: str, make: Callable[..., Tensor]) -> None:
    """Everything else is as if it were not there."""
    (q, k, v), mask, seeing = BATCHED, make(QUERIES, KEYS), [0, 2]
    mask[1] = False if mask.dtype is torch.bool else -torch.inf
    ours, _ = both(lambda attend, *tensors: attend(*tensors, mask))
    _, theirs = both(lambda attend, *tensors: attend(*tensors, mask[seeing]))
    start = normal(BATCH, HEADS, QUERIES, WIDTH, seed=5)
    fn, without = (lrp.attribute(f, RULES[rules], argnums=(1, 2, 3)) for f in (ours, theirs))
    expected = without(None, q[..., seeing, :], k, v, target=start[..., seeing, :])
    with torch.no_grad():
        results = [fn(None, q, k, v, target=start)]
    results.append(fn(None, q, k, v, target=start))
    results.append(tuple(part[0] for part in vmap(lambda q: fn(None, q, k, v, target=start))(q[None])))
    for of_query, *others in results:
        assert of_query[..., 1, :].abs().max() == 0
        assert largest_difference((of_query[..., seeing, :], *others), expected) < 1e-12
    assert grad(lambda q: sum(part.square().sum() for part in fn(None, q, k, v, target=start)))(q).isfinite().all()
    explanation = lrp.explain(ours, RULES[rules], argnums=(1, 2, 3))(None, q, k, v, target=start)
    assert abs(explanation.residual) < 1e-9


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("model", ["transformer", "fused"])
def test_lower_precision(model: str, dtype: torch.dtype, tolerance: float) -> None:
    """Relevance has the dtype of the input, and as many digits as that holds."""
    case = ATTENTION_MODELS[model]()
    params = {name: p.detach().to(dtype) for name, p in case.params.items()}
    for rules in RULES.values():
        fn = lrp.attribute(case.model_fn, rules)
        relevance = fn(params, case.x.to(dtype), target=1)
        assert relevance.dtype is dtype
        assert largest_difference(relevance.double(), fn(case.params, case.x, target=1)) < tolerance


MODULE = randomized(nn.MultiheadAttention(3, 1, batch_first=True))
MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    # Torch adds the mask and multiplies in one operation, `baddbmm`, if the weights are asked for.
    "added_by_a_product": lambda x: MODULE(x, x, x, key_padding_mask=torch.tensor([[False, False, True]] * 2))[0],
    "fused": lambda x: fused(x, x, x, x.masked_fill(~boolean(3, 3), -torch.inf)),
    "summed": lambda x: written_out(x, x, x, x.masked_fill(~boolean(3, 3), -torch.inf)),
    "constant": lambda x: written_out(x, x, x, infinite(3, 3)),
    "biased": lambda x: F.linear(x, normal(3, 3), infinite(KEYS)[1:]).softmax(-1) @ x,
}


EPSILON_IF_LINEAR = lrp.Composite([(lambda layer: layer.linear, lrp.Epsilon()), *lrp.attn_lrp()])


@pytest.mark.parametrize("rules", [*RULES.values(), lrp.attn_lrp() + lrp.epsilon_plus(), EPSILON_IF_LINEAR])
@pytest.mark.parametrize("name", MASKED)
def test_infinite_masks_are_accounted_for(name: str, rules: lrp.Composite) -> None:
    """Whatever meets an infinite score, as an addend or as the output of a rule, books finite numbers that add up."""
    explanation = lrp.explain(lambda _, x: MASKED[name](x), rules)(None, normal(2, 3, 3))
    assert explanation.relevance.isfinite().all()
    assert all(abs(row.residual) < 1e-9 * max(1.0, row.absolute) for row in explanation.rows)
    assert abs(explanation.residual) < 1e-9


@pytest.mark.parametrize("argnums", [1, 2, (1, 2)])
@pytest.mark.parametrize("rules", RULES)
def test_one_side_of_cross_attention(rules: str, argnums: Any) -> None:
    """What is explained may be the queries alone: with weights held constant, the memory's values are, too."""
    model_fn, params = lrp.from_module(randomized(nn.TransformerDecoderLayer(4, 2, 6, batch_first=True)))
    explanation = lrp.explain(model_fn, RULES[rules], argnums=argnums)(params, normal(2, 3, 4), normal(2, 4, 4, seed=1))
    assert all(abs(row.residual) < 1e-9 * max(1.0, row.absolute) for row in explanation.rows)
    assert explanation.relevance_in != 0


KEEPING = lrp.TaylorSoftmax("distribute")


@pytest.mark.parametrize("rules", [lrp.attn_lrp(), lrp.gradient()])
@pytest.mark.parametrize("rule", [KEEPING, lrp.Stop(), 0.5 * lrp.TaylorSoftmax()])
def test_a_rule_for_softmax_does_not_pass_by_fused_attention(rule: lrp.Rule, rules: lrp.Composite) -> None:
    """What serves fused attention would do something else than what serves it written out."""
    ours, theirs = both(lambda attend, x: attend(x, x, x))
    x, rules = normal(2, 3, 3), in_front(lrp.Softmax, rule, rules)
    with pytest.raises(lrp.RuleError, match=r"(?s)softmax inside, .*attention.*rules = \[\(lrp.Attention, lrp.Uniform"):
        lrp.attribute(ours, rules)(None, x)
    assert lrp.attribute(theirs, rules)(None, x).shape == x.shape
    assert lrp.attribute(ours, in_front(lrp.Attention, lrp.Uniform(), rules))(None, x).shape == x.shape


@pytest.mark.parametrize("rule", [lrp.TaylorSoftmax(), lrp.Gradient(), KEEPING])
def test_rules_for_softmax_that_change_nothing_inside_fused_attention(rule: lrp.Rule) -> None:
    """Those that absorb, and any where the weights are held constant."""
    rules = in_front(lrp.Softmax, rule, lrp.cp_lrp() if rule == KEEPING else lrp.attn_lrp())
    x = normal(2, 3, 3)
    results = [lrp.attribute(f, rules)(None, x) for f in both(lambda attend, x: attend(x, x, x))]
    assert largest_difference(*results) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# The expansion of the softmax

MULTIPLIERS = [1.0, -2.0, 3.0, 0.5]
SCORES = {"plain": [0.5, -1.0, 2.0, 0.25], "masked": [0.5, -torch.inf, 2.0, 0.25], "alone": [-torch.inf] * 3 + [2.0]}


def expansion(bias: str, x: list[float], m: list[float], epsilon: float) -> list[float]:
    """One number at a time; a score of minus infinity is not there."""
    here = [i for i, score in enumerate(x) if score > -math.inf]
    total = sum(math.exp(x[i]) for i in here)
    s = {i: math.exp(x[i]) / total for i in here}
    mean = sum(s[i] * x[i] for i in here)
    relevance = {i: s[i] * m[i] for i in here}
    if bias == "omit":
        centred = {i: x[i] - mean for i in here}
        v = {i: m[i] / (c + epsilon if c >= 0 else c - epsilon) for i, c in centred.items()}
        mean_of_v = sum(s[i] * v[i] for i in here)
        found = {i: x[i] * s[i] * (v[i] - mean_of_v) for i in here}
    else:
        found = {i: x[i] * (relevance[i] - s[i] * sum(relevance.values())) for i in here}
    if bias == "distribute":
        share = sum((1 + mean - x[j]) * relevance[j] for j in here) / len(here)
        found = {i: r + share for i, r in found.items()}
    return [found.get(i, 0.0) for i in range(len(x))]


SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "native": lambda x: x.softmax(-1),
    "first_axis": lambda x: x.T.softmax(0).T,
    "written_out": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    "shifted": lambda x: (y := (x - x.amax(-1, keepdim=True)).exp()) / y.sum(-1, keepdim=True),
    "all_axes": lambda x: (y := x.exp()) / y.sum(),
}


@pytest.mark.parametrize("bias", ["absorb", "omit", "distribute"])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("spelling", SOFTMAX)
def test_the_expansion_by_hand(spelling: str, scores: str, bias: Any) -> None:
    x, m = (torch.tensor([numbers], dtype=torch.float64) for numbers in (SCORES[scores], MULTIPLIERS))
    expected = torch.tensor([expansion(bias, SCORES[scores], MULTIPLIERS, 0.1)], dtype=torch.float64)
    explain = lrp.explain(lambda m, x: SOFTMAX[spelling](x) * m, [(lrp.Softmax, lrp.TaylorSoftmax(bias, 0.1))])
    # Relevance may start in either form.
    for explanation in (explain(m, x), explain(m, x, target=SOFTMAX[spelling](x) * m)):
        assert torch.allclose(explanation.relevance, expected, rtol=1e-12, atol=1e-12)
        assert abs(explanation.residual) < 1e-12


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), size=st.integers(2, 5))
def test_which_expansions_conserve(seed: int, size: int) -> None:
    x, start = normal(2, size, seed=seed), normal(2, size, seed=seed + 1)

    def arrives(rule: lrp.Rule) -> Tensor:
        fn = lrp.attribute(lambda _, x: x.softmax(-1), [(lrp.Softmax, rule)])
        return fn(None, x, target=start).sum(-1)

    assert torch.allclose(arrives(lrp.TaylorSoftmax("distribute")), start.sum(-1))
    assert torch.allclose(arrives(lrp.TaylorSoftmax("omit", 0.0)), start.sum(-1), rtol=1e-6)
    assert not torch.allclose(arrives(lrp.TaylorSoftmax()), start.sum(-1))


@pytest.mark.parametrize("f", [torch.log_softmax, torch.logsumexp])
def test_logarithms_take_the_plain_derivative(f: Callable[[Tensor, int], Tensor]) -> None:
    x, model_fn = normal(2, 3), lambda _, x: f(x, -1)
    explanation = lrp.explain(model_fn, lrp.attn_lrp())(None, x)
    assert largest_difference(explanation.relevance, x * grad(lambda x: f(x, -1).sum())(x)) < 1e-14
    assert abs(explanation.residual) < 1e-12
    with pytest.raises(lrp.RuleError, match="bias='omit' is for a softmax"):
        lrp.attribute(model_fn, [(lrp.Softmax, lrp.TaylorSoftmax("omit"))])(None, x)


def test_what_the_expansion_serves() -> None:
    with pytest.raises(ValueError, match="bias is 'absorb', 'omit' or 'distribute', not 'drop'"):
        lrp.TaylorSoftmax("drop")  # type: ignore[arg-type]
    with pytest.raises(lrp.RuleError, match="TaylorSoftmax serves softmax, log_softmax and logsumexp"):
        lrp.attribute(lambda _, x: x.tanh(), [(lrp.Activation, lrp.TaylorSoftmax())])(None, normal(2, 3))
