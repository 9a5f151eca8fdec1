"""What must hold of relevance, whatever the model: one function a property."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import vmap

import lrpfunc as lrp
from lrpfunc._torch import vjp

ModelFn = Callable[..., Any]

ROUNDING = 1e-9
"""What two ways to compute the same numbers in float64 may differ by, relative to the largest."""

CANCELLED = 1e-4
"""Numbers below are compared as if they were as large: behind a layer norm of one feature all of it is rounding."""


def assert_gradient_equivalence(
    model_fn: ModelFn, params: Any, x: Any, rules: Any = None, *, homogeneous: bool = False, tolerance: float = ROUNDING
) -> None:
    """With `gradient()`, `vjp` is `torch.func.vjp`; and what `attribute_and_value` returns is the model's own value.

    The first for the input and for the parameters, but for running statistics, which torch does not differentiate.
    The value has the bits of the model's, and its gradients for the parameters are those of the plain model.

    Args:
        model_fn: A function `f(params, x)`.
        params: Its parameters.
        x: Its input.
        rules: Those that the value is computed beside.
        homogeneous: The model is made of ReLUs and layers without a bias: then LRP-0 must be input times gradient.
        tolerance: Relative to the largest number.

    Raises:
        AssertionError: If not, with the largest differences.

    Example:
        >>> from lrpfunc.testing import Linear, Net, Pointwise, assert_gradient_equivalence
        >>> assert_gradient_equivalence(*Net((Linear(2), Pointwise("tanh"))).case())
    """
    trained, untrained = _split(params)
    _, plain = vjp(lambda p, x: model_fn(_joined(p, untrained), x), trained, x)
    output, pullback = lrp.vjp(model_fn, lrp.gradient(), params, x, argnums=(0, 1))
    cotangent = pytree.tree_map(_probe, output)
    ours, theirs = pullback(cotangent), plain(cotangent)
    _close(_split(ours[0])[0], theirs[0], tolerance, "gradient() and torch.func.vjp for the parameters")
    _close(ours[1], theirs[1], tolerance, "gradient() and torch.func.vjp for the input")
    _assert_value(model_fn, params, x, rules)
    if homogeneous:
        _, lrp_0 = lrp.vjp(model_fn, [(lrp.Activation, lrp.Pass())], params, x)
        product = pytree.tree_map(torch.mul, x, vjp(lambda x: model_fn(params, x), x)[1](cotangent)[0])
        start = pytree.tree_map(torch.mul, output, cotangent)
        _close(lrp_0(start), product, tolerance, "LRP-0 and input times gradient")


def _assert_value(model_fn: ModelFn, params: Any, x: Any, rules: Any) -> None:
    trained, untrained = _split(params)
    fn = lrp.attribute_and_value(model_fn, rules)
    _, value = fn(params, x)
    for ours, theirs in zip(pytree.tree_leaves(value), pytree.tree_leaves(model_fn(params, x)), strict=True):
        if not torch.equal(ours, theirs):
            raise AssertionError(f"the value is not the model's own: it differs by {_difference(ours, theirs):.1e}")
    cotangent = pytree.tree_map(_probe, value)
    _, pullback = vjp(lambda p: fn(_joined(p, untrained), x)[1], trained)
    _, plain = vjp(lambda p: model_fn(_joined(p, untrained), x), trained)
    _close(pullback(cotangent), plain(cotangent), ROUNDING, "gradients of the value and of the model")


def assert_vmap_equals_loop(
    model_fn: ModelFn,
    params: Any,
    x: Any,
    rules: Any = None,
    *,
    target: Any = None,
    lowered: bool = True,
    tolerance: float = ROUNDING,
) -> None:
    """`vmap` over inputs, parameters and targets gives what a loop gives.

    Args:
        model_fn: A function `f(params, x)`.
        params: Its parameters.
        x: Its input, to which other inputs are made by scaling.
        rules: As for `lrpfunc.attribute`.
        target: Where relevance starts while inputs and parameters vary.
        lowered: As for `lrpfunc.attribute`.
        tolerance: Relative to the largest number.

    Raises:
        AssertionError: If not, with what was mapped over.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import Linear, Net, assert_vmap_equals_loop
        >>> assert_vmap_equals_loop(*Net((Linear(2),)).case(), lrp.epsilon(0.1), target=0)
    """
    fn = lrp.attribute(model_fn, rules, lowered=lowered)

    def check(over: str, function: Callable[[Any], Any], values: Any) -> None:
        count = len(pytree.tree_leaves(values)[0])
        looped = [function(pytree.tree_map(lambda v, i=i: v[i], values)) for i in range(count)]
        expected = pytree.tree_map(lambda *parts: torch.stack(parts), *looped)
        _close(vmap(function)(values), expected, tolerance, f"vmap over {over} and a loop")

    check("inputs", lambda x: fn(params, x, target=target), _scaled(x, [1.0, -0.5]))
    if pytree.tree_leaves(params):
        check("parameters", lambda p: fn(p, x, target=target), _scaled(params, [1.0, 0.8]))
    output = model_fn(params, x)
    if isinstance(output, Tensor) and output.ndim in (1, 2):
        check("targets", lambda t: fn(params, x, target=t), torch.arange(min(output.shape[-1], 3)))


def assert_conservation(
    model_fn: ModelFn, params: Any, x: Any, rules: Any = None, *, target: Any = None, tolerance: float = ROUNDING
) -> None:
    r"""Every layer's relevance is accounted for: what arrives is handed on, or absorbed by a formula.

    .. math:: R_\text{out} = R_\text{in} + \sum_c \text{absorbed}_c

    Args:
        model_fn: A function `f(params, x)`.
        params: Its parameters.
        x: Its input.
        rules: As for `lrpfunc.attribute`.
        target: Where relevance starts.
        tolerance: Of a layer's residual, relative to the sum of the absolute relevance at its output and inputs.

    Raises:
        AssertionError: If a balance does not close or is not finite, with the balance of each such layer.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import Linear, Net, assert_conservation
        >>> assert_conservation(*Net((Linear(2),)).case(), lrp.epsilon(0.1), target=0)
    """
    explanation = lrp.explain(model_fn, rules)(params, x, target=target)
    off = [row for row in explanation.rows if not abs(row.residual) <= tolerance * max(row.absolute, 1e-30)]
    if off:
        raise AssertionError("the balance does not close at\n\n" + "\n".join(map(_balance, off)))
    total = sum(row.absolute for row in explanation.rows)
    if not abs(explanation.residual) <= tolerance * max(total, abs(explanation.start), 1e-30):
        raise AssertionError(f"each layer's balance closes, but the model's does not:\n\n{explanation}")


def _balance(row: lrp.Row) -> str:
    absorbed = "".join(f" + {amount:.6g} {cause}" for cause, amount in row.absorbed.items() if amount)
    return (
        f"    {row.layer}\n        {row.rule!r}\n        "
        f"{row.relevance_out:.6g} = {row.relevance_in:.6g}{absorbed}   off by {row.residual:.3g}"
    )


def assert_pure(model_fn: ModelFn, params: Any, x: Any, rules: Any = None, *, target: Any = None) -> None:
    """A call changes nothing, and a second one gives the same bits.

    Parameters and input are compared bit by bit and by their version counters, as are the state of random numbers,
    the gradient mode and the default dtype.

    Args:
        model_fn: A function `f(params, x)`.
        params: Its parameters.
        x: Its input.
        rules: As for `lrpfunc.attribute`.
        target: Where relevance starts.

    Raises:
        AssertionError: If something has changed, with its name.

    Example:
        >>> from lrpfunc.testing import Linear, Net, assert_pure
        >>> assert_pure(*Net((Linear(2),)).case(), target=0)
    """
    before = _state(params, x)
    first = lrp.attribute(model_fn, rules)(params, x, target=target)
    after = _state(params, x)
    changed = [name for name, value in before.items() if not _same(value, after[name])]
    if changed:
        raise AssertionError(f"the call has changed {', '.join(changed)}")
    second = lrp.attribute(model_fn, rules)(params, x, target=target)
    for one, other in zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True):
        if not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise AssertionError(f"two calls with the same arguments differ by {_difference(one, other):.1e}")


def _state(params: Any, x: Any) -> dict[str, Any]:
    tensors = pytree.tree_flatten_with_path({"input": x, "parameters": params})[0]
    return {
        **{pytree.keystr(path): (leaf, leaf._version, leaf.detach().clone(), leaf.grad) for path, leaf in tensors},
        "the state of random numbers": torch.get_rng_state(),
        "the gradient mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
    }


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, tuple):
        return before[1] == after[1] and torch.equal(before[2], after[2]) and before[3] is after[3]
    return torch.equal(before, after) if isinstance(before, Tensor) else before == after


def assert_linear_in_relevance(
    model_fn: ModelFn, params: Any, x: Any, rules: Any = None, *, tolerance: float = ROUNDING
) -> None:
    """Twice one starting relevance less thrice another gives twice and thrice what they give alone.

    So it is for all rules but `ReLUDeconvNet` and `ReLUGuidedBackprop`, which look at the sign of what arrives.

    Args:
        model_fn: A function `f(params, x)`.
        params: Its parameters.
        x: Its input.
        rules: As for `lrpfunc.attribute`.
        tolerance: Relative to the largest number.

    Raises:
        AssertionError: If not, with the largest difference.

    Example:
        >>> from lrpfunc.testing import Linear, Net, assert_linear_in_relevance
        >>> assert_linear_in_relevance(*Net((Linear(2),)).case())
    """
    output, pullback = lrp.vjp(model_fn, rules, params, x)
    one, other = pytree.tree_map(_probe, output), pytree.tree_map(lambda o: _probe(o).square() - 0.3, output)
    both = pullback(pytree.tree_map(lambda a, b: 2 * a - 3 * b, one, other))
    apart = [pytree.tree_map(lambda r, f=f: f * r, pullback(start)) for f, start in ((2, one), (-3, other))]
    _close(both, pytree.tree_map(torch.add, *apart), tolerance, "relevance of a sum and the sum of relevances", apart)


def assert_lowered_equals_walk(
    model_fn: ModelFn, params: Any, x: Any, rules: Any = None, *, target: Any = None, tolerance: float = ROUNDING
) -> None:
    """The flat program that runs gives what the walk operation by operation gives, differentiated or not.

    Args:
        model_fn: A function `f(params, x)`.
        params: Its parameters.
        x: Its input.
        rules: As for `lrpfunc.attribute`.
        target: Where relevance starts.
        tolerance: Relative to the largest number.

    Raises:
        AssertionError: If they differ.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import Linear, Net, assert_lowered_equals_walk
        >>> assert_lowered_equals_walk(*Net((Linear(2),)).case(), lrp.epsilon(0.1), target=0)
    """
    flat, walk = (lrp.attribute_and_value(model_fn, rules, lowered=lowered) for lowered in (True, False))
    for differentiated in (False, True):
        given = pytree.tree_map(lambda t, d=differentiated: t.detach().requires_grad_(d), x)
        found, expected = (fn(params, given, target=target) for fn in (flat, walk))
        how = "differentiated" if differentiated else "plain"
        _close(found, expected, tolerance, f"the {how} lowered relevance and the walk's")


def assert_compiles(
    model_fn: ModelFn,
    params: Any,
    x: Any,
    rules: Any = None,
    *,
    target: Any = None,
    fullgraph: bool = True,
    backend: str = "aot_eager",
    tolerance: float = ROUNDING,
) -> None:
    """`torch.compile` of the relevance function gives what the function gives.

    Args:
        model_fn: A function `f(params, x)`.
        params: Its parameters.
        x: Its input.
        rules: As for `lrpfunc.attribute`.
        target: Where relevance starts.
        fullgraph: Whether it must compile to one graph.
        backend: As for `torch.compile`.
        tolerance: Relative to the largest number.

    Raises:
        AssertionError: If they differ. What torch raises where it cannot compile comes through.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import Linear, Net, assert_compiles
        >>> assert_compiles(*Net((Linear(2),)).case(), lrp.epsilon(0.1), target=0, backend="eager")
    """
    fn = lrp.attribute(model_fn, rules)

    def relevance(params: Any, x: Any) -> Any:
        return fn(params, x, target=target)

    torch.compiler.reset()
    compiled = torch.compile(relevance, fullgraph=fullgraph, backend=backend)(params, x)
    _close(compiled, relevance(params, x), tolerance, "the compiled and the uncompiled relevance")


# --------------------------------------------------------------------------------------------------------------
# Pytrees of numbers


def _split(params: Any) -> tuple[Any, Any]:
    """A dictionary of parameters without, and of nothing but, the running statistics among them."""
    if not isinstance(params, dict):
        return params, {}
    statistics = {name: value for name, value in params.items() if "running_" in str(name)}
    return {name: value for name, value in params.items() if name not in statistics}, statistics


def _joined(trained: Any, statistics: Any) -> Any:
    return {**trained, **statistics} if statistics else trained


def _probe(output: Tensor) -> Tensor:
    """Numbers of either sign, shaped like the output."""
    return torch.linspace(-1, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)


def _scaled(tree: Any, factors: Sequence[float]) -> Any:
    return pytree.tree_map(lambda leaf: torch.stack([factor * leaf for factor in factors]), tree)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max()) if ours.numel() else 0.0


def _close(ours: Any, theirs: Any, tolerance: float, what: str, scales: Any = ()) -> None:
    pairs = list(zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True))
    magnitudes = [
        leaf.abs().max() for leaf in (*pytree.tree_leaves(theirs), *pytree.tree_leaves(scales)) if leaf.numel()
    ]
    scale = max([float(m.detach()) for m in magnitudes], default=0.0)
    worst = torch.tensor([_difference(a.detach(), b.detach()) for a, b in pairs]).max() if pairs else torch.tensor(0)
    if not worst <= tolerance * max(scale, CANCELLED):  # NaN is no agreement
        raise AssertionError(f"{what} differ by {float(worst):.3g}, and the largest number is {scale:.3g}")
