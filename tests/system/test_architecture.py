"""docs/architecture.md against the tree: the drawing, the folders, and a checkpoint's way through a run."""

from __future__ import annotations

import re
from pathlib import Path

import conftest
import draw_architecture

import anequant

PACKAGE = Path(anequant.__file__).parent
PAGE = (conftest.REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
MOST_STOPS = 50


def marked(name: str) -> str:
    found = re.search(f"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_drawing_is_that_of_the_imports() -> None:
    """Else run `python tools/draw_architecture.py`."""
    assert marked("drawing") == draw_architecture.draw()


def test_every_folder_and_file_at_the_top_is_named() -> None:
    table = PAGE.partition("## Where things lie")[2].partition("## ")[0]
    rows = set(re.findall(r"^\| `([\w/]+)/` \|", table, re.MULTILINE))
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert {row.partition("/")[0] for row in rows} == folders
    assert all((PACKAGE / row).is_dir() for row in rows)
    files = {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    assert set(re.findall(r"`(\w+\.py)`", table)) == files


def test_the_way_of_a_checkpoint_is_as_listed_and_short() -> None:
    """Else run `python tools/draw_architecture.py`."""
    walk = draw_architecture.follow()
    assert marked("walk") == walk
    assert len(walk.splitlines()) < MOST_STOPS
