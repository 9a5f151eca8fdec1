"""The function that `attribute` makes, and how a call of it goes: one straight line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar, final, overload

import torch
from torch import Tensor, nn

from lrpfunc import _tree as tree
from lrpfunc._api.arguments import Explained
from lrpfunc._api.bind import BoundAttribution
from lrpfunc._api.misuse import misuse
from lrpfunc._api.options import Options
from lrpfunc._api.request import recognise
from lrpfunc._api.target import Target, form, plain, start, tensors_of
from lrpfunc._api.uncompiled import uncompiled
from lrpfunc._capture.capture import capture
from lrpfunc._errors import ERRORS, CaptureError, InputError
from lrpfunc._layers.graph import Graph
from lrpfunc._lower.bound import Bound
from lrpfunc._lower.lower import Unfit, fitting, lower
from lrpfunc._torch import is_wrapped, unseen
from lrpfunc._walk.assign import Assignment, assign
from lrpfunc._walk.balance import watched
from lrpfunc._walk.forward import Forward, op_by_op
from lrpfunc.composites import Composite
from lrpfunc.rules._equality import Description
from lrpfunc.rules._message import Message, Relevance

R = TypeVar("R")


@final
@dataclass(frozen=True, eq=False)
class Attribution(Description, Generic[R]):
    """The function that `attribute` or `attribute_and_value` returns; it pickles, compares, hashes and prints."""

    model_fn: Callable[..., Any]
    rules: Composite
    options: Options
    with_value: bool

    def __repr__(self) -> str:
        rules = f"<{len(self.rules.entries)} rules>"
        given = [f"{f.name}={v!r}" for f in fields(Options) if (v := getattr(self.options, f.name)) != f.default]
        return f"Attribution({', '.join([_name_of(self.model_fn), rules, *given])})"

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    @overload
    def __call__(self, params: Any, x: Tensor, /, *args: Any, target: Target = None, **kwargs: Any) -> R: ...
    @overload  # what is explained may be any container of tensors
    def __call__(self, *args: Any, target: Target = None, **kwargs: Any) -> Any: ...
    def __call__(self, *args: Any, target: Target = None, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            from lrpfunc._api.dynamo import call_in_graph  # imports torch._dynamo

            return call_in_graph(self, args, kwargs, target)
        return self.run(args, kwargs, target)

    # -- how it works

    @property
    def reads(self) -> tuple[Any, ...]:
        """What a call reads besides its arguments."""
        return self.model_fn, self.rules

    @property
    def bound_tensors(self) -> Sequence[Tensor]:
        """No tensor is bound; see `BoundAttribution`."""
        return ()

    def forward(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        form: type[Message],
        given: Sequence[Tensor] = (),
        *,
        bound: Bound | None = None,
        reuse: bool = False,
        is_open: bool = True,
    ) -> Forward:
        """The forward pass, run, and the walk back from it. Each step is cached on what the one before it gives.

        Args:
            args: The arguments of the model function.
            kwargs: Its keyword arguments.
            form: The form of the messages that relevance will start with.
            given: The tensors, if they are known, that those are made of.
            bound: The first of the arguments, if it is bound.
            reuse: Whether the walk will be taken several times.
            is_open: Whether sizes may be open, as the options say.
        """
        options = self.options
        if not options.lowered:
            graph, rules, tensors = self.assigned(args, kwargs)
            return watched(op_by_op(graph, rules, tensors), graph, rules, tensors, self.model_fn)
        graph, rules, tensors = self.assigned(args, kwargs, options.dynamic if is_open else False)
        # A function may make relevance to differentiate of what is not; the forward pass cannot then be run again.
        exact = graph.program.is_random and form is Relevance
        again = functools.partial(
            self.forward, args, kwargs, form, given, bound=bound, reuse=reuse, is_open=False
        )  # once: a function that is recorded anew at each call learns nothing of what went wrong
        try:
            forward = lower(
                graph, rules, tensors, form, given, bound=bound, segments=options.segments, reuse=reuse, exact=exact
            )
        except Unfit:
            return again()
        concrete = functools.partial(self.assigned, args, kwargs)
        return watched(fitting(forward, again), graph, rules, tensors, self.model_fn, concrete)

    def assigned(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool | None = False
    ) -> tuple[Graph, Assignment, list[Tensor]]:
        """The layers, their rules, and the tensors that the forward pass is run on.

        Args:
            args: The arguments of the model function.
            kwargs: Its keyword arguments.
            dynamic: Whether sizes may be open: `None` for those that have differed.
        """
        options = self.options
        try:
            explained = Explained(self.model_fn, args, kwargs, options)
            program, tensors = capture(
                self.model_fn, args, kwargs, has_aux=options.has_aux, inline=options.inline_functions, dynamic=dynamic
            )
            with unseen(program.shapes is not None):
                graph = recognise(program, explained, options.globs)
                return graph, assign(graph, self.rules), tensors
        except ERRORS as error:  # which say all there is to say: a hundred frames of torch's would hide it
            raise error.with_traceback(None) from None
        except Exception as error:
            if wrong := misuse(self.model_fn, args, kwargs, error):
                raise wrong from None
            raise

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: Target,
        bound: Bound | None = None,
    ) -> Any:
        """The forward pass, and the walk back from where the target says."""
        target = plain(target)
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

    @uncompiled
    def prepare(self, *args: Any, target: Target = None, **kwargs: Any) -> None:
        """Records the model function ahead of time: the first call with such arguments then takes as long as any other.

        What takes longer than a second is told to the logger `lrpfunc`, at level `INFO`.

        Args:
            *args: Arguments like those of a later call: of the same shapes, or with `dynamic=True` of any. Numbers do
                not matter, but where the model function reads them.
            target: A target of the same kind.
            **kwargs: Keyword arguments.

        Example:
            >>> import torch, lrpfunc as lrp
            >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, lrp.epsilon(), dynamic=True)
            >>> relevance_fn.prepare(torch.eye(2), torch.zeros(3, 2), target=0)
            >>> relevance_fn(torch.eye(2), torch.tensor([[1.0, 3.0], [2.0, 4.0]]), target=1)
            tensor([[0.0000, 3.0000],
                    [0.0000, 4.0000]])
        """
        target = plain(target)
        self.forward(args, kwargs, form(target), tensors_of(target))

    @uncompiled
    def bind(self, params: Any) -> BoundAttribution[R]:
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
        if 0 in self.options.explained:
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


def _name_of(model_fn: Callable[..., Any]) -> str:
    if isinstance(model_fn, nn.Module):
        return type(model_fn).__name__
    return getattr(model_fn, "__name__", None) or repr(model_fn)
