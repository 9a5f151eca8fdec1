"""What users call: `attribute`, `attribute_and_value` and `vjp`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor

from lrpfunc import _tree as tree
from lrpfunc._api.arguments import Explained
from lrpfunc._api.bind import BoundAttribution
from lrpfunc._api.dynamo import call_in_graph, register
from lrpfunc._api.options import Argnums, Globs, Options
from lrpfunc._api.request import recognise
from lrpfunc._api.target import Contrast, OneHot, Target, form, relevances, start, tensors_of
from lrpfunc._capture.capture import capture
from lrpfunc._errors import CaptureError, InputError
from lrpfunc._lower.bound import Bound
from lrpfunc._lower.lower import lower
from lrpfunc._torch import is_wrapped, uncompiled
from lrpfunc._walk.assign import assign
from lrpfunc._walk.forward import Forward, op_by_op
from lrpfunc.composites import Composite, Entry, as_composite
from lrpfunc.rules._equality import Description
from lrpfunc.rules._message import Message, Relevance

Rules = Composite | Iterable[Entry] | None
R = TypeVar("R")


@final
@dataclass(frozen=True, eq=False)
class Attribution(Description, Generic[R]):
    """The function that `attribute` or `attribute_and_value` returns; it pickles, compares, hashes and prints."""

    model_fn: Callable[..., Any]
    rules: Composite
    options: Options
    with_value: bool

    handle: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", register(self))

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, f.name) for f in fields(self) if f.init)

    def __call__(self, *args: Any, target: Target | OneHot | Contrast = None, **kwargs: Any) -> R:
        if torch.compiler.is_dynamo_compiling():
            return call_in_graph(self, args, kwargs, target)
        return self.run(args, kwargs, target)

    # -- how it works

    def forward(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        form: type[Message],
        given: Sequence[Tensor] = (),
        *,
        bound: Bound | None = None,
        reuse: bool = False,
    ) -> Forward:
        """The forward pass, run, and the walk back from it. Each step is cached on what the one before it gives.

        Args:
            args: The arguments of the model function.
            kwargs: Its keyword arguments.
            form: The form of the messages that relevance will start with.
            given: The tensors, if they are known, that those are made of.
            bound: The first of the arguments, if it is bound.
            reuse: Whether the walk will be taken several times.
        """
        options = self.options
        explained = Explained(args, options)
        program, tensors = capture(
            self.model_fn, args, kwargs, has_aux=options.has_aux, inline=options.inline_functions
        )
        graph = recognise(program, explained, options.globs)
        rules = assign(graph, self.rules)
        if not options.lowered:
            return op_by_op(graph, rules, tensors)
        # A function may make relevance to differentiate of what is not; the forward pass cannot then be run again.
        exact = program.is_random and form is Relevance
        return lower(
            graph, rules, tensors, form, given, bound=bound, segments=options.segments, reuse=reuse, exact=exact
        )

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: Target | OneHot | Contrast,
        bound: Bound | None = None,
    ) -> Any:
        """The forward pass, and the walk back from where the target says."""
        forward = self.forward(args, kwargs, form(target), tensors_of(target), bound=bound)
        relevance = forward.pull(start(target, forward.output))
        match self.with_value, self.options.has_aux:
            case False, False:
                return relevance
            case False, True:
                return relevance, forward.aux
            case True, False:
                return relevance, forward.output
            case _:
                return relevance, (forward.output, forward.aux)

    def value(self, args: tuple[Any, ...], kwargs: dict[str, Any], bound: Bound | None = None) -> Any:
        """The output alone."""
        forward = self.forward(args, kwargs, Relevance, bound=bound)
        if forward.is_random:
            raise CaptureError(
                "the model function draws random numbers, and in torch.compile a function as target would see another "
                "draw than the relevance. Call module.eval(), or give a target that is no function, such as an index"
            )
        return forward.output

    # -- what users call

    def bind(self, params: Any) -> BoundAttribution:
        """Binds the first argument, and computes once what the rules make of it alone.

        Clamped, folded and merged weights are then not computed anew at each call. The result is a snapshot: it does
        not see later changes of the parameters, nor can it be differentiated with respect to them. Calls with other
        shapes or targets use the same weights.

        Args:
            params: The first argument of the model function.

        Returns:
            A function of the remaining arguments and of `target`. It is a `torch.nn.Module`, which `torch.export`
            takes; the exported program needs no lrpfunc.

        Raises:
            InputError: If the first argument is explained itself, or transformed by `grad` or `vmap`.

        Example:
            >>> import torch, lrpfunc as lrp
            >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, lrp.epsilon()).bind(torch.eye(2))
            >>> relevance_fn(torch.tensor([[1.0, 3.0]]), target=1)
            tensor([[0.0000, 3.0000]])
        """
        if 0 in self.options.numbers:
            raise InputError(
                f"argnums={self.options.argnums} explains argument 0, which `bind` would hold fixed. Bind the "
                "parameters of a function f(params, x), whose x is explained"
            )
        if any(isinstance(leaf, Tensor) and is_wrapped(leaf) for leaf in tree.leaves(params)):
            raise InputError(
                "`bind` was given parameters that an outer vmap, grad or jvp transforms, but it holds copies, which no "
                "transform reaches. Call the relevance function with them:\n\n    relevance_fn(params, x)"
            )
        return BoundAttribution(self, params)


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
) -> Attribution[Any]:
    """Transforms a model function into one that explains it: the relevance of an argument for the output.

    The result is an ordinary function of tensors, in the grammar of `torch.func.grad`: it composes with `grad`,
    `vmap`, `jacrev` and `jacfwd`, and every derivative is exact.

    Args:
        model_fn: A pure function such as `f(params, x)`, from `from_module` or written by hand. Parameters come
            first: an explained argument 0 is taken to be parameters if another argument has floating-point tensors.
        rules: Which rule serves which layer: a composite or a list of pairs `(selector, rule)`. With `None`,
            convolutions take `ZPlus`, dense layers `Epsilon`, and everything else is served as in `attn_lrp()`.
        argnums: The argument to explain, or a tuple of several.
        has_aux: Whether `model_fn` returns `(output, aux)`.
        layers: A glob, or several, on module paths, where relevance is wanted too; `*` crosses dots. In a function
            without modules, on the names that `explain` prints.
        inline_functions: Explain the forward of a custom `autograd.Function` instead of refusing it.
        lowered: Run the forward pass and the walk as one flat program, made at the first call with tensors of such
            shapes. `False` takes the operations and rules one at a time, so that a debugger can stop in a rule.
        segments: Trades compute for memory, as `torch.utils.checkpoint` does: the walk back computes the forward pass
            anew in that many parts, and only what stands between them is kept. About the square root of the number of
            layers needs the least memory.

    Returns:
        `f(*args, target=None, **kwargs)`, which returns relevance shaped like `args[argnums]` (a tuple for a tuple);
        with `layers`, `(relevance, {name: relevance})`; with `has_aux`, `(that, aux)`. `target` says where relevance
        starts: an integer or integer tensor indexes the last axis of an output of 1 or 2 dimensions, one for all
        samples or one each; a floating-point tensor like the output, or a function from the output to one, is the
        starting relevance itself; `None` starts with the output. In a cotangent composite, such as `gradient()`, an
        integer or `None` starts with ones there, the cotangent of the output.

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
    options = Options(argnums, has_aux, layers, inline_functions, lowered, segments)
    return _attribution(model_fn, rules, options, with_value=False)


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
) -> Attribution[Any]:
    """Like `attribute`, and returns the model's output as well, from the same single forward pass.

    Args:
        model_fn: As for `attribute`.
        rules: As for `attribute`.
        argnums: As for `attribute`.
        has_aux: As for `attribute`.
        layers: As for `attribute`.
        inline_functions: As for `attribute`.
        lowered: As for `attribute`.
        segments: As for `attribute`.

    Returns:
        A function that returns `(relevance, output)`; with `has_aux`, `(relevance, (output, aux))`, in the order of
        `torch.func.grad_and_value`.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> fn = lrp.attribute_and_value(lambda w, x: x @ w, lrp.epsilon())
        >>> fn(torch.ones(2, 1), torch.tensor([[1.0, 3.0]]), target=0)
        (tensor([[1.0000, 3.0000]]), tensor([[4.]]))
    """
    options = Options(argnums, has_aux, layers, inline_functions, lowered, segments)
    return _attribution(model_fn, rules, options, with_value=True)


def _attribution(model_fn: Callable[..., Any], rules: Rules, options: Options, *, with_value: bool) -> Attribution[Any]:
    if not callable(model_fn):
        raise InputError(
            f"model_fn must be a function such as f(params, x), not {type(model_fn).__name__}; for a module write\n\n"
            "    model_fn, params = lrpfunc.from_module(module)"
        )
    return Attribution(model_fn, as_composite(rules), options, with_value)


@uncompiled
def vjp(
    model_fn: Callable[..., Any],
    rules: Rules,
    *primals: Any,
    argnums: Argnums = 1,
    has_aux: bool = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Runs a model function once and returns what pulls relevance back through that run, as `torch.func.vjp` does.

    Args:
        model_fn: As for `attribute`.
        rules: As for `attribute`. With `gradient()` this is `torch.func.vjp`.
        *primals: The arguments of `model_fn`.
        argnums: The argument to explain, or a tuple of several.
        has_aux: Whether `model_fn` returns `(output, aux)`.
        **kwargs: Keyword arguments of `model_fn`.

    Returns:
        `(output, pullback)`, or `(output, pullback, aux)`. `pullback` takes starting relevance, a pytree of tensors
        like the output, and returns relevance shaped like `primals[argnums]`, a tuple only for a tuple `argnums`.
        Call it, or `vmap` it, as often as you like.

    Example:
        >>> import torch, lrpfunc as lrp
        >>> output, pullback = lrp.vjp(lambda w, x: x @ w, lrp.epsilon(), torch.eye(2), torch.tensor([[1.0, 3.0]]))
        >>> torch.vmap(pullback)(torch.diag_embed(output[0])[:, None])
        tensor([[[1.0000, 0.0000]],
        <BLANKLINE>
                [[0.0000, 3.0000]]])
    """
    attribution = _attribution(model_fn, rules, Options(argnums, has_aux), with_value=False)
    forward = attribution.forward(primals, kwargs, Relevance, reuse=True)
    leaves, spec = tree.flatten(forward.output)

    @uncompiled
    def pullback(relevance: Any) -> Any:
        return forward.pull(relevances(relevance, leaves, spec))

    return (forward.output, pullback, forward.aux) if has_aux else (forward.output, pullback)
