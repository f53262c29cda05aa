"""Quality of recipes and peers on a real model and two kinds of text, as a Markdown table.

    python tools/real_model.py MODEL
    anequant rotate MODEL -o TWIN
    python tools/measure/real_model_quality.py MODEL TWIN docs/measured/real_model.json \\
        --text wikitext2-test.txt eval-books.txt --calibration wikitext2-valid.txt calibration-books.txt

Each row is measured on 40 windows of 512 tokens of every text, against the float model. Recipes and peers
that calibrate see 96 windows, the same number of each calibration text, unless a row says otherwise. What the
JSON file holds is not measured again; what failed is tried again. --only WORD ... measures the rows alone
whose name has one of the words, in their order. HQQ and torchao are those of `pip install 'anequant[peers]'`;
GPTQModel and llama.cpp are installed in environments of their own in --cache, which takes a compiler and some
minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

from measured import machine, write_json
from peer_environments import CACHE
from quality_runs import list_missing, run_each
from real_model_rows import ROWS, choose_rows, list_unavailable
from real_model_runs import Settings, measure, record_references
from real_model_tables import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("twin", type=Path)
    parser.add_argument("json", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    results = _load(options.json)
    with tempfile.TemporaryDirectory() as work:
        paths = options.model, options.twin, tuple(options.text), tuple(options.calibration)
        settings = Settings(*paths, options.windows, options.length, Path(work), options.cache)
        described = settings.describe()
        if results.setdefault("settings", described) != described:
            parser.error(f"'{options.json}' holds runs with other settings: {results['settings']}")
        done = [run for run in results["runs"] if "failed" not in run]
        rows = choose_rows(options.only)
        tasks = [(row, seed, settings) for row, seed in list_missing(rows, done)]
        if tasks:
            list(run_each(record_references, [settings], jobs=1, threads=options.threads))
        runs = run_each(measure, tasks, jobs=options.jobs, threads=options.threads)
        for run in chain(list_unavailable(rows, done), runs):
            others = [
                one for one in results["runs"] if (one["row"], one["seed"]) != (run["row"], run["seed"])
            ]
            results |= {"machine": machine(), "runs": [*others, {**run, "machine": machine()}]}
            write_json(options.json, results)
            print(
                f"{run['row']}, seed {run['seed']}: {run.get('failed', 'done')}", file=sys.stderr, flush=True
            )
    print(table(ROWS, results))


def _load(file: Path) -> dict[str, Any]:
    """What a file holds already."""
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": []}
    for run in kept["runs"]:
        run.setdefault("machine", kept["machine"])
    return kept


if __name__ == "__main__":
    main()
