"""A model, rules and a target, and the properties that hold for them or do not."""

from __future__ import annotations

import inspect
import linecache
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lrpfunc as lrp
from lrpfunc.composites import as_composite
from lrpfunc.testing._assertions import (
    assert_compiles,
    assert_conservation,
    assert_gradient_equivalence,
    assert_linear_in_relevance,
    assert_lowered_equals_walk,
    assert_pure,
    assert_samples_apart,
    assert_vmap_equals_loop,
)
from lrpfunc.testing._code import among, argument, code, pasted
from lrpfunc.testing._derivatives import assert_exact_derivatives
from lrpfunc.testing._hyperparameters import with_tensors
from lrpfunc.testing._net import Net
from lrpfunc.testing._numbers import PropertyError

PROPERTIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "exact_derivatives": (assert_exact_derivatives, {}),
    "conservation": (assert_conservation, {}),
    "vmap_equals_loop": (assert_vmap_equals_loop, {}),
    "samples_apart": (assert_samples_apart, {}),
    "pure": (assert_pure, {}),
    "linear_in_relevance": (assert_linear_in_relevance, {}),
    "gradient_equivalence": (assert_gradient_equivalence, {}),
    "lowered_equals_walk": (assert_lowered_equals_walk, {}),
    "compiles": (assert_compiles, {}),
}
"""What is asserted of every rule, and how."""


@dataclass(frozen=True)
class Case:
    """A model, rules and a target, for which properties hold or do not.

    Args:
        net: The model.
        rules: As for `lrpfunc.attribute`.
        target: Likewise.
        lowered: Likewise.

    Example:
        >>> import lrpfunc as lrp
        >>> from lrpfunc.testing import Case, Linear, Net
        >>> case = Case(Net((Linear(),)), lrp.attn_lrp())
        >>> case.check("conservation")
        True
        >>> print(case.code("conservation"))
        from lrpfunc import *
        from lrpfunc.testing import *
        <BLANKLINE>
        rules = attn_lrp()
        net = Net(blocks=(Linear(),))
        assert_conservation(*net.case(), rules, target=0)
    """

    net: Net
    rules: Any
    target: Any = 0
    lowered: bool = True

    def check(self, name: str, **options: Any) -> bool:
        """Asserts one of `PROPERTIES`, with options of its assertion; whether there was anything to compare."""
        assertion = self._assertion(name)
        rules = with_tensors(as_composite(self.rules)) if name == "exact_derivatives" else self.rules
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about the speed of `vmap`
            return assertion(*self._net(name).case(), rules, **self._options(name) | options) is not False

    def failures(self, names: Collection[str], **options: Any) -> dict[str, Exception]:
        """Those of some properties that do not hold, and what they raise."""
        failed: dict[str, Exception] = {}
        for name in names:
            try:
                self.check(name, **options)
            except Exception as error:  # whatever a rule raises is a failure of the rule
                failed[name] = error
        return failed

    def code(self, name: str, rules: str | None = None) -> str:
        """What to paste to see a property fail; `rules`, how the rules are made."""
        given = "with_tensors(rules)" if name == "exact_derivatives" else "rules"
        arguments = [f"{key}={argument(value)}" for key, value in self._options(name).items()]
        call = f"{self._assertion(name).__name__}({', '.join(['*net.case()', given, *arguments])})"
        made = f"rules = {code(self.rules)}" if rules is None else rules
        return pasted(f"{made}\nnet = {self._net(name)!r}\n{call}")

    def _assertion(self, name: str) -> Callable[..., Any]:
        return PROPERTIES[among([name], PROPERTIES, "PROPERTIES")[0]][0]

    def _options(self, name: str) -> dict[str, Any]:
        assertion, options = PROPERTIES[name]
        mine = {"target": self.target} | ({} if self.lowered else {"lowered": False})
        return {key: mine[key] for key in mine if key in inspect.signature(assertion).parameters} | options

    def _net(self, name: str) -> Net:
        """The model, with two samples at least where they are compared."""
        batch, *sizes = self.net.shape
        return replace(self.net, shape=(2, *sizes)) if name == "samples_apart" and batch < 2 else self.net


def described(error: Exception) -> str:
    """What a property says; of what a rule has raised, its type, its first line, and where."""
    if isinstance(error, PropertyError):
        return str(error)
    message = str(error) if type(error).__module__.startswith("lrpfunc.") else str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message}".removesuffix(": ") + _place(error)


_LIBRARIES = tuple(
    str(path) for path in (Path(lrp.__file__).parent, Path(torch.__file__).parent, sysconfig.get_path("stdlib"))
)


def _place(error: Exception) -> str:
    """The innermost line of somebody else's code."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        path = Path(frame.f_code.co_filename)
        if not str(path).startswith(_LIBRARIES):
            text = linecache.getline(str(path), line).strip()
            return f"\n    in {frame.f_code.co_qualname}, {path.name}:{line}: {text}".removesuffix(": ")
    return ""
