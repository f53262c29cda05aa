"""docs/bad-inputs.md has every group of bad inputs, and names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
ROW = re.compile(r"^\| (?P<group>\d+) \| (?P<input>[^|]+) \| (?P<answer>.+) \|$", re.MULTILINE)
TEST = re.compile(r"`(?P<file>tests/[\w/]+\.py)::(?P<name>\w+)`")


def rows() -> list[tuple[int, str]]:
    text = (REPOSITORY / "docs" / "bad-inputs.md").read_text(encoding="utf-8")
    return [(int(row["group"]), row["answer"]) for row in ROW.finditer(text)]


def test_every_group_has_its_row_and_every_row_a_test_or_a_reason() -> None:
    assert [group for group, _ in rows()] == list(range(1, 37))
    assert all(TEST.search(answer) or "Limit: " in answer for _, answer in rows())


def test_the_tests_exist() -> None:
    named = {(test["file"], test["name"]) for _, answer in rows() for test in TEST.finditer(answer)}
    assert len(named) > 40
    for file in {file for file, _ in named}:
        tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
        known = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {name for other, name in named if other == file} <= known, file
