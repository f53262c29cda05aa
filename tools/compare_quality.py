"""Quality of ways to quantize the projections of one model, on one text, as a Markdown table.

    python tools/compare_quality.py MODEL TEXT CALIBRATION [--json FILE] [--jobs 2]
        [--windows 32] [--length 512]

Extra NLL and KL (nats) and the share of equal top tokens are against the float model, on evenly spaced
windows that start with the model's start token. Calibration takes 24 windows of the same length of another
text unless a row says otherwise. The rows that decide something run for three rotation seeds: the table
shows the means and half the range of the extra NLL. Each run has a process of its own with one thread;
seconds are wall time of quantizing, peak memory is the process's (imports included), means over seeds.

Finished runs are kept in --json FILE and not repeated; the table is printed from it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

WINDOWS = 24
SEEDS = (0, 1, 2)
PUBLISHED_ROTATED = {"r1": "block-hadamard", "r2": "hadamard"}
UNROTATED = {"r1": "none", "r2": "none"}
PLAIN_GPTQ = {"correction": 0.0, "descent": 0, "refinement": 0}


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
    seeds: tuple[int, ...] = SEEDS[:1]


ROWS = [
    Row("published int4: one absmax scale", "a few outliers set the scale of all", "w_int4_per_tensor"),
    Row(
        "the same, R1 and R2",
        "rotation halves the damage, absmax still wastes the range",
        "w_int4_per_tensor",
        PUBLISHED_ROTATED,
    ),
    Row("published int8: one absmax scale", "at 8 bits even this is close", "w_int8_per_tensor"),
    Row(
        "int4, absmax scale per row",
        "output scales alone, unrotated",
        "w4-nearest",
        {**UNROTATED, "codebook": "uniform", "scales": "output"},
    ),
    Row("coremltools k-means per tensor", "today's palettization", peer="coremltools_kmeans"),
    Row(
        "coremltools sensitive k-means per tensor",
        "the same, weighted by Fisher information on the calibration text",
        peer="coremltools_sensitive_kmeans",
        needs="sklearn",
    ),
    Row(
        "GPTQ, absmax scale per row",
        "classic GPTQ per channel, unrotated",
        overrides={**UNROTATED, **PLAIN_GPTQ, "codebook": "uniform", "scales": "output"},
    ),
    Row("affine int4, groups of 32", "nearest; leaves the ANE", peer="affine_groups"),
    Row("HQQ int4, groups of 32", "the package hqq; leaves the ANE", peer="hqq_groups", needs="hqq"),
    Row("lut, no scales", "one Lloyd-Max codebook after rotation", "w4-nearest", {"scales": "tensor"}),
    Row("lut, scale per row", "one more vector", "w4-nearest", {"scales": "output"}),
    Row("lut, balanced scales: `w4-nearest`", "the best without calibration", "w4-nearest", seeds=SEEDS),
    Row("+ GPTQ", "error feedback on the codebook", overrides=PLAIN_GPTQ),
    Row("+ two passes of descent", "codes revisited", overrides={"correction": 0.0, "refinement": 0}),
    Row("+ half the target correction", "makes up for errors upstream", overrides={"refinement": 0}),
    Row("**+ refinement: `w4-ane`**", "codebook and scales refitted to the codes", seeds=SEEDS),
    Row("`w4-ane`, 48 windows", "the default number of windows", windows=48, seeds=SEEDS),
    Row(
        "`w4-ane`, calibrated on `self`",
        "no text at hand: the model's own samples",
        own_text=True,
        seeds=SEEDS,
    ),
    Row("`w4-ane`, R1 over the whole width", "against blocks of 64", overrides={"r1": "hadamard"}),
    Row("`w4-ane`, random orthogonal R1", "a Hadamard is no worse", overrides={"r1": "random"}),
    Row("`w4-ane`, no rotation", "what rotation brings", overrides=UNROTATED),
    Row(
        "`w4-ane --fold-input-scales`",
        "seven multiplications a layer fewer",
        overrides={"fold_input_scales": True},
    ),
    Row("`w4-ane --tune 100`", "distilled, codes fixed", overrides={"tune": 100}, seeds=SEEDS),
    Row(
        "both",
        "tuning wins back what folding costs",
        overrides={"fold_input_scales": True, "tune": 100},
    ),
    Row("`w4-ane --target-bits 4.25`", "4 or 8 bits by sensitivity", overrides={"target_bits": 4.25}),
    Row(
        "`w4-ane`, head 6 and embedding 8 bits",
        "nothing added",
        overrides={"head_bits": 6, "embedding_bits": 8},
        seeds=SEEDS,
    ),
    Row("`w4-ane`, head 4 bits", "GPTQ on the head too", overrides={"head_bits": 4}, seeds=SEEDS),
    Row("`w8-ane`", "as good as float", "w8-ane", seeds=SEEDS),
    Row("`w6-ane`", "nearly so", "w6-ane", seeds=SEEDS),
    Row("`w3-ane`", "where size decides", "w3-ane", seeds=SEEDS),
    Row("`w2-ane`", "too few for this model", "w2-ane"),
]


@dataclass(frozen=True)
class Settings:
    """What all rows share: folders and files, and the size of the evaluation."""

    model: str
    text: Path
    calibration: Path
    windows: int
    length: int


def measure(task: tuple[Row, int, Settings]) -> dict[str, Any]:
    """Quantize with one seed and evaluate; meant for a process of its own."""
    row, seed, settings = task
    import torch

    torch.set_num_threads(1)
    from anequant.pipeline.evaluate import evaluate_text

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
    from anequant.checkpoints.source import resolve_source
    from anequant.pipeline.quantize import quantize
    from anequant.recipe import Calibration
    from anequant.recipe_files import load_recipe

    source = "self" if row.own_text else str(settings.calibration)
    calibration = Calibration(source, row.windows, settings.length)
    recipe = load_recipe(row.recipe, {**row.overrides, "seed": seed})
    result = quantize(resolve_source(settings.model), output, recipe, calibration)
    projections = [tensor for tensor in result.rounding.tensors if "_proj" in tensor.name]
    return sum(t.bits * t.weights for t in projections) / sum(t.weights for t in projections)


def _run_peer(row: Row, settings: Settings, output: Path) -> float:
    from quality_peers import GROUP, PEERS

    from anequant.calibration.text import load_tokenizer, read_text, start_token, text_windows
    from anequant.checkpoints.reader import open_checkpoint

    assert row.peer is not None
    folder = Path(settings.model)
    tokenizer = load_tokenizer(folder)
    first = start_token(tokenizer, open_checkpoint(folder).spec.config)
    text = read_text(settings.calibration)
    windows = text_windows(text, tokenizer, first, count=row.windows, length=settings.length)
    PEERS[row.peer](folder, output, windows)
    return 4 + 32 / GROUP if row.peer.endswith("groups") else 4.0


def table(results: list[dict[str, Any]]) -> str:
    """The rows that have results, in the order of ROWS, as Markdown."""
    lines = [
        "| way | bits | seeds | extra NLL | KL | same top token | seconds | peak MB | what it shows |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in ROWS:
        runs = [run for run in results if run["row"] == row.label]
        if not runs:
            reason = f"not run: `{row.needs}` is not installed" if not _available(row) else "not run"
            lines.append(f"| {row.label} | | | | | | | | {reason} |")
            continue
        mean = {key: fmean(run[key] for run in runs) for key in runs[0] if key not in ("row", "seed")}
        losses = [run["extra_nll"] for run in runs]
        spread = f" ± {(max(losses) - min(losses)) / 2:.4f}" if len(runs) > 1 else ""
        lines.append(
            f"| {row.label} | {mean['bits']:.2f} | {len(runs)} | {mean['extra_nll']:+.4f}{spread} "
            f"| {mean['kl']:.4f} | {mean['top1']:.1%} | {mean['seconds']:.0f} | {mean['peak_mb']:.0f} "
            f"| {row.shows} |"
        )
    return "\n".join(lines)


def _available(row: Row) -> bool:
    return row.needs is None or find_spec(row.needs) is not None


def _machine() -> dict[str, Any]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    packages = {name: version(name) for name in ("anequant", "torch", "transformers", "coremltools")}
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"cpu": cpu, "cores": os.cpu_count(), **packages, "date": today}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    settings = Settings(options.model, options.text, options.calibration, options.windows, options.length)
    kept = json.loads(options.json.read_text())["runs"] if options.json and options.json.exists() else []
    done = {(run["row"], run["seed"]) for run in kept}
    wanted = [
        (row, seed)
        for seed in SEEDS
        for row in ROWS
        if seed in row.seeds and _available(row) and (row.label, seed) not in done
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    with get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for run in pool.imap_unordered(measure, [(row, seed, settings) for row, seed in wanted]):
            kept.append(run)
            if options.json:
                shared = {
                    **asdict(settings),
                    "text": options.text.name,
                    "calibration": options.calibration.name,
                }
                shared["model"] = Path(options.model).name
                contents = {"settings": shared, "machine": _machine(), "runs": kept}
                options.json.write_text(json.dumps(contents, indent=1))
    print(f"{_machine()}\n\n{table(kept)}")


if __name__ == "__main__":
    main()
