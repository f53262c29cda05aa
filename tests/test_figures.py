"""The README's tables are what the scripts in tools/ print from the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import ablation
import compare_quality
import pytest
from quality_runs import table

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize(("file", "script"), [("ablation", ablation), ("quality", compare_quality)])
def test_tables_are_printed_from_their_results(file: str, script: ModuleType) -> None:
    results = json.loads((REPOSITORY / "docs" / f"{file}.json").read_text(encoding="utf-8"))
    rows = {row.label for row in script.ROWS}
    assert {run["row"] for run in results["runs"]} == rows
    assert table(script.ROWS, results["runs"]) in (REPOSITORY / "README.md").read_text(encoding="utf-8")
