"""The notebooks run, print what is committed, and carry nothing of the machine they were run on."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from matplotlib.figure import Figure
from nbformat import NotebookNode

from notebooks.execute import METADATA, bare, executed, notebooks

PATHS = notebooks()


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def texts(notebook: NotebookNode) -> list[str]:
    """What a run prints and shows, less the pictures."""
    return [output.get("text") or output.get("data", {})["text/plain"] for output in outputs(notebook)]


def words_and_numbers(text: str) -> tuple[list[str], list[float]]:
    return re.split(NUMBER, text), [float(number) for number in re.findall(NUMBER, text)]


NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_run_gives_what_is_committed(path: Path) -> None:
    run, committed = texts(executed(path)), texts(read(path))
    assert len(run) == len(committed)
    for now, before in zip(map(words_and_numbers, run), map(words_and_numbers, committed), strict=True):
        assert now[0] == before[0]
        assert now[1] == pytest.approx(before[1], rel=0.03)  # in what order a processor adds up is its own affair


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_nothing_of_the_machine(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert notebook.metadata == METADATA
    assert not any(cell.metadata for cell in notebook.cells)
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    # Stable names in place of the random ones that an editor gives, so that a change shows as what it is.
    assert [cell.id for cell in notebook.cells if re.fullmatch("[0-9a-f]{8}(-.*)?", cell.id)] == []
    for text in texts(notebook):
        assert not re.search(r"(?<![\w.])/\w+/|[A-Z]:\\|\d+\.\d+\.\d+|\b0x[0-9a-f]+", text)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_ends_in_a_small_picture(path: Path) -> None:
    pictures = [output.data["image/png"] for output in outputs(read(path)) if "image/png" in output.get("data", {})]
    assert pictures
    for picture in pictures:
        assert len(picture) < 60_000
        assert b"Software" not in base64.b64decode(picture)


def test_pictures_lose_what_drew_them() -> None:
    drawn = BytesIO()
    Figure(figsize=(1, 1)).savefig(drawn)
    assert b"Software" in drawn.getvalue()
    assert b"Software" not in base64.b64decode(bare(base64.b64encode(drawn.getvalue()).decode()))


def test_the_transform_is_built_in_ten_cells() -> None:
    (first,) = [path for path in PATHS if path.stem == "01_attribute_from_nothing"]
    assert sum(cell.cell_type == "code" for cell in read(first).cells) == 10
