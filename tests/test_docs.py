"""What the pages say of files and lines is so."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    headings = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    lost = [link for link in links if link[0] != "#" and not (ROOT / page).parent.joinpath(link).is_file()]
    lost += [link for link in links if link[0] == "#" and link[1:] not in headings]
    assert lost == []


def test_the_lines_to_copy_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where to add")[2].partition("## Write a rule")[0]
    lines = re.findall(r"^\d\. `([\w/]+\.py)`: `([^`]+)`", text, re.M)
    assert len(lines) >= 10
    assert [line for file, line in lines if line not in (ROOT / file).read_text()] == []


def test_folders_that_the_pages_name_exist() -> None:
    for page in PAGES:
        named = re.findall(r"\blrpfunc/[\w/]+(?:\.py|/)", (ROOT / page).read_text())
        assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_demo_draws_where_git_does_not_look() -> None:
    default = re.findall(r'^PICTURE = Path\("(.*)"\)', (ROOT / "demo.py").read_text(), re.M)
    assert len(default) == 1
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    assert subprocess.run(["git", "check-ignore", "--quiet", default[0]], cwd=ROOT).returncode == 0
    assert subprocess.run(["git", "check-ignore", "--quiet", "docs/demo.png"], cwd=ROOT).returncode == 1
