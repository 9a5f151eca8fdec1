"""Executes the notebooks and writes their outputs into them: `python -m notebooks.execute`, or `make notebooks`.

What is written depends on the code alone: no times, no versions, no paths.
"""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def executed(path: Path) -> NotebookNode:
    """The notebook with the outputs of a run from the top, in a kernel of its own."""
    notebook = nbformat.read(path, as_version=4)
    # The kernel starts beside the package, so that it imports that one, installed or not.
    resources = {"metadata": {"path": str(FOLDER.parent)}}
    client = NotebookClient(notebook, timeout=300, record_timing=False, coalesce_streams=True, resources=resources)
    # Nets this small run faster on one thread, and a machine that runs the suite has none to spare.
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    notebook.metadata = NotebookNode(METADATA)
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                output.data["image/png"] = bare(png)
    return notebook


def bare(png: str) -> str:
    """The picture in few bytes, and without the version of what drew it."""
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(128).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main() -> None:
    for path in notebooks():
        nbformat.write(executed(path), path)
        print(f"Wrote {path.relative_to(FOLDER.parent)}.")


if __name__ == "__main__":
    main()
