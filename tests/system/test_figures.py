"""Measured figures: those of the pages are what docs/measured/*.json says, and so is the README's figure."""

from __future__ import annotations

import itertools
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any

import ablation
import compare_quality
import conftest
import fill_readme
import newcomer
import pytest
import why_figure
from browser import browser
from quality_runs import table
from running import execute_python

from anequant.report.page.charts import contrast

DOCS = conftest.REPOSITORY / "docs"
RESULTS = DOCS / "measured"
README = (conftest.REPOSITORY / "README.md").read_text(encoding="utf-8")
TABLES = (DOCS / "results.md").read_text(encoding="utf-8")
PAGES = "".join(page.read_text(encoding="utf-8") for page in fill_readme.PAGES)
MAKE = {
    "model": "tools/measure/model_facts.py MODEL TEXT",
    "quality": "tools/measure/compare_quality.py MODEL TEXT CALIBRATION --json docs/measured/quality.json",
    "real_model": "tools/measure/real_model_quality.py MODEL TWIN docs/measured/real_model.json, and texts",
    "quiet": "tools/measure/quiet_times.py MODEL TEXT CALIBRATION --json docs/measured/quiet.json",
    "ablation": "tools/measure/ablation.py MODEL TEXT CALIBRATION --json docs/measured/ablation.json",
    "bench_lower": "tools/measure/bench_lower.py --json docs/measured/bench_lower.json",
    "memory": "tools/measure/measure_memory.py run --json docs/measured/memory.json, and limited",
    "newcomer": "tools/measure/newcomer.py",
    "pipeline": "tools/measure/bench_pipeline.py SHAPE --layers N",
    "rounding": "tools/measure/bench_rounding.py",
    "peers": "tools/measure/bench_lower.py --layers 2 --grouped --json docs/measured/peers.json",
    "gptq": "tools/measure/bench_gptq.py",
    "coreai_export": "tools/measure/record_coreai_contract.py",
    "bench_coreai": "tools/measure/bench_coreai.py --json docs/measured/bench_coreai.json",
    "coreai_quality": "tools/measure/compare_coreai.py MODEL TEXT CALIBRATION --json, and that file",
    "cluster": "tools/measure/bench_cluster.py --json docs/measured/cluster.json",
    "scaling": "tools/measure/scaling.py MODEL TEXT CALIBRATION",
}
"""How each file of measurements is made."""


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("file", "script"), [("ablation", ablation), ("quality", compare_quality)])
def test_tables_are_printed_from_their_results(file: str, script: ModuleType) -> None:
    results = read(file)
    rows = {row.label for row in script.ROWS}
    assert {run["row"] for run in results["runs"]} == rows
    assert table(script.ROWS, results["runs"]) in TABLES


@pytest.mark.parametrize("name", fill_readme.BLOCKS)
def test_a_block_is_what_its_file_says(name: str) -> None:
    (block,) = (block for block in fill_readme.BLOCK.finditer(PAGES) if block["name"] == name)
    file, _ = fill_readme.BLOCKS[name]
    if not (RESULTS / f"{file}.json").is_file():
        pytest.skip(f"docs/{file}.json is not measured yet: python {MAKE[file]}")
    assert fill_readme.filled(block[0]) == block[0], "python tools/measure/fill_readme.py"


def test_every_file_of_measurements_is_used() -> None:
    assert {path.stem for path in RESULTS.glob("*.json")} <= {file for file, _ in fill_readme.BLOCKS.values()}
    assert set(MAKE) == {file for file, _ in fill_readme.BLOCKS.values()}


# What scripts say of what they measured, where the file may not be there yet


def test_the_words_of_a_bench() -> None:
    def stage(name: str, seconds: float, peak: int) -> dict[str, Any]:
        steps = {"first": seconds / 4, "second": seconds * 3 / 4}
        own = {"seconds": seconds, "cpu_seconds": 2 * seconds, "import_seconds": 1.0, "steps": steps}
        return {"stage": name, **own, "peak_bytes": peak, "disk_bytes": 5_000_000}

    stages = [
        stage("quantize", 30.0, 10**9),
        stage("ours", 4.0, 2 * 10**9),
        stage("peer", 100.0, 3 * 10**9),
    ]
    measured = {"layers": 7, "context": 128, "batch": 16, "machine": {"cpu": "one"}, "stages": stages}
    said = fill_readme.BLOCKS["bench"][1](measured)
    assert "| peer | 100.0 | 200.0 | 1.0 | 3000 | 5.0 |" in said
    assert "peer / ours: seconds 25.0x, CPU seconds 25.0x, peak memory 1.5x." in said
    assert (
        "ours: first 1.0 s, second 3.0 s." in said and "7 layers, context 128, prefill 16; cpu one." in said
    )


def test_the_words_of_memory() -> None:
    limits = [{"layers": 4, "limit": 2.3e9, "peak": 2.1e9}, {"layers": 12, "limit": 2.3e9, "peak": 2.2e9}]
    jobs = [{"ratio": ratio} for ratio in (0.91, 0.78, 1.07)]
    measured = {
        "limited": {"machine": {"date": "2026-01-02"}, "runs": limits},
        "run": {"machine": {"date": "2026-01-01"}, "runs": jobs},
    }
    said = fill_readme.BLOCKS["memory"][1](measured)
    assert (
        "with 4 and with 12 layers" in said and "the 2.3 GB that `plan` had said, at a peak of 2.2 GB" in said
    )
    assert "On 3 jobs" in said and "0.78 to 1.07" in said
    assert "limited`, 2026-01-02" in said and "run`, 2026-01-01" in said


def test_the_words_of_quiet_times() -> None:
    runs = [{"row": "`w4-ane`", "seconds": 86.4}, {"row": "`w4-ane --tune 100`", "seconds": 420.0}]
    measured = {"runs": runs, "machine": {"cpu": "Intel", "cores": 8, "date": "2026-01-01"}}
    said = fill_readme.BLOCKS["quiet"][1](measured)
    assert "takes 86 s and `--tune 100` 420 s" in said and "2026-01-01 on 8 cores of an Intel" in said


def test_the_words_of_a_newcomer() -> None:
    measured = {
        "machine": {"cpu": "Neoverse", "cores": 2, "date": "2026-01-01"},
        "layers": 24,
        "demo": {"installed": 60.2, "verified": 130.4, "seconds": 140.0, "peak": 700_000_000},
        "commands": [{"command": ".venv/bin/anequant lower good -o x", "seconds": 12.3, "peak": 10**9}],
    }
    said = fill_readme.BLOCKS["demo"][1](measured)
    assert "is there 130 s after" in said and "which 60 s install" in said and "peak of 700 MB" in said
    assert "2 cores of a Neoverse" in said
    times = fill_readme.BLOCKS["newcomer"][1](measured)
    assert "2 cores of a Neoverse" in times and "| `anequant lower good -o x` | 12 | 1000 |" in times
    alone = {**measured, "commands": []}
    assert fill_readme.BLOCKS["demo"][1](alone) == said
    assert "not measured" in fill_readme.BLOCKS["newcomer"][1](alone)


def test_the_readme_has_five_rows_of_the_results() -> None:
    rows = re.findall(r"^\| .+? \| ([\d.]+) \| (\+[^|]+) \| ([\d.]+) \| ([\d.]+%) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for bits, *quality in rows:
        assert re.search(rf"\| {bits} \| \d \| {re.escape(' | '.join(quality))} \|", TABLES), quality
    losses = [float(loss.split()[0]) for _, loss, _, _ in rows]
    assert losses == sorted(losses, reverse=True), "ours is the last and the least"


def test_a_newcomer_runs_the_commands_of_the_readme() -> None:
    commands = newcomer.steps(README)
    assert [words[1] for words in commands] == ["quantize", "quantize", "lower"]
    recipes = [words[words.index("--recipe") + 1] for words in commands[:2]]
    assert recipes == ["w4-nearest", "w4-ane"] and all("#" not in words for words in commands)


def test_the_peak_of_what_a_newcomer_runs(tmp_path: Path) -> None:
    """Measured from a process of its own: a child's peak counts what its parent held when it began."""
    script = "import newcomer, pathlib, sys; words = [sys.executable, '-c', 'bytearray(b\"x\") * 10**8']\n"
    script += "print(newcomer.run(words, pathlib.Path('.')).peak)"
    told = execute_python(
        script, folder=tmp_path, env={"PYTHONPATH": str(conftest.REPOSITORY / "tools" / "measure")}
    )
    assert told.exit_code == 0, told.stderr
    assert 10**8 < int(told.stdout.splitlines()[-1]) < 3 * 10**8


def test_what_a_newcomer_runs_is_timed(tmp_path: Path) -> None:
    script = "import time; print('$ anequant convert', flush=True); time.sleep(0.3); print('verified  all')"
    ran = newcomer.run([sys.executable, "-c", script], tmp_path)
    assert ran.first(newcomer.CONVERTS) + 0.25 < ran.first(newcomer.VERIFIED) <= ran.seconds < 10
    with pytest.raises(SystemExit, match="ended with 3\nwhy"):
        newcomer.run([sys.executable, "-c", "import sys; print('why'); sys.exit(3)"], tmp_path)


# The figure


def marks(svg: str) -> tuple[list[ElementTree.Element], list[ElementTree.Element]]:
    """Its rectangles and its texts, in order."""
    root = ElementTree.fromstring(svg)
    names = (f"{{http://www.w3.org/2000/svg}}{name}" for name in ("rect", "text"))
    rects, texts = ([item for item in root if item.tag == name] for name in names)
    return rects, texts


def test_the_figure_is_drawn_from_the_results() -> None:
    svg = (DOCS / "why.svg").read_text(encoding="utf-8")
    assert svg == why_figure.figure(read("quality")), "python tools/measure/why_figure.py"
    assert "![" in README.partition("## Two commands")[0] and "(docs/why.svg)" in README


def test_numbers_and_lengths_of_the_figure() -> None:
    """Against the table of the results, and Apple's times."""
    rects, texts = marks((DOCS / "why.svg").read_text(encoding="utf-8"))
    numbers = [text.text or "" for text in texts if re.fullmatch(r"[\d.]+( ms)?", text.text or "")]
    rows = dict(re.findall(r"^\| ([^|]+?) \| [\d.]+ \| \d+ \| \+([\d.]+)", TABLES, re.MULTILINE))
    shown = [rows[row] for row, _, _ in (*why_figure.TABLE, *why_figure.GROUPS)]
    assert numbers == ["14.8 ms", "59 ms", *shown]
    bars = [rect for rect in rects if rect.get("height") == "12" and rect.get("width") != "12"]
    lengths = [float(bar.get("width", "")) for bar in bars]
    assert len(lengths) == len(numbers)
    for group in (slice(0, 2), slice(2, None)):
        values = [float(number.split()[0]) for number in numbers[group]]
        for value, length in zip(values, lengths[group], strict=True):
            assert length / max(lengths[group]) == pytest.approx(value / max(values), abs=1e-3)


def test_the_figure_tells_nothing_by_colour_alone() -> None:
    svg = (DOCS / "why.svg").read_text(encoding="utf-8")
    rects, _ = marks(svg)
    assert {rect.get("class") for rect in rects[1:]} == {"fast", "ours", "slow"}
    assert "rect.slow{fill:url(#hatched);stroke:" in svg and "anequant w4-ane" in svg
    assert rects[0].get("fill") == "#fff", "a background of its own, in GitHub's dark mode too"
    inks = re.findall(r"fill:(#[0-9a-f]{6})", why_figure.STYLE)
    assert len(inks) >= 4 and all(contrast(ink, "#ffffff") > 4.5 for ink in inks)
    description = re.search("<desc[^>]*>(.*)</desc>", svg)
    assert description and "14.8 ms" in description[1]


def test_every_word_of_the_figure_has_its_place() -> None:
    """As a browser draws it, by whatever font is there."""
    with browser() as page:
        page.open((DOCS / "why.svg").as_uri(), width=390, dark=True)
        boxes = page.evaluate(
            "[...document.querySelectorAll('text')].map(text => text.getBBox())"
            ".map(box => [box.x, box.y, box.x + box.width, box.y + box.height])"
        )
        width, height = page.evaluate(
            "(view => [view.width, view.height])(document.documentElement.viewBox.baseVal)"
        )
    assert len(boxes) > 20
    for left, top, right, bottom in boxes:
        assert 0 < left < right < width - 4 and 0 < top < bottom < height
    for one, other in itertools.combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0]
        assert apart or abs(one[1] - other[1]) > 10, (one, other)
