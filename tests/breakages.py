"""Breaks the library in one place at a time, at random, and tells whether the tests notice.

    python -m tests.breakages --count 100 --seed 0

draws places in `lrpfunc/_walk`, `lrpfunc/rules` and `lrpfunc/_layers`: a comparison is turned round, a term dropped, a
sign flipped, a number changed, a branch taken always or never, a statement left out, two arguments swapped. Each is
applied to a copy, and a part of the suite runs on it until the first failure: what is worked out by hand, the oracle,
then what belongs to the place. What all of them let pass is listed at the end; `KNOWN` says of some why they change
nothing that anyone could see.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FIRST = ["tests/test_values.py", "tests/test_arithmetic.py", "tests/test_written_out.py", "tests/test_oracle.py"]
LATER = {
    "_walk": ["tests/test_errors.py", "tests/test_products.py", "tests/test_several_outputs.py"],
    "rules": ["tests/test_rules.py", "tests/test_errors.py", "tests/test_products.py", "tests/test_pytrees.py"],
    "_layers": ["tests/test_layers.py", "tests/test_products.py", "tests/test_facts.py", "tests/test_errors.py"],
}
LAST = ["tests/test_attention.py", "tests/test_composition.py", "tests/test_lowered_rules.py"]
SLOW_TO_FAIL = 900
"""Seconds after which a broken library that still runs counts as noticed: it hangs."""

KNOWN: dict[tuple[str, str, str], str] = {
    ("lrpfunc/_layers/roles.py", "2", "1"): (
        "of `len(operands) < 2` in `_decays`: a single operand has no other that could be an exponential"
    ),
    ("lrpfunc/_layers/affine.py", "0", "-1"): "of `users[0]` in `_only_user`: the first of one user is the last",
    ("lrpfunc/_layers/graph.py", "len(layer.nodes) > 1", "len(layer.nodes) >= 1"): (
        "a layer of one operation ends at that operation, which is found before `ends` is looked at"
    ),
}
"""Breakages that change nothing that anyone could see, and why: the file, the code and what it becomes."""


@dataclass(frozen=True)
class Breakage:
    """One change of one file.

    Attributes:
        path: Of the file, from the root.
        line: Where.
        was: The code that is changed.
        becomes: What it becomes.
        source: The whole file, changed.
    """

    path: str
    line: int
    was: str
    becomes: str
    source: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.was}  ->  {self.becomes}"

    @property
    def known(self) -> str | None:
        """Why it changes nothing."""
        return KNOWN.get((self.path, self.was, self.becomes))


# --------------------------------------------------------------------------------------------------------------
# Changes

TURNED: dict[type, type] = {
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.And: ast.Or, ast.Or: ast.And, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr},
}


def changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """What could stand in the place of a node; `None` for a statement that is left out."""
    match node:
        case ast.Compare(left, [op], [right]) if type(op) in TURNED:
            yield ast.Compare(left, [TURNED[type(op)]()], [right])
        case ast.BinOp(left, op, right) if type(op) in TURNED:
            yield ast.BinOp(left, TURNED[type(op)](), right)
            yield left
            yield right
        case ast.BoolOp(op, values):
            yield ast.BoolOp(TURNED[type(op)](), values)
            yield from (_joined(op, values[:i] + values[i + 1 :]) for i in range(len(values)))
        case ast.UnaryOp(ast.Not() | ast.USub() | ast.Invert(), operand):
            yield operand
        case ast.IfExp(_, body, orelse):
            yield body
            yield orelse
        case ast.If(_, body, orelse):
            yield ast.If(ast.Constant(True), body, orelse)
            yield ast.If(ast.Constant(False), body, orelse)
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.Call(function, [first, second, *rest], keywords) if not isinstance(first, ast.Starred):
            yield ast.Call(function, [second, first, *rest], keywords)
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Continue():
            yield None


def _joined(op: ast.boolop, values: list[ast.expr]) -> ast.expr:
    return values[0] if len(values) == 1 else ast.BoolOp(op, values)


class _Places(ast.NodeVisitor):
    """Finds what can be changed, and leaves out texts and types."""

    def __init__(self) -> None:
        self.found: list[ast.AST] = []

    def visit(self, node: ast.AST) -> None:
        if any(True for _ in changes(node)):
            self.found.append(node)
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name != "__repr__":
            for child in [*node.body, *node.args.defaults, *node.args.kw_defaults]:
                if child is not None:
                    self.visit(child)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":  # it only guards
            self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Assign(self, node: ast.Assign) -> None:
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if not any(name[0].isupper() for name in names):  # names of types
            self.generic_visit(node)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST | None):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        if node is self.old:
            return ast.copy_location(self.new, node) if self.new is not None else ast.copy_location(ast.Pass(), node)
        return super().visit(node)


def _applied(path: Path, tree: ast.Module, node: ast.AST, new: ast.AST | None) -> Breakage:
    # The nodes of a copy are other nodes: the place is found again by its number.
    number = next(i for i, other in enumerate(ast.walk(tree)) if other is node)
    copied = copy.deepcopy(tree)
    old = next(other for i, other in enumerate(ast.walk(copied)) if i == number)
    whole = ast.fix_missing_locations(_Replace(old, copy.deepcopy(new)).visit(copied))
    becomes = "nothing" if new is None else _head(new)
    return Breakage(str(path.relative_to(ROOT)), node.lineno, _head(node), becomes, ast.unparse(whole))  # type: ignore[attr-defined]


def _head(node: ast.AST) -> str:
    """The code, of a branch its condition."""
    if isinstance(node, ast.If):
        return f"if {ast.unparse(node.test)}"
    return " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())


def draw(count: int, seed: int) -> list[Breakage]:
    """So many breakages of the three storeys; a place is as likely in a file as it has places."""
    rng = random.Random(seed)
    paths = sorted(path for part in LATER for path in (ROOT / "lrpfunc" / part).glob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in paths}
    places = []
    for path, tree in trees.items():
        visitor = _Places()
        visitor.visit(tree)
        places += [(path, node) for node in visitor.found]
    drawn: list[Breakage] = []
    for path, node in rng.sample(places, min(count, len(places))):
        drawn.append(_applied(path, trees[path], node, rng.choice(list(changes(node)))))
    return drawn


# --------------------------------------------------------------------------------------------------------------
# Whether the tests notice


class _Failures:
    """Remembers the first test that fails."""

    def __init__(self) -> None:
        self.first = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.first:
            self.first = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.first:
            self.first = f"{report.nodeid} is imported"


EXPLAINS_SOMETHING = """
import sys, torch, lrpfunc.testing, tests.cases
fn = lrpfunc.attribute(lambda w, x: (x @ w).relu(), lrpfunc.epsilon())
torch.func.grad(lambda x: fn(x.mT, x, target=0).sum())(torch.ones(1, 2))
print("\\n".join(sys.modules))
"""


def preload() -> None:
    """Imports what the library imports of others, so that each copy starts at once."""
    listed = [sys.executable, "-c", EXPLAINS_SOMETHING]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split():
        if name.split(".")[0] in ("torch", "numpy", "sympy", "optree", "hypothesis"):
            try:
                import_module(name)
            except Exception:  # some are made while they are imported
                continue


def noticed_by(breakage: Breakage, files: list[str], place: Path) -> str:
    """The first test that fails on a broken copy, in a process of its own; nothing if all pass."""
    target = place / breakage.path
    right = target.read_text()
    target.write_text(breakage.source)
    reads, writes = os.pipe()
    try:
        child = os.fork()
        if child == 0:
            try:
                answer = _run(files, place)
            except BaseException as error:  # nothing of the parent may run on in the child
                answer = f"{type(error).__name__}: {error}"
            os.write(writes, answer.encode())
            os._exit(0)
        os.close(writes)
        return _answer(child, reads)
    finally:
        os.close(reads)
        target.write_text(right)


def _run(files: list[str], place: Path) -> str:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    os.chdir(place)
    sys.path.insert(0, str(place))
    for name in [name for name in sys.modules if name.split(".")[0] in ("lrpfunc", "tests")]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    failures = _Failures()
    imported_before = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *imported_before, *files], plugins=[failures])
    return failures.first or ("" if code == 0 else f"pytest ends with {code!r}")


def _answer(child: int, reads: int) -> str:
    begun = time.monotonic()
    while time.monotonic() - begun < SLOW_TO_FAIL:
        if os.waitpid(child, os.WNOHANG)[0]:
            return os.read(reads, 10_000).decode()
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"nothing is said for {SLOW_TO_FAIL} seconds"


def files_for(breakage: Breakage, quick: bool) -> list[str]:
    """What belongs to a place; the examples in its docstrings, too."""
    first = [breakage.path, *FIRST]
    return first if quick else [*first, *LATER[breakage.path.split("/")[1]], *LAST]


def survivors(drawn: list[Breakage], tell: Callable[[str], None], quick: bool = False) -> list[Breakage]:
    """Those that no test notices; of the quick ones alone, if so told."""
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in ("lrpfunc", "tests"):
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", place)
        for number, breakage in enumerate(drawn):
            begun = time.monotonic()
            says = noticed_by(breakage, files_for(breakage, quick), place)
            tell(f"{number:3} {time.monotonic() - begun:4.0f} s  {breakage}\n          {says or 'SURVIVES'}")
            survived += [] if says else [breakage]
    return survived


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.breakages", description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="the numbers of those to run, of the ones drawn")
    parser.add_argument("--quick", action="store_true", help="run only the tests that take seconds")
    options = parser.parse_args()
    drawn = draw(options.count, options.seed)
    drawn = [drawn[i] for i in options.only] if options.only else drawn
    preload()
    survived = survivors(drawn, lambda line: print(line, flush=True), options.quick)
    unknown = [breakage for breakage in survived if breakage.known is None]
    print(f"{len(drawn) - len(survived)} of {len(drawn)} are noticed; of the others {len(unknown)} are not known")
    for breakage in survived:
        print(f"    {breakage}\n        {breakage.known or 'not known'}")


if __name__ == "__main__":
    main()
