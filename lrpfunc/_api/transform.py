"""What users call: `attribute`, `attribute_and_value` and `vjp`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, TypedDict, TypeVar, Unpack, overload

from torch import Tensor, nn

from lrpfunc import _tree as tree
from lrpfunc._api.attribution import Attribution
from lrpfunc._api.options import Argnames, Argnums, Globs, Options
from lrpfunc._api.selected import named
from lrpfunc._api.target import plain, start
from lrpfunc._api.uncompiled import uncompiled
from lrpfunc._errors import InputError
from lrpfunc._walk.rows import chosen
from lrpfunc.composites import Composite, Entry, as_composite
from lrpfunc.rules._message import Relevance

Rules = Composite | Iterable[Entry] | None
Output = TypeVar("Output")
Aux = TypeVar("Aux")
Named = tuple[Tensor, dict[str, Tensor]]
"""The relevance of the input, and that of layers."""


class _Rest(TypedDict, total=False):
    """The options that do not decide what a function returns."""

    inline_functions: bool
    lowered: bool
    segments: int
    dynamic: bool | None


@overload
def attribute(
    model_fn: Callable[..., Any],
    rules: Rules = None,
    *,
    argnums: Literal[1] = 1,
    has_aux: Literal[False] = False,
    layers: None = None,
    **rest: Unpack[_Rest],
) -> Attribution[Tensor]: ...
@overload
def attribute(
    model_fn: Callable[..., Any],
    rules: Rules = None,
    *,
    argnums: Literal[1] = 1,
    has_aux: Literal[False] = False,
    layers: str | nn.Module | Sequence[str | nn.Module],
    **rest: Unpack[_Rest],
) -> Attribution[Named]: ...
@overload
def attribute(
    model_fn: Callable[..., tuple[Any, Aux]],
    rules: Rules = None,
    *,
    argnums: Literal[1] = 1,
    has_aux: Literal[True],
    layers: None = None,
    **rest: Unpack[_Rest],
) -> Attribution[tuple[Tensor, Aux]]: ...
@overload
def attribute(
    model_fn: Callable[..., tuple[Any, Aux]],
    rules: Rules = None,
    *,
    argnums: Literal[1] = 1,
    has_aux: Literal[True],
    layers: str | nn.Module | Sequence[str | nn.Module],
    **rest: Unpack[_Rest],
) -> Attribution[tuple[Named, Aux]]: ...
@overload
def attribute(
    model_fn: Callable[..., Any],
    rules: Rules = None,
    *,
    argnums: Argnums = 1,
    argnames: Argnames = None,
    has_aux: bool = False,
    layers: Globs = None,
    **rest: Unpack[_Rest],
) -> Attribution[Any]: ...
def attribute(
    model_fn: Callable[..., Any],
    rules: Rules = None,
    *,
    argnums: Argnums = 1,
    has_aux: bool = False,
    layers: Globs = None,
    inline_functions: bool = False,
    lowered: bool = True,
    segments: int = 1,
    argnames: Argnames = None,
    dynamic: bool | None = None,
) -> Attribution[Any]:
    """Transforms a model function into one that explains it: the relevance of an argument for the output.

    The result is an ordinary function of tensors, in the grammar of `torch.func.grad`: it composes with `grad`,
    `vmap`, `jacrev` and `jacfwd`, and every derivative is exact.

    Args:
        model_fn: A pure function such as `f(params, x)`, from `from_module` or written by hand. Parameters come
            first: an explained argument 0 is taken to be parameters if another argument has floating-point tensors.
        rules: Which rule serves which layer: a composite or a list of pairs `(selector, rule)`. With `None`,
            convolutions take `ZPlus`, dense layers `Epsilon`, and everything else is served as in `attn_lrp()`.
        argnums: The argument to explain, or a tuple of several; one that is given by its name counts, too.
        has_aux: Whether `model_fn` returns `(output, aux)`.
        layers: A glob on module paths, a module, or several of them, where relevance is wanted too; `*` crosses dots.
            In a function without modules, on the names that `explain` prints. Attention that runs in a module `path`
            has two names more: `path.weights`, of shape `(N, heads, queries, keys)`, and `path.heads`, what the heads
            give before they are merged. Where the input is made of integers, such as token ids, relevance starts at
            the first floating-point activations that depend on them.
        inline_functions: Explain the forward of a custom `autograd.Function` instead of refusing it.
        lowered: Run the forward pass and the walk as one flat program, made at the first call with tensors of such
            shapes. `False` takes the operations and rules one at a time, so that a debugger can stop in a rule.
        segments: Trades compute for memory, as `torch.utils.checkpoint` does: the walk back computes the forward pass
            anew in that many parts, and only what stands between them is kept. About the square root of the number of
            layers needs the least memory.
        argnames: The name of the argument to explain, or a tuple of several, in place of `argnums`.
        dynamic: Whether a program may serve several sizes, such as those of batches and sentences. `None` leaves a
            size of the data open once it differs from call to call, `True` leaves all of them open at once, and with
            `False` there is a program for each.

    Returns:
        `f(*args, target=None, **kwargs)`, which returns relevance shaped like `args[argnums]` (a tuple for a tuple,
        `None` for integers); with `layers`, `(relevance, {name: relevance})`; with `has_aux`, `(that, aux)`. `target`
        says where relevance starts: an integer, or a tensor, list or array of integers, indexes the last axis of an
        output of 1 or 2 dimensions, one for all samples or one each; `at(position, index)` does so for the logits of a
        sequence; a floating-point tensor like the output is the starting relevance itself; a function of the output
        returns one of these, as `predicted` does; `None` starts with the output. In a cotangent composite, such as
        `gradient()`, an integer or `None` starts with ones there, the cotangent of the output.

    Raises:
        UncoveredLayerError: If a layer is not linear and no rule covers it.
        RuleError: If a rule is given to a layer it cannot serve.
        TargetError: If the target does not fit the output.
        InputError: If what is explained, or the output, is not made of floating-point tensors.
        NoPathError: If the output does not depend on what is explained.
        LayerNotFoundError: If `layers` matches nothing.
        CaptureError: If the model function is not pure, or cannot be traced.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> def model_fn(params, x):
        ...     return torch.relu(x @ params["hidden"]) @ params["head"]
        >>> params = {"hidden": torch.tensor([[1.0, -1.0], [2.0, 0.5]]), "head": torch.eye(2)}
        >>> relevance_fn = lrp.attribute(model_fn, lrp.epsilon())
        >>> relevance_fn(params, torch.tensor([[1.0, 3.0]]), target=0)
        tensor([[1.0000, 6.0000]])

    References:
        S. Bach et al., "On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance
        propagation", PLOS ONE 10(7), 2015.
    """
    options = Options(argnums, has_aux, named(layers, model_fn), inline_functions, lowered, segments, argnames, dynamic)
    return _attribution(model_fn, rules, options, with_value=False)


@overload
def attribute_and_value(
    model_fn: Callable[..., Output],
    rules: Rules = None,
    *,
    argnums: Literal[1] = 1,
    has_aux: Literal[False] = False,
    layers: None = None,
    **rest: Unpack[_Rest],
) -> Attribution[tuple[Tensor, Output]]: ...
@overload
def attribute_and_value(
    model_fn: Callable[..., Output],
    rules: Rules = None,
    *,
    argnums: Literal[1] = 1,
    has_aux: Literal[False] = False,
    layers: str | nn.Module | Sequence[str | nn.Module],
    **rest: Unpack[_Rest],
) -> Attribution[tuple[Named, Output]]: ...
@overload
def attribute_and_value(
    model_fn: Callable[..., tuple[Output, Aux]],
    rules: Rules = None,
    *,
    argnums: Literal[1] = 1,
    has_aux: Literal[True],
    layers: None = None,
    **rest: Unpack[_Rest],
) -> Attribution[tuple[Tensor, tuple[Output, Aux]]]: ...
@overload
def attribute_and_value(
    model_fn: Callable[..., tuple[Output, Aux]],
    rules: Rules = None,
    *,
    argnums: Literal[1] = 1,
    has_aux: Literal[True],
    layers: str | nn.Module | Sequence[str | nn.Module],
    **rest: Unpack[_Rest],
) -> Attribution[tuple[Named, tuple[Output, Aux]]]: ...
@overload
def attribute_and_value(
    model_fn: Callable[..., Any],
    rules: Rules = None,
    *,
    argnums: Argnums = 1,
    argnames: Argnames = None,
    has_aux: bool = False,
    layers: Globs = None,
    **rest: Unpack[_Rest],
) -> Attribution[Any]: ...
def attribute_and_value(
    model_fn: Callable[..., Any],
    rules: Rules = None,
    *,
    argnums: Argnums = 1,
    has_aux: bool = False,
    layers: Globs = None,
    inline_functions: bool = False,
    lowered: bool = True,
    segments: int = 1,
    argnames: Argnames = None,
    dynamic: bool | None = None,
) -> Attribution[Any]:
    """Like `attribute`, and returns the model's output as well, from the same single forward pass.

    Two calls are two forward passes, and where the model draws random numbers, as dropout does in training, two draws:
    the output of one is not what the relevance of the other explains. For several attributions of one forward pass,
    run that by `vjp`, whose pullback takes any number of targets.

    Args:
        model_fn: As for `attribute`.
        rules: As for `attribute`.
        argnums: As for `attribute`.
        has_aux: As for `attribute`.
        layers: As for `attribute`.
        inline_functions: As for `attribute`.
        lowered: As for `attribute`.
        segments: As for `attribute`.
        argnames: As for `attribute`.
        dynamic: As for `attribute`.

    Returns:
        A function that returns `(relevance, output)`; with `has_aux`, `(relevance, (output, aux))`, in the order of
        `torch.func.grad_and_value`.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> fn = lrp.attribute_and_value(lambda w, x: x @ w, lrp.epsilon())
        >>> fn(torch.ones(2, 1), torch.tensor([[1.0, 3.0]]), target=0)
        (tensor([[1.0000, 3.0000]]), tensor([[4.]]))
    """
    options = Options(argnums, has_aux, named(layers, model_fn), inline_functions, lowered, segments, argnames, dynamic)
    return _attribution(model_fn, rules, options, with_value=True)


@uncompiled
def _attribution(model_fn: Callable[..., Any], rules: Rules, options: Options, *, with_value: bool) -> Attribution[Any]:
    if not callable(model_fn):
        raise InputError(
            f"model_fn must be a function such as f(params, x), not {type(model_fn).__name__}; for a module write\n\n"
            "    model_fn, params = lrpfunc.from_module(module)"
        )
    return Attribution(model_fn, as_composite(rules), options, with_value)


class Pullback(Protocol):
    """Pulls relevance back through one forward pass."""

    def __call__(self, target: Any, /, *, rows: Any = None) -> Tensor: ...


@overload
def vjp(
    model_fn: Callable[..., Output],
    rules: Rules,
    params: Any,
    x: Tensor,
    /,
    *primals: Any,
    argnums: Literal[1] = 1,
    has_aux: Literal[False] = False,
    layers: None = None,
    inline_functions: bool = False,
    lowered: bool = True,
    segments: int = 1,
    argnames: None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> tuple[Output, Pullback]: ...
@overload
def vjp(
    model_fn: Callable[..., tuple[Output, Aux]],
    rules: Rules,
    params: Any,
    x: Tensor,
    /,
    *primals: Any,
    argnums: Literal[1] = 1,
    has_aux: Literal[True],
    layers: None = None,
    inline_functions: bool = False,
    lowered: bool = True,
    segments: int = 1,
    argnames: None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> tuple[Output, Pullback, Aux]: ...
@overload
def vjp(
    model_fn: Callable[..., Any],
    rules: Rules,
    *primals: Any,
    argnums: Argnums = 1,
    has_aux: bool = False,
    layers: Globs = None,
    inline_functions: bool = False,
    lowered: bool = True,
    segments: int = 1,
    argnames: Argnames = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]: ...
@uncompiled
def vjp(
    model_fn: Callable[..., Any],
    rules: Rules,
    *primals: Any,
    argnums: Argnums = 1,
    has_aux: bool = False,
    layers: Globs = None,
    inline_functions: bool = False,
    lowered: bool = True,
    segments: int = 1,
    argnames: Argnames = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Runs a model function once and returns what pulls relevance back through that run, as `torch.func.vjp` does.

    Args:
        model_fn: As for `attribute`.
        rules: As for `attribute`. With `gradient()` this is `torch.func.vjp`.
        *primals: The arguments of `model_fn`.
        argnums: The argument to explain, or a tuple of several.
        has_aux: Whether `model_fn` returns `(output, aux)`.
        layers: As for `attribute`.
        inline_functions: As for `attribute`.
        lowered: As for `attribute`.
        segments: As for `attribute`.
        argnames: As for `attribute`.
        dynamic: As for `attribute`.
        **kwargs: Keyword arguments of `model_fn`.

    Returns:
        `(output, pullback)`, or `(output, pullback, aux)`. `pullback` takes starting relevance, a pytree of tensors
        like the output, or any other `target` of `attribute`, and returns what `attribute` does: relevance shaped like
        `primals[argnums]`, a tuple only for a tuple `argnums`, with `layers` that and the relevance there. Call it, or
        `vmap` it, as often as you like. `pullback(target, rows=index)` walks back for the samples that `index` picks
        alone: the target is theirs, as for `output[index]`, and so is the answer, shaped like `x[index]`.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> output, pullback = lrp.vjp(lambda w, x: x @ w, lrp.epsilon(), torch.eye(2), torch.tensor([[1.0, 3.0]]))
        >>> torch.vmap(pullback)(torch.diag_embed(output[0])[:, None])
        tensor([[[1.0000, 0.0000]],
        <BLANKLINE>
                [[0.0000, 3.0000]]])
        >>> pullback(lrp.predicted)
        tensor([[0.0000, 3.0000]])
    """
    options = Options(argnums, has_aux, named(layers, model_fn), inline_functions, lowered, segments, argnames, dynamic)
    attribution = _attribution(model_fn, rules, options, with_value=False)
    forward = attribution.forward(primals, kwargs, Relevance, reuse=True)

    @uncompiled
    def pullback(target: Any, /, *, rows: Any = None) -> Any:
        picked = None if rows is None else chosen(rows, forward.output)
        output = forward.output if picked is None else tree.map_only(Tensor, lambda t: t[picked], forward.output)
        messages = start(plain(target), output)
        if not attribution.rules.cotangent:  # else what the start says of a multiplier is a cotangent
            leaves = [leaf for leaf in tree.leaves(output) if isinstance(leaf, Tensor)]
            messages = [Relevance(m.relevance(leaf)) for m, leaf in zip(messages, leaves, strict=True)]
        messages = [Relevance(message.value) for message in messages]
        return forward.pull(messages) if picked is None else forward.rows(messages, picked)

    return (forward.output, pullback, forward.aux) if has_aux else (forward.output, pullback)
