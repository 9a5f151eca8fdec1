"""What lrpfunc takes of torch that torch does not export: where it is taken, and that the installed torch has it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1] / "lrpfunc"
DOORS = [PACKAGE / "_torch.py", PACKAGE / "_tree.py"]
EXPERIMENTAL = "torch.fx.experimental"
PYTREES = ("torch.utils._pytree", "torch.utils._cxx_pytree", "torch.utils.pytree", "optree")


def names_of_torch(tree: ast.AST) -> Iterator[str]:
    """Every dotted name of torch that code imports or reaches for: `torch._C._functorch.get_unwrapped`."""
    aliases = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    aliases[alias.asname] = alias.name
                yield alias.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if isinstance(targets[0], ast.Name) and (name := dotted(node.value, aliases)):
                aliases[targets[0].id] = name
    yield from filter(None, (dotted(node, aliases) for node in ast.walk(tree) if isinstance(node, ast.Attribute)))


def dotted(node: ast.AST, aliases: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute):
        start = dotted(node.value, aliases)
        return start and f"{start}.{node.attr}"
    return None


def is_private(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "torch" and (
        name.startswith(EXPERIMENTAL) or any(part.startswith("_") and not part.endswith("__") for part in parts)
    )


def exists(name: str) -> bool:
    """Whether a module or an attribute of that name is there; any part of it may be a module of its own."""
    found: Any = None
    for end in range(1, name.count(".") + 2):
        path = name.split(".")[:end]
        try:
            found = importlib.import_module(".".join(path)) if found is None else getattr(found, path[-1])
        except AttributeError:
            try:
                found = importlib.import_module(".".join(path))
            except ImportError:
                return False
    return True


def private_names(path: Path) -> set[str]:
    return set(filter(is_private, names_of_torch(ast.parse(path.read_text()))))


def test_the_installed_torch_has_every_private_name() -> None:
    """Found in the source, as an import of lrpfunc would stop at the first that is missing."""
    wanted = sorted(set().union(*map(private_names, DOORS)))
    assert len(wanted) > 20
    missing = [name for name in wanted if not exists(name)]
    assert not missing, "this torch lacks what lrpfunc/_torch.py takes of it:\n  " + "\n  ".join(missing)


def test_missing_names_are_found() -> None:
    code = "from torch._gone import thing\nimport torch._C\nx = torch._C._absent\ny = x.z\ntorch.fx.experimental.no\n"
    names = set(filter(is_private, names_of_torch(ast.parse(code))))
    missing = {"torch._gone.thing", "torch._C._absent", "torch._C._absent.z", "torch.fx.experimental.no"}
    assert missing <= names
    assert not any(map(exists, missing))
    assert exists("torch._C")


@pytest.mark.parametrize("path", [p for p in sorted(PACKAGE.rglob("*.py")) if p not in DOORS], ids=str)
def test_nobody_else_takes_private_names_of_torch(path: Path) -> None:
    names = set(names_of_torch(ast.parse(path.read_text())))
    assert not set(filter(is_private, names))
    assert not {name for name in names if name.startswith(PYTREES)}


# ---------------------------------------------------------------------------------------------------------------------
# A light import

# What `import lrpfunc` may load beside what `import torch` has loaded.
ALLOWED = ("lrpfunc", "optree", "decimal", "_decimal", "fractions")

IMPORTS = """
import sys
import torch
before = set(sys.modules)
import lrpfunc
print(*sorted(set(sys.modules) - before))
"""


def test_import_loads_little() -> None:
    """Not `torch._dynamo`, sympy and what else takes as long as torch; `benchmarks.imports` has the time."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "lrpfunc._api.transform" in loaded
    assert not [name for name in loaded if name.partition(".")[0] not in ALLOWED]
