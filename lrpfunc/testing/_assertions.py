"""What must hold of relevance, whatever the model: one function a property."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

import lrpfunc as lrp
from lrpfunc import _tree as tree
from lrpfunc._ops.derivatives import vjp
from lrpfunc.composites import as_composite
from lrpfunc.testing._numbers import (
    ROUNDING,
    PropertyError,
    close,
    difference,
    identical,
    joined,
    probe,
    require_float64,
    sample,
    samples,
    scaled,
    split,
)

ModelFn = Callable[..., Any]


def assert_gradient_equivalence(
    model_fn: ModelFn,
    params: Any,
    x: Any,
    rules: Any = None,
    *,
    homogeneous: bool = False,
    lowered: bool = True,
    tolerance: float = ROUNDING,
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
        lowered: As for `lrpfunc.attribute`.
        tolerance: Relative to the largest number.

    Raises:
        AssertionError: If not, with the largest differences.

    Example:
        >>> from lrpfunc.testing import Linear, Net, Pointwise, assert_gradient_equivalence
        >>> assert_gradient_equivalence(*Net((Linear(2), Pointwise("tanh"))).case())
    """
    trained, untrained = split(params)
    _, plain = vjp(lambda p, x: model_fn(joined(p, untrained), x), trained, x)
    output, pullback = lrp.vjp(model_fn, lrp.gradient(), params, x, argnums=(0, 1))
    cotangent = tree.map(probe, output)
    ours, theirs = pullback(cotangent), plain(cotangent)
    close(split(ours[0])[0], theirs[0], tolerance, ("gradient()", "torch.func.vjp for the parameters"))
    close(ours[1], theirs[1], tolerance, ("gradient()", "torch.func.vjp for the input"))
    _assert_value(model_fn, params, x, rules, lowered)
    if homogeneous:
        _, lrp_0 = lrp.vjp(model_fn, [(lrp.Activation, lrp.Pass())], params, x)
        product = tree.map(torch.mul, x, vjp(lambda x: model_fn(params, x), x)[1](cotangent)[0])
        start = tree.map(torch.mul, output, cotangent)
        close(lrp_0(start), product, tolerance, ("LRP-0", "input times gradient"))


def _assert_value(model_fn: ModelFn, params: Any, x: Any, rules: Any, lowered: bool) -> None:
    trained, untrained = split(params)
    fn = lrp.attribute_and_value(model_fn, rules, lowered=lowered)
    _, value = fn(params, x)
    for ours, theirs in zip(tree.leaves(value), tree.leaves(model_fn(params, x)), strict=True):
        if not torch.equal(ours, theirs):
            raise PropertyError(f"the value is not the model's own: it differs by {difference(ours, theirs):.1e}")
    cotangent = tree.map(probe, value)
    _, pullback = vjp(lambda p: fn(joined(p, untrained), x)[1], trained)
    _, plain = vjp(lambda p: model_fn(joined(p, untrained), x), trained)
    close(pullback(cotangent), plain(cotangent), ROUNDING, ("gradients of the value", "gradients of the model"))


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
        tensors = [leaf for leaf in tree.leaves(values) if isinstance(leaf, Tensor)]
        if not tensors:
            return
        looped = [function(tree.map_only(Tensor, lambda v, i=i: v[i], values)) for i in range(len(tensors[0]))]
        expected = tree.map(lambda *parts: torch.stack(parts), *looped)
        axes = tree.map(lambda v: 0 if isinstance(v, Tensor) else None, values)
        close(vmap(function, in_dims=(axes,))(values), expected, tolerance, (f"vmap over {over}", "a loop"))

    check("inputs", lambda x: fn(params, x, target=target), scaled(x, [1.0, -0.5]))
    check("parameters", lambda p: fn(p, x, target=target), scaled(params, [1.0, 0.8]))
    output = model_fn(params, x)
    if isinstance(output, Tensor) and output.ndim in (1, 2):
        check("targets", lambda t: fn(params, x, target=t), torch.arange(min(output.shape[-1], 3)))


def assert_samples_apart(
    model_fn: ModelFn,
    params: Any,
    x: Any,
    rules: Any = None,
    *,
    target: Any = None,
    lowered: bool = True,
    tolerance: float = ROUNDING,
) -> bool:
    """A sample's relevance is its own: that of a batch is that of its samples, each alone.

    So it must be wherever the model itself treats samples apart. Where its output for a sample alone is not that for
    the sample in the batch (to 1e-12), or there is one sample only, there is nothing to compare.

    Args:
        model_fn: A function `f(params, x)`, in float64.
        params: Its parameters.
        x: Its input, the batch first.
        rules: As for `lrpfunc.attribute`.
        target: Where relevance starts; tensors, and what functions return, are cut like the input.
        lowered: As for `lrpfunc.attribute`.
        tolerance: Relative to the largest number.

    Returns:
        Whether there was anything to compare.

    Raises:
        ValueError: If parameters or input are floating-point tensors of another dtype.
        AssertionError: If not, with the first sample for which it is not.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import Linear, Net, assert_samples_apart
        >>> assert_samples_apart(*Net((Linear(2),), (2, 3)).case(), lrp.epsilon(0.1), target=0)
        True
    """
    require_float64(params, x)
    count, output = samples(x), model_fn(params, x)
    if count < 2 or not _treats_apart(model_fn, params, x, output):
        return False
    start: Any = target(output) if callable(target) else target
    fn = lrp.attribute(model_fn, rules, lowered=lowered)
    together = fn(params, x, target=start)
    for i in range(count):
        alone = fn(params, sample(x, i), target=sample(start, i))
        what = (f"relevance of sample {i} in a batch of {count}", "of that sample alone")
        close(sample(together, i), alone, tolerance, what, together)
    return True


def _treats_apart(model_fn: ModelFn, params: Any, x: Any, output: Any) -> bool:
    try:
        for i in range(samples(x)):
            close(model_fn(params, sample(x, i)), sample(output, i), 1e-12, ("a sample alone", "in the batch"))
    except Exception:  # what it raises for one sample, or for numbers of other shapes, is not the matter here
        return False
    return True


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
        raise PropertyError("the balance does not close at\n\n" + "\n".join(map(_balance, off)))
    total = sum(row.absolute for row in explanation.rows)
    if not abs(explanation.residual) <= tolerance * max(total, abs(explanation.start), 1e-30):
        raise PropertyError(f"each layer's balance closes, but the model's does not:\n\n{explanation}")


def _balance(row: lrp.Row) -> str:
    absorbed = "".join(f" + {amount:.6g} {cause}" for cause, amount in row.absorbed.items() if amount)
    return (
        f"    {row.layer}\n        {row.rule!r}\n        "
        f"{row.relevance_out:.6g} = {row.relevance_in:.6g}{absorbed}   off by {row.residual:.3g}"
    )


def assert_pure(
    model_fn: ModelFn, params: Any, x: Any, rules: Any = None, *, target: Any = None, lowered: bool = True
) -> None:
    """A call changes nothing, and a second one gives the same bits.

    Parameters and input are compared bit by bit and by their version counters, as are the attributes of rules, the
    state of random numbers, the gradient mode and the default dtype.

    Args:
        model_fn: A function `f(params, x)`.
        params: Its parameters.
        x: Its input.
        rules: As for `lrpfunc.attribute`.
        target: Where relevance starts.
        lowered: As for `lrpfunc.attribute`.

    Raises:
        AssertionError: If something has changed, with its name.

    Example:
        >>> from lrpfunc.testing import Linear, Net, assert_pure
        >>> assert_pure(*Net((Linear(2),)).case(), target=0)
    """
    before = _state(params, x, rules)
    first = lrp.attribute(model_fn, rules, lowered=lowered)(params, x, target=target)
    after = _state(params, x, rules)
    changed = [name for name, value in before.items() if not _same(value, after[name])]
    if changed:
        raise PropertyError(f"the call has changed {', '.join(changed)}")
    second = lrp.attribute(model_fn, rules, lowered=lowered)(params, x, target=target)
    for one, other in zip(tree.leaves(first), tree.leaves(second), strict=True):
        if not identical(one, other):
            raise PropertyError(f"two calls with the same arguments differ by {difference(one, other):.1e}")


def _state(params: Any, x: Any, rules: Any) -> dict[str, Any]:
    composite = as_composite(rules)
    leaves = tree.named_leaves({"input": x, "parameters": params, "rules": composite})
    tensors = [(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor)]
    return {
        **{name: (leaf, leaf._version, leaf.detach().clone(), leaf.grad) for name, leaf in tensors},
        **{f"rules[{i}] ({type(rule).__name__})": tree.structure(rule) for i, (_, rule) in enumerate(composite)},
        "the state of random numbers": torch.get_rng_state(),
        "the gradient mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
    }


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, tuple):
        return before[1] == after[1] and identical(before[2], after[2]) and before[3] is after[3]
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
    one, other = tree.map(probe, output), tree.map(lambda o: probe(o).square() - 0.3, output)
    both = pullback(tree.map(lambda a, b: 2 * a - 3 * b, one, other))
    apart = [tree.map(lambda r, f=f: f * r, pullback(start)) for f, start in ((2, one), (-3, other))]
    close(both, tree.map(torch.add, *apart), tolerance, ("relevance of a sum", "the sum of relevances"), apart)


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
        given = tree.map(lambda t, d=differentiated: t.detach().requires_grad_(d), x)
        found, expected = (fn(params, given, target=target) for fn in (flat, walk))
        how = "differentiated" if differentiated else "plain"
        close(found, expected, tolerance, (f"the {how} lowered relevance", "the walk's"))


def assert_compiles(
    model_fn: ModelFn,
    params: Any,
    x: Any,
    rules: Any = None,
    *,
    target: Any = None,
    lowered: bool = True,
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
        lowered: As for `lrpfunc.attribute`.
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
    fn = lrp.attribute(model_fn, rules, lowered=lowered)

    def relevance(params: Any, x: Any) -> Any:
        return fn(params, x, target=target)

    torch.compiler.reset()
    compiled = torch.compile(relevance, fullgraph=fullgraph, backend=backend)(params, x)
    close(compiled, relevance(params, x), tolerance, ("the compiled relevance", "the uncompiled one"))
