"""The README's snippets run, in order, as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import lrpfunc as lrp
from lrpfunc import testing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": __name__}  # dataclasses look their module up
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) > 5
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_rule_closes_the_balance(namespace: dict[str, Any]) -> None:
    rules = [(lrp.Convolution | lrp.Dense, namespace["Magnitude"](0.1)), *lrp.attn_lrp()]
    net = testing.Net((testing.Linear(3), testing.Pointwise("relu"), testing.Linear(2)), (2, 4))
    testing.assert_conservation(*net.case(), rules, target=0)


@pytest.mark.slow
def test_the_rule_is_proven(namespace: dict[str, Any]) -> None:
    testing.check_rule(namespace["Magnitude"](), examples=15)
