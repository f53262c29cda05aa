"""What the quality tables of `compare_quality.py` and `ablation.py` share: rows, their runs, and the table.

Extra NLL and KL (nats) and the share of equal top tokens are against the float model, on evenly spaced
windows that start with the model's start token. Calibration takes 24 windows of the same length of another
text unless a row says otherwise. A row may run for several rotation seeds: the table shows the means and half
the range of the extra NLL. Each run has a process of its own, with one thread unless a script says otherwise;
seconds are wall time of quantizing, peak memory is the process's (imports included), means over seeds.

Finished runs are kept in --json FILE and not repeated; the table is printed from it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from measured import machine, when_and_where, write_json

if TYPE_CHECKING:
    from anequant.recipe import Calibration
    from anequant.request import Request

Task = TypeVar("Task")

WINDOWS = 24


@dataclass(frozen=True)
class Row:
    """One way to quantize: a recipe with overrides, or a peer of `quality_peers`; and what it shows."""

    label: str
    shows: str
    recipe: str = "w4-ane"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    windows: int = WINDOWS
    own_text: bool = False
    peer: str | None = None
    needs: str | None = None
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Settings:
    """What all rows share: folders and files, the size of the evaluation, and the threads of a run."""

    model: str
    text: Path
    calibration: Path
    windows: int
    length: int
    threads: int = 1


def measure(task: tuple[Row, int, Settings]) -> dict[str, Any]:
    """Quantize with one seed and evaluate; meant for a process of its own."""
    row, seed, settings = task
    import torch

    torch.set_num_threads(settings.threads)
    from anequant.evaluation.evaluate import evaluate_text

    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "quantized"
        begun = time.perf_counter()
        bits = (
            _run_recipe(row, seed, settings, output) if row.peer is None else _run_peer(row, settings, output)
        )
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        quality = evaluate_text(
            str(output), settings.text, settings.model, windows=settings.windows, length=settings.length
        )
    return {
        "row": row.label,
        "seed": seed,
        "bits": bits,
        "extra_nll": quality.extra_nll,
        "kl": quality.kl,
        "top1": quality.top1,
        "seconds": seconds,
        "peak_mb": peak,
    }


def _run_recipe(row: Row, seed: int, settings: Settings, output: Path) -> float:
    """Average bits of the projections' weights, scales aside."""
    from anequant.pipeline.quantize import quantize
    from anequant.recipe import Calibration

    source = "self" if row.own_text else str(settings.calibration)
    request = ask(row, seed, Path(settings.model), Calibration((source,), row.windows, settings.length))
    result = quantize(request, output)
    projections = [tensor for tensor in result.rounding.tensors if "_proj" in tensor.name]
    if not projections:
        return float(request.recipe.bits)
    return sum(t.bits * t.weights for t in projections) / sum(t.weights for t in projections)


def ask(row: Row, seed: int, model: Path, calibration: Calibration) -> Request:
    """Return what is asked for by a row with a recipe."""
    from anequant.checkpoints.source import resolve_source
    from anequant.recipe_files import load_recipe
    from anequant.request import Request

    recipe = load_recipe(row.recipe, {**row.overrides, "seed": seed})
    return Request(resolve_source(str(model)), recipe, calibration)


def _run_peer(row: Row, settings: Settings, output: Path) -> float:
    """Average bits of the projections' weights, scales and codebooks included."""
    from quality_peers import PEERS, count_bits_per_weight

    from anequant.checkpoints.reader import open_checkpoint
    from anequant.reference.windows import read_text_windows

    assert row.peer is not None
    folder, peer = Path(settings.model), PEERS[row.peer]
    spec, text = open_checkpoint(folder).spec, settings.calibration
    windows = read_text_windows(folder, spec.config, text, count=row.windows, length=settings.length)
    peer.run(folder, output, windows)
    return count_bits_per_weight(peer, spec)


def table(rows: Sequence[Row], results: list[dict[str, Any]]) -> str:
    """The rows that have results, in the order of `rows`, as Markdown."""
    lines = [
        "| way | bits | seeds | extra NLL | KL | same top token | seconds | peak MB | what it shows |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        runs = [run for run in results if run["row"] == row.label]
        if not runs:
            reason = f"not run: `{row.needs}` is not installed" if not is_available(row) else "not run"
            lines.append(f"| {row.label} | | | | | | | | {reason} |")
            continue
        mean = _means(runs)
        lines.append(
            f"| {row.label} | {mean['bits']:.2f} | {len(runs)} | {_quality(runs)} "
            f"| {mean['seconds']:.0f} | {mean['peak_mb']:.0f} | {row.shows} |"
        )
    return "\n".join(lines)


def brief_table(names: Mapping[str, str], results: dict[str, Any]) -> str:
    """Quality alone of the rows with the labels in `names`, by the names there, below a sentence that says
    where it is from."""
    lines = [
        f"Ways to quantize `{results['settings']['model']}`, each against the float model. "
        f"{_measured_on(results)}.",
        "",
        "| way | bits | extra NLL | KL | same top token |",
        "|---|---:|---:|---:|---:|",
    ]
    for label, name in names.items():
        runs = [run for run in results["runs"] if run["row"] == label]
        lines.append(f"| {name} | {_means(runs)['bits']:.2f} | {_quality(runs)} |")
    return "\n".join(lines)


def _means(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Every figure of a row, as the mean over its seeds."""
    return {key: fmean(run[key] for run in runs) for key in runs[0] if key not in ("row", "seed")}


def _quality(runs: Sequence[Mapping[str, Any]]) -> str:
    """The cells of extra NLL, with half of its range over seeds, KL and agreement."""
    mean, losses = _means(runs), [run["extra_nll"] for run in runs]
    spread = f" ± {(max(losses) - min(losses)) / 2:.4f}" if len(runs) > 1 else ""
    return f"{mean['extra_nll']:+.4f}{spread} | {mean['kl']:.4f} | {mean['top1']:.1%}"


def _measured_on(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    return (
        f"Measured on {settings['windows']} windows of {settings['length']} tokens, "
        f"{when_and_where(results['machine'])}"
    )


def is_available(row: Row) -> bool:
    """Whether what the row needs is installed."""
    return row.needs is None or find_spec(row.needs) is not None


def list_missing(rows: Sequence[Row], kept: Sequence[Mapping[str, Any]]) -> list[tuple[Row, int]]:
    """List the rows and seeds that `kept` has no run of, those of the first seed before the others."""
    done = {(run["row"], run["seed"]) for run in kept}
    return [
        (row, seed)
        for seed in sorted({seed for row in rows for seed in row.seeds})
        for row in rows
        if seed in row.seeds and is_available(row) and (row.label, seed) not in done
    ]


def run_each(
    work: Callable[[Task], dict[str, Any]], tasks: Sequence[Task], *, jobs: int, threads: int
) -> Iterator[dict[str, Any]]:
    """Yield what `work` returns of every task, in a process of its own with so many threads, `jobs` at a
    time; in the order in which they end."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(work, tasks)


def with_table(rows: Sequence[Row], results: dict[str, Any], script: str, file: str) -> str:
    """The table of a file's results for a page in docs/, below a sentence that says where they are from."""
    return (
        f"{_measured_on(results)}, by `python tools/measure/{script}.py MODEL TEXT CALIBRATION`; the single "
        f"runs are in [measured/{file}.json](measured/{file}.json).\n\n{table(rows, results['runs'])}"
    )


def run_table(rows: Sequence[Row], description: str | None, *, jobs: int = 2, threads: int = 1) -> None:
    """The command line of a table: measure what is not yet measured, print the table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=jobs)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    settings = Settings(
        options.model, options.text, options.calibration, options.windows, options.length, threads
    )
    kept = json.loads(options.json.read_text())["runs"] if options.json and options.json.exists() else []
    tasks = [(row, seed, settings) for row, seed in list_missing(rows, kept)]
    for run in run_each(measure, tasks, jobs=options.jobs, threads=threads):
        kept.append(run)
        if options.json:
            shared = {
                **asdict(settings),
                "text": options.text.name,
                "calibration": options.calibration.name,
            }
            shared["model"] = Path(options.model).name
            write_json(options.json, {"settings": shared, "machine": machine(), "runs": kept})
    print(f"{machine()}\n\n{table(rows, kept)}")
