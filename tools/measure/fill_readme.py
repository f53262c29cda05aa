"""Measured figures of README and docs/, written into them from the files of docs/measured/ that keep them.

    python tools/measure/fill_readme.py

A block of a page that lies between `<!-- measured: NAME -->` and `<!-- end -->` is what BLOCKS makes of a
file; where the file is not there the block stays as it is. A test fails while a block says something else.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from typing import Any

import ablation
import bench_cluster
import bench_coreai
import bench_gptq
import bench_lower
import bench_pipeline
import bench_rounding
import compare_coreai
import compare_quality
import measure_memory
import newcomer
import quiet_times
import real_model_tables
import record_coreai_contract
import scaling
from measured import DOCS, REPOSITORY, RESULTS
from quality_runs import with_table

FILLED = ("core-ai", "results", "guarantees", "performance", "cluster", "scaling")
PAGES = (REPOSITORY / "README.md", *(DOCS / f"{name}.md" for name in FILLED))
WIDTH = 116
BLOCK = re.compile(
    r"^(?P<indent> *)<!-- measured: (?P<name>\w+) -->\n(?P<text>.*?)^ *<!-- end -->$",
    re.MULTILINE | re.DOTALL,
)


def model(facts: dict[str, Any]) -> str:
    stream = facts["stream"]
    return (
        f"`{facts['model']}` has {facts['parameters'] / 1e6:.1f}M parameters, was trained on books, and has "
        f"massive activations: {stream['peak']:.0f} where the root mean square of other positions is "
        f"{stream['rms_elsewhere']:.0f}. Its perplexity on held-out books is {facts['perplexity']:.2f} "
        "(`python tools/measure/model_facts.py`)."
    )


def equivalence(facts: dict[str, Any]) -> str:
    moved = [run["moved"] for run in facts["rotations"]]
    return (
        f"In {len(moved)} rotations of `{facts['model']}` they differed by {min(moved):.1e} to "
        f"{max(moved):.1e} ([measured/model.json](measured/model.json))."
    )


def tables(name: str, script: str, rows: list[Any]) -> Callable[[dict[str, Any]], str]:
    return lambda results: with_table(rows, results, script, name)


BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "model": ("model", model),
    "equivalence": ("model", equivalence),
    "brief": ("quality", compare_quality.brief),
    "quality": ("quality", tables("quality", "compare_quality", compare_quality.ROWS)),
    "real_model": ("real_model", real_model_tables.report),
    "quiet": ("quiet", quiet_times.sentence),
    "ablation": ("ablation", tables("ablation", "ablation", ablation.ROWS)),
    "learned": ("ablation", ablation.learned_rotations),
    "bench": ("bench_lower", bench_lower.report),
    "memory": ("memory", measure_memory.sentences),
    "demo": ("newcomer", newcomer.sentence),
    "newcomer": ("newcomer", newcomer.times),
    "pipeline": ("pipeline", bench_pipeline.tables),
    "rounding": ("rounding", bench_rounding.sentences),
    "peers": ("peers", bench_lower.report),
    "gptq": ("gptq", bench_gptq.sentences),
    "coreai_export": ("coreai_export", record_coreai_contract.sentence),
    "coreai_lower": ("bench_coreai", bench_coreai.report),
    "coreai_quality": ("coreai_quality", compare_coreai.report),
    "cluster": ("cluster", bench_cluster.sentences),
    "scaling": ("scaling", scaling.sentences),
}
"""Of every block its file, docs/measured/NAME.json, and what it says."""


def filled(page: str) -> str:
    """A page with every block from its file. Raises KeyError for a block of no known name."""

    def written(block: re.Match[str]) -> str:
        file, say = BLOCKS[block["name"]]
        path = RESULTS / f"{file}.json"
        if not path.is_file():
            return block[0]
        edge = f"{block['indent']}<!-- "
        lines = say(json.loads(path.read_text(encoding="utf-8"))).splitlines()
        text = "\n".join(_wrapped(line, block["indent"]) for line in lines)
        return f"{edge}measured: {block['name']} -->\n{text}\n{edge}end -->"

    return BLOCK.sub(written, page)


def _wrapped(line: str, indent: str) -> str:
    """A row of a table stays one line."""
    if line.startswith("|"):
        return line
    return textwrap.fill(line, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
