"""The search for a model that shows a rule to be wrong, and then for the smallest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

import lrpfunc as lrp
from lrpfunc.testing._case import Case
from lrpfunc.testing._fixed import SMALLEST
from lrpfunc.testing._numbers import PropertyError

Failure = tuple[Case, Exception]

_SETTINGS = settings(
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    verbosity=Verbosity.quiet,
)

_CHEAP = ("conservation", "vmap_equals_loop", "samples_apart", "pure", "linear_in_relevance")


@dataclass
class Search:
    """What has been found of a rule, the properties that fail each with the first case."""

    rule: lrp.Rule
    names: Sequence[str]
    failed: dict[str, Failure] = field(default_factory=dict)
    compared: set[str] = field(default_factory=set)
    served: list[Case] = field(default_factory=list)

    def run(self, fixed: Sequence[Case], drawn: st.SearchStrategy[Case], examples: int) -> None:
        """Fixed nets first, then drawn ones. One model is compiled, which takes long: a large one."""
        for case in fixed:
            if self._left(*_CHEAP, "compiles") and self._serves(case):
                self.served.append(case)
                self._check(case, _CHEAP)
                # Op by op, too: programs are made without `vmap`, so that they hide what a rule does under it.
                self._check(replace(case, lowered=False), ["vmap_equals_loop"])

        @seed(0)
        @settings(_SETTINGS, max_examples=examples)
        @given(drawn)
        def search(case: Case) -> None:
            self._check(case, [name for name in self.names if name != "compiles"])
            if not self.served and self._serves(case):
                self.served.append(case)

        search()
        for case in sorted(self.served, key=_size)[-1:]:
            self._check(case, ["compiles"])
            self._require_comparisons(case)
        self.failed = {name: self.failed[name] for name in self.names if name in self.failed}

    def _check(self, case: Case, names: Iterable[str]) -> None:
        for name in self._left(*names):
            try:
                if case.check(name):
                    self.compared.add(name)
            except Exception as error:  # whatever a rule raises is a failure of the rule
                self.failed[name] = (case, error)

    def _left(self, *names: str) -> list[str]:
        """Those of the names that are to be checked and have not failed yet."""
        return [name for name in names if name in self.names and name not in self.failed]

    def _serves(self, case: Case) -> bool:
        model_fn, params, x = case.net.case()
        try:
            rows = lrp.explain(model_fn, case.rules)(params, x, target=case.target).rows
        except Exception:  # which the properties will show
            return True
        return any(row.rule is self.rule for row in rows)

    def _require_comparisons(self, case: Case) -> None:
        error = NothingComparedError("there was nothing to compare with in any model: for derivatives, a kink or noise")
        for name in self.names:
            if name not in self.compared:
                self.failed.setdefault(name, (case, error))


def _size(case: Case) -> tuple[bool, int]:
    return "Conv(" in repr(case.net), len(repr(case.net))


class NothingComparedError(PropertyError):
    """A property was asserted of nothing."""


_SHRINKS = 40
"""How many models are tried to make a failing one smaller."""


def smallest(
    name: str, fixed: Sequence[Case], drawn: st.SearchStrategy[Case], examples: int, first: Failure
) -> Failure:
    """The smallest case found for which a property fails."""
    if isinstance(first[1], NothingComparedError):
        return first
    for net in (*SMALLEST, *(case.net for case in fixed)):  # they serve all rules, so that each is recorded once
        case = replace(first[0], net=net, target=0)
        if failures := case.failures([name]):
            return case, failures[name]
    return _shrunk(drawn, name, examples, first)


def _shrunk(drawn: st.SearchStrategy[Case], name: str, examples: int, first: Failure) -> Failure:
    failed: dict[str, Failure] = {_key(first[0]): first}
    tried: set[str] = set()

    @seed(0)
    @settings(_SETTINGS, max_examples=examples)
    @given(drawn)
    def search(case: Case) -> None:
        if len(tried) > _SHRINKS:
            raise _EnoughError
        if (key := _key(case)) not in failed:
            tried.add(key)
            for error in case.failures([name]).values():
                failed[key] = (case, error)
        if key in failed:
            raise _FoundError

    with contextlib.suppress(_FoundError, _EnoughError):
        search()
    return failed[min(failed, key=lambda key: (len(key), key))]


def _key(case: Case) -> str:
    return repr((case.net, case.target))


class _FoundError(Exception):
    """A property fails."""


class _EnoughError(BaseException):
    """Ends a search, which an `Exception` would not."""
