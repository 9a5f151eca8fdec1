"""The README's snippets run, in order, as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def test_snippets() -> None:
    namespace: dict[str, Any] = {"__name__": __name__}  # dataclasses look their module up
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) > 5
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
