"""The functions of torch's own database, between two dense layers: right, or refused in words."""

from __future__ import annotations

import re

import pytest
import torch

from tests import opinfo

# Random samples of torch's own, some of which it warns of.
pytestmark = pytest.mark.filterwarnings("ignore")

FEW = (
    *("add", "addbmm", "amax", "cat", "cdist", "clamp", "cumprod", "div.floor_rounding", "fft.irfft", "index_put"),
    *("lerp", "linalg.det", "linalg.qr", "linalg.solve", "logaddexp", "masked.softmax", "nn.functional.conv2d", "pow"),
    *("nn.functional.gelu", "nn.functional.layer_norm", "nn.functional.linear", "sort", "special.bessel_j0", "var"),
)
"""One of each kind, for every day."""


def written() -> dict[str, str]:
    """The rows of the page."""
    return {line.split("`")[1]: line for line in opinfo.PAGE.read_text().splitlines() if line.startswith("| `")}


def version() -> str:
    return re.findall(r"torch (\d+\.\d+)", opinfo.PAGE.read_text())[0]


def check(name: str) -> None:
    found = opinfo.outcome(name, proven=True)
    if torch.__version__.startswith(version()):
        assert written().get(name) == (found and opinfo.row(name, found))


@pytest.mark.parametrize("name", FEW)
def test_some_functions(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in opinfo.INFOS if name not in FEW])
def test_all_functions(name: str) -> None:
    check(name)


def test_at_most_one_in_twenty_is_refused() -> None:
    rows = written()
    assert len(rows) > 400
    refused = [name for name, row in rows.items() if "| refused" in row]
    assert len(refused) <= 0.05 * len(rows), refused


def test_the_page_counts_its_own_rows() -> None:
    text, rows = " ".join(opinfo.PAGE.read_text().split()), written()
    partly = sum("; refused" in row for row in rows.values())
    wholly = sum("| refused" in row for row in rows.values())
    assert f"the {len(rows)} functions" in text
    assert f"{wholly} are refused" in text
    assert f"and {partly} more" in text
