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
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from measured import machine, when_and_where, write_json
from peer_environments import CACHE
from quality_runs import Row, is_available, list_missing, run_each
from real_model_runs import SAMPLES, Settings, measure, record_references

from anequant.evaluation.intervals import average, average_differences

SEEDS = (0, 1, 2)
CALIBRATED = partial(Row, windows=SAMPLES)
TABLES = {"head_bits": 6, "embedding_bits": 8}
CHOSEN_TABLES = {"head_bits": 0, "embedding_bits": 0}

W4, TUNED, NEAREST = "**`w4-ane`**", "**`w4-ane --tune 60min`**", "`w4-nearest`"
AFFINE, GPTQ = "affine int4, groups of 32", "GPTQModel int4, groups of 128"


def peer(name: str, shows: str, needs: str | None = None) -> Row:
    return CALIBRATED(name, shows, peer=name, needs=needs)


def mixed(target: float, shows: str = "2 to 8 bits by what each costs", **overrides: int) -> Row:
    """A row whose widths are chosen, so many bits on average."""
    options = "".join(f" --{key.replace('_', '-')} {value}" for key, value in overrides.items())
    label = f"`w4-ane --target-bits {target:g}{options}`"
    return CALIBRATED(label, shows, overrides={"target_bits": target, **overrides})


ROWS = [
    CALIBRATED(NEAREST, "the best without calibration", "w4-nearest", seeds=SEEDS),
    CALIBRATED(W4, "the default recipe", seeds=SEEDS),
    CALIBRATED(
        "`w4-ane`, tokens weighed alike", "`--hessian layer`", overrides={"hessian": "layer"}, seeds=SEEDS
    ),
    Row("`w4-ane`, 48 windows", "the default number of windows", windows=48, seeds=SEEDS),
    Row("`w4-ane`, calibrated on `self`", "no text at hand", windows=48, own_text=True, seeds=SEEDS),
    CALIBRATED(TUNED, "distilled for an hour", overrides={"tune_minutes": 60}, seeds=SEEDS),
    CALIBRATED("`w4-ane`, head 6 and embedding 8 bits", "smaller tables", overrides=TABLES, seeds=SEEDS),
    *(mixed(target) for target in (2.5, 3.0, 3.5, 4.5, 5.0)),
    mixed(4.5, "head and embedding too", **CHOSEN_TABLES),
    CALIBRATED("`w6-ane`", "nearly as good as float", "w6-ane", seeds=SEEDS),
    mixed(6.0),
    CALIBRATED("`w8-ane`", "as good as float", "w8-ane", seeds=SEEDS),
    peer("coremltools k-means", "today's palettization, rotated"),
    peer("coremltools k-means, row scales", "the same, a scale for every row"),
    peer(AFFINE, "nearest"),
    peer("affine int4, groups of 64", "nearest"),
    peer("torchao int4, groups of 32", "nearest, zero points of 8 bits", "torchao"),
    peer("torchao int4, groups of 64", "nearest, zero points of 8 bits", "torchao"),
    peer("HQQ int4, groups of 32", "zero points of 16 bits", "hqq"),
    peer("HQQ int4, groups of 64", "zero points of 16 bits", "hqq"),
    peer(GPTQ, "calibrated on the same windows"),
    peer("llama.cpp Q4_0", "its file as it is, no importance matrix"),
    peer("llama.cpp Q4_0, head and embedding fp16", "as the other rows have them"),
    peer("llama.cpp Q4_K_M", "the same file; rows of 576 do not fit its blocks of 256"),
    peer("llama.cpp Q4_K_M, head and embedding fp16", "as the other rows have them"),
]

TINY = 1e-3
"""Figures below have a digit more."""

CURVE = (W4, "`w6-ane`", "`w8-ane`", *(row.label for row in ROWS if "target_bits" in row.overrides))
"""What the curve of KL against bits is drawn through."""

PAIRS = (
    (TUNED, GPTQ),
    (W4, GPTQ),
    (TUNED, AFFINE),
    (W4, AFFINE),
    (TUNED, "HQQ int4, groups of 32"),
    (TUNED, "llama.cpp Q4_K_M, head and embedding fp16"),
)
"""Ways whose difference in KL is told in words, ours first."""


def choose_rows(words: Sequence[str]) -> list[Row]:
    """Return the rows whose label has one of the words, in the order of the words."""
    rows = [row for row in ROWS if any(word in row.label for word in words)]
    return sorted(rows, key=lambda row: [word in row.label for word in words].index(True))


def list_unavailable(rows: Sequence[Row], done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List a run that failed for every row that is not done and whose package is not installed."""
    known = {run["row"] for run in done}
    return [
        {"row": row.label, "seed": row.seeds[0], "failed": f"`{row.needs}` is not installed"}
        for row in rows
        if not is_available(row) and row.label not in known
    ]


def finished(results: Mapping[str, Any], label: str) -> list[dict[str, Any]]:
    """The runs of a row that did not fail."""
    return [run for run in results["runs"] if run["row"] == label and "failed" not in run]


def window_means(runs: Sequence[Mapping[str, Any]], text: str, key: str) -> list[float]:
    """A figure of every window, as the mean over seeds."""
    return [fmean(values) for values in zip(*(run["texts"][text][key] for run in runs), strict=True)]


def table(rows: Sequence[Row], results: Mapping[str, Any]) -> str:
    """The rows in their order, as Markdown; one that did not run tells why."""
    texts: list[str] = results["settings"]["texts"]
    heads = [f"{what}, {text}" for what in ("KL", "extra NLL", "same top token") for text in texts]
    names = ["way", "bits", "MB", "seeds", *heads, "seconds", "peak MB", "what it shows"]
    lines = [row_of(names), "|---|" + "---:|" * (len(names) - 2) + "---|"]
    for row in rows:
        runs = finished(results, row.label)
        if not runs:
            blank = [""] * (len(names) - 2)
            lines.append(row_of([row.label, *blank, f"not run: {reason(row, results)}"]))
            continue
        cells = [
            row.label,
            f"{fmean(run['bits'] for run in runs):.3f}",
            f"{fmean(run['nbytes'] for run in runs) / 1e6:.1f}",
            str(len(runs)),
            *(cell(runs, text, "kl", "{:.4f}") for text in texts),
            *(cell(runs, text, "extra_nll", "{:+.4f}") for text in texts),
            *(f"{fmean(window_means(runs, text, 'top1')):.1%}" for text in texts),
            f"{fmean(run['seconds'] for run in runs):.0f}{mark(runs, results)}",
            f"{fmean(run['peak'] for run in runs) / 1e6:.0f}",
            row.shows,
        ]
        lines.append(row_of(cells))
    return "\n".join(lines)


def mark(runs: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    """Stars that tell which machine the last of the runs was on, none for the first machine of all."""
    return "*" * list_places(results).index(when_and_where(runs[-1]["machine"]))


def list_places(results: Mapping[str, Any]) -> list[str]:
    """When and where runs were made, from the place of most of them on."""
    places = [when_and_where(run["machine"]) for run in results["runs"] if "failed" not in run]
    return sorted(dict.fromkeys(places), key=lambda place: -places.count(place))


def row_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(runs: Sequence[Mapping[str, Any]], text: str, key: str, form: str) -> str:
    """A figure with its standard error, which a single window does not tell."""
    mean = average(window_means(runs, text, key))
    form = form.replace(".4f", ".5f") if 0 < abs(mean.value) < TINY else form
    error = "" if mean.error is None else f" ± {mean.error:{form[form.index('.') : -1]}}"
    return form.format(mean.value) + error


def curve(results: Mapping[str, Any]) -> str:
    """KL against bits and megabytes as Markdown, from the fewest bits on: chosen widths and single ones."""
    texts: list[str] = results["settings"]["texts"]
    heads = [
        "way",
        "bits",
        "MB",
        *(f"KL, {text}" for text in texts),
        *(f"of 4 bits, {text}" for text in texts),
    ]
    found = {label: runs for label in CURVE if (runs := finished(results, label))}
    lines = [row_of(heads), "|---|" + "---:|" * (len(heads) - 1)]
    for label, runs in sorted(found.items(), key=lambda item: fmean(run["bits"] for run in item[1])):
        means = {text: fmean(window_means(runs, text, "kl")) for text in texts}
        four = {text: fmean(window_means(found[W4], text, "kl")) for text in texts} if W4 in found else {}
        cells = [
            label,
            f"{fmean(run['bits'] for run in runs):.2f}",
            f"{fmean(run['nbytes'] for run in runs) / 1e6:.1f}",
            *(f"{means[text]:.{5 if means[text] < TINY else 4}f}" for text in texts),
            *(f"{means[text] / four[text]:.2f}" if four else "" for text in texts),
        ]
        lines.append(row_of(cells))
    return "\n".join(lines)


def reason(row: Row, results: Mapping[str, Any]) -> str:
    """Why a row has no figures, without what would end a cell of the table."""
    failures = [run["failed"] for run in results["runs"] if run["row"] == row.label and "failed" in run]
    if failures:
        return str(failures[-1]).replace("|", "/")
    return "not measured yet"


def compare_pair(ours: str, other: str, results: Mapping[str, Any]) -> str | None:
    """Tell the difference in KL between two rows, window by window; None where one of them has no run."""
    runs = finished(results, ours), finished(results, other)
    if not all(runs):
        return None
    said = []
    for text in results["settings"]["texts"]:
        found = average_differences(*(window_means(each, text, "kl") for each in runs))
        verdict = "better" if found.value < 0 else "worse"
        verdict = verdict if found.excludes_zero else "no different"
        said.append(f"{verdict} on {text} ({found.value:+.4f} ± {found.error:.4f})")
    bits = [fmean(run["bits"] for run in each) for each in runs]
    return f"{ours} at {bits[0]:.2f} bits, {other} at {bits[1]:.2f}: {' and '.join(said)}."


def tell_places(results: Mapping[str, Any]) -> str:
    """Say when and where: seconds compare within one place only."""
    first, *others = list_places(results)
    return "; ".join([first, *(f"rows with {'*' * n} {place}" for n, place in enumerate(others, 1))])


def report(results: Mapping[str, Any]) -> str:
    """The block of a page: what was measured and how, the table, and differences in words."""
    settings = results["settings"]
    pairs = [said for pair in PAIRS if (said := compare_pair(*pair, results)) is not None]
    texts, calibration = (" and ".join(settings[key]) for key in ("texts", "calibration"))
    return (
        f"`{settings['model']}` against itself in float, on {settings['windows']} windows of "
        f"{settings['length']} tokens of {texts} each; ± is the standard error over windows. What calibrates "
        f"sees {settings['samples']} windows, as many of {calibration} each. The model's own weights lie on "
        "the grid of Q4_1 in groups of 32, which a quantizer with such groups finds again: so every peer "
        "rounds its rotated twin (`anequant rotate`), never the model itself. Bits are those of projections "
        "with scales, zero points and codebooks, MB of the whole model with embedding and head, in fp16 "
        f"unless said. {tell_places(results)}, by `python "
        "tools/measure/real_model_quality.py`; the single runs are in "
        f"[measured/real_model.json](measured/real_model.json).\n\n{table(ROWS, results)}\n\n"
        f"KL against bits, widths chosen by what each tensor's rounding costs:\n\n{curve(results)}\n\n"
        "KL of two ways on the same windows; they differ where the 95% interval of that excludes 0:\n\n"
        + "\n".join(f"- {said}" for said in pairs)
    )


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
