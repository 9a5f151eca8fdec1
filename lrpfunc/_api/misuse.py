"""What is wrong with a call, where the model function failed for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lrpfunc._api.arguments import signature_of
from lrpfunc._capture.module import ModelFunction
from lrpfunc._errors import InputError


def misuse(
    model_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> InputError | None:
    """The mistake in the arguments that most likely made the model function raise `error`; `None` if it has its own."""
    if wrong := _wrong_parameters(model_fn, args):
        return InputError(wrong)
    signature, mismatch = signature_of(model_fn), None
    try:
        if signature is not None:
            signature.bind(*args, **kwargs)
    except TypeError as found:
        mismatch = str(found)
    # An integer in the place of something else is seldom told by the signature.
    own = isinstance(error, (TypeError, AttributeError))
    if len(args) > 1 and _may_be_target(args[-1]) and (mismatch or (own and not isinstance(args[-1], Tensor))):
        shown = "targets" if isinstance(args[-1], Tensor) else repr(args[-1])
        return InputError(
            f"the model function was given {shown} as argument {len(args) - 1}, and {_said(error)}. If that is the "
            f"target, give it by its name:\n\n    relevance_fn(params, x, target={shown})"
        )
    if mismatch is None:
        return None
    return InputError(
        f"the model function takes {signature}, and not what it was given: {mismatch}. A relevance function takes what "
        "the model function takes, parameters first, and then the target by its name:\n\n"
        "    relevance_fn(params, x, target=3)"
    )


def _wrong_parameters(model_fn: Callable[..., Any], args: tuple[Any, ...]) -> str | None:
    if isinstance(model_fn, nn.Module) and len(args) > 1 and isinstance(args[0], dict):
        return (
            f"the model function is the module {type(model_fn).__name__} itself, which takes no parameters. Make a "
            "function of both:\n\n    model_fn, params = lrpfunc.from_module(module)"
        )
    if not args:
        return None
    if isinstance(args[0], dict):
        return _unknown_names(model_fn, args[0]) if isinstance(model_fn, ModelFunction) else None
    got = f"a tensor of shape {tuple(args[0].shape)}" if isinstance(args[0], Tensor) else type(args[0]).__name__
    if any(isinstance(arg, dict) and all(isinstance(v, Tensor) for v in arg.values()) for arg in args[1:]):
        return (
            f"argument 0 is {got}, and the parameters come after it. They are the first argument of a model "
            "function:\n\n    relevance_fn(params, x)"
        )
    if isinstance(model_fn, ModelFunction):
        return (
            f"argument 0 is {got}, where a function made by from_module takes its parameters, a dictionary from names "
            "to tensors. Pass those that from_module returned:\n\n    relevance_fn(params, x)"
        )
    return None


def _unknown_names(model_fn: ModelFunction, params: dict[Any, Any]) -> str | None:
    own = [name for named in (model_fn.module.named_parameters(), model_fn.module.named_buffers()) for name, _ in named]
    unknown = [str(name) for name in params if name not in own]
    if not unknown:
        return None
    return (
        f"the parameters have {', '.join(unknown[:4])}{', ...' if unknown[4:] else ''}, which "
        f"{type(model_fn.module).__name__} has not: its own are {', '.join(own[:4])}{', ...' if own[4:] else ''}. Pass "
        "those that from_module returned together with the function"
    )


def _may_be_target(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim < 2 and not value.is_floating_point() and not value.is_complex()
    return isinstance(value, int) and not isinstance(value, bool)


def _said(error: Exception) -> str:
    first, *_ = [*str(error).splitlines(), ""]
    return f"raised {type(error).__name__}: {first}"
