"""The errors users meet. Each says what is wrong, why it usually happens and the line to write."""

from __future__ import annotations

import sys
import warnings


class UncoveredLayerError(ValueError):
    """A layer is not linear and no rule covers it."""


class RuleError(TypeError):
    """A rule was given to a layer it cannot serve, or its hyperparameters do not fit together."""


class TargetError(ValueError):
    """The target does not say where in the output relevance starts."""


class InputError(TypeError):
    """What should be explained, or the output that explains it, is not made of floating-point tensors."""


class NoPathError(ValueError):
    """The output does not depend on what should be explained."""


class LayerNotFoundError(LookupError):
    """No layer bears a name that was asked for."""


class CaptureError(RuntimeError):
    """The model function cannot be captured as a pure function of tensors."""


ERRORS = (
    UncoveredLayerError,
    RuleError,
    TargetError,
    InputError,
    NoPathError,
    LayerNotFoundError,
    CaptureError,
)
"""All of them, each of which says at the call what there is to say."""


class CaptureWarning(UserWarning):
    """The model function is recorded anew at every call, because it changes what it reads, or nobody can see that.

    It is given once for a function, at its first or second call.

    Example:
        >>> import warnings, torch, lrpfunc as lrp
        >>> calls = []
        >>> relevance_fn = lrp.attribute(lambda w, x: (calls.append(0), x @ w)[1], lrp.epsilon())
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", lrp.CaptureWarning)
        ...     for _ in range(2):
        ...         _ = relevance_fn(torch.eye(2), torch.ones(1, 2), target=0)
        >>> len(calls)
        2
    """


class RelevanceWarning(UserWarning):
    """Relevance explodes on its way to the input, or is nearly all lost: by more than a factor of 1000 in magnitude.

    It names the layer and the rule where most of that happens, once. It is told by the numbers of the first walk of
    each recording, unless that is inside a transform or `torch.compile`. Relevance that starts at the output of a
    softmax is told of, too: logits say more.

    Example:
        >>> import warnings, torch, lrpfunc as lrp
        >>> relevance_fn = lrp.attribute(lambda w, x: x @ w, lrp.epsilon(0.0))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = relevance_fn(torch.tensor([[1.0], [-0.9999]]), torch.ones(1, 2), target=0)
        >>> str(caught[0].message).partition(":")[0]
        'relevance explodes'
    """


class UnusedRuleWarning(UserWarning):
    """An entry of a composite serves no layer: its selector matches none, or entries before it take all of them.

    It is given once, for entries that you wrote: those of `epsilon_plus()` and the like are there for any net, and so
    is an entry for all layers of a kind, such as `Dense`.

    Example:
        >>> import warnings, torch, lrpfunc as lrp
        >>> rules = [(lrp.name("haed"), lrp.Epsilon(0.1))] + lrp.epsilon()
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = lrp.attribute(lambda w, x: x @ w["head"], rules)({"head": torch.eye(2)}, torch.ones(1, 2))
        >>> print(str(caught[0].message).partition(":")[0])
        rules[0] serves no layer
    """


def warn(text: str, category: type[Warning]) -> None:
    """Warns where the code stands that called lrpfunc."""
    package, level = __name__.partition(".")[0], 1
    frame = sys._getframe(0)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def opaque(name: str | None = None) -> RuleError:
    """The error for a rule whose derivatives are hidden."""
    return RuleError(
        f"a rule uses a custom torch.autograd.Function{f', {name}' if name else ''}. Its backward would be taken for "
        "the derivative of the rule, and derivatives of relevance would be wrong without a word. Write the rule in "
        "ordinary torch operations, whose derivatives are exact; where one should stop, write x.detach()"
    )
