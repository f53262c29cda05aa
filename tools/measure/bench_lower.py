"""Time and peak memory of quantizing and lowering a Qwen2.5-0.5B, next to today's trace-and-palettize path.

Each stage runs in a process of its own, on random weights of that model's shape:

    quantize   anequant's whole pass over the float checkpoint, recipe w4-nearest: fold, rotate, check, fit,
               write; embedding and head included
    ours       the decoder stack of the quantized checkpoint to one saved package with the functions infer
               and prefill: codes read back from disk, MIL built, package written
    peer       the decoder stack as a torch module with 1x1 convolutions and a state: torch.jit.trace,
               coremltools.convert, palettize_weights (k-means, 4 bits, one codebook per tensor), package
               written; one decode function only
    grouped    the same with one codebook for 16 channels, with `--grouped` only, as it takes long

`ours` and `peer` are what a user waits for at that step, but they are not the same work. `ours` contains no
clustering: its codes come from disk, and finding them is part of `quantize`. `peer` clusters, emits one
function instead of two, and has no scale vectors. Neither has embedding or head. The peer gets its best
case: one codebook per tensor and float16 constants, for which coremltools has a fast exact k-means; no
worker pool; its random weights appear in memory, untimed, where ours are read from disk. Both run with one
OpenMP thread: neither gains much from two, and when other work holds the cores, threads that spin while
they wait for each other make times meaningless. `quantize` keeps the default. CPU seconds are listed for
the same reason. Imports come before the clock starts and are reported apart; peak memory is that of the
process, imports and mapped files included. Nothing is asserted here. Linux only.

    python tools/measure/bench_lower.py --json docs/measured/bench_lower.json [--layers 24] [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measured import machine, write_json

# Only the standard library up here: a child's ru_maxrss starts at the size of the process it came from.

CONTEXT, BATCH = 2048, 64
SEED = 2025
UNTIMED = ("imports", "random weights")

Lap = Callable[[str], None]
"""Gives the time since the last lap a name."""


@dataclass(frozen=True)
class Row:
    """One measured stage: wall and CPU seconds of the work, wall seconds of its steps and of the imports."""

    stage: str
    seconds: float
    cpu_seconds: float
    steps: dict[str, float]
    import_seconds: float
    peak_bytes: int
    disk_bytes: int


def checkpoint_stage(work: Path, layers: int, lap: Lap) -> Path:
    from random_checkpoint import write_random_checkpoint

    lap("imports")
    write_random_checkpoint(work / "float", layers)
    return work / "float"


def quantize_stage(work: Path, layers: int, lap: Lap) -> Path:
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  (the equivalence check runs it)

    from anequant.checkpoints.source import Source
    from anequant.pipeline.quantize import quantize
    from anequant.recipe_files import load_recipe
    from anequant.request import Request

    lap("imports")
    output = work / "quantized"
    quantize(Request(Source(work / "float", f"random-qwen2-{layers}"), load_recipe("w4-nearest")), output)
    lap("quantize")
    return output


def ours_stage(work: Path, layers: int, lap: Lap) -> Path:
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  (the RoPE tables come from it)

    from anequant.architectures.spec import FINAL_NORM
    from anequant.checkpoints.layers import load_layer
    from anequant.checkpoints.reader import open_checkpoint
    from anequant.targets.coreml.program.decoder import chunk_program
    from anequant.targets.coreml.program.package import save_package
    from anequant.targets.shared.geometry import Geometry
    from anequant.targets.shared.package_task import Chunk
    from anequant.targets.shared.rope_tables import compute_rope_tables

    lap("imports")
    package = work / "ours.mlpackage"
    checkpoint = open_checkpoint(work / "quantized")
    stack = tuple(load_layer(checkpoint, number) for number in range(layers))
    gain = checkpoint.read(f"{FINAL_NORM}.weight")
    lap("read codes")
    tables = compute_rope_tables(checkpoint.spec, CONTEXT)
    program = chunk_program(Chunk(Geometry(checkpoint.spec, CONTEXT, BATCH, *tables), stack, gain))
    lap("build")
    save_package(program, package, {})
    lap("convert and save")
    return package


def grouped_stage(work: Path, layers: int, lap: Lap) -> Path:
    return peer_stage(work, layers, lap, granularity="per_grouped_channel", group_size=16)


def peer_stage(work: Path, layers: int, lap: Lap, **choice: Any) -> Path:
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    import numpy as np
    import torch
    from random_checkpoint import HIDDEN
    from traced_peer import Stack

    lap("imports")
    torch.manual_seed(SEED)
    model = Stack(layers, CONTEXT).eval().requires_grad_(False)
    inputs = {
        "hidden_states": torch.zeros(1, 1, HIDDEN),
        "position_ids": torch.zeros(1, dtype=torch.int32),
        "causal_mask": torch.zeros(1, 1, 1, CONTEXT),
        "current_pos": torch.zeros(1, dtype=torch.int32),
    }
    lap("random weights")
    trace: Any = torch.jit.trace
    traced = trace(model, tuple(inputs.values()), check_trace=False)
    lap("trace")
    types = {torch.float32: np.float16, torch.int32: np.int32}
    state = ct.TensorType(shape=tuple(model.kv_cache.shape), dtype=np.float16)
    converted = ct.convert(
        traced,
        convert_to="mlprogram",
        inputs=[
            ct.TensorType(name, shape=tuple(example.shape), dtype=types[example.dtype])
            for name, example in inputs.items()
        ],
        outputs=[ct.TensorType("output_hidden_states", dtype=np.float16)],
        states=[ct.StateType(state, name="kv_cache")],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        compute_units=ct.ComputeUnit.CPU_AND_NE,
        skip_model_load=True,
    )
    del traced, model
    lap("convert")
    palettizer = cto.OpPalettizerConfig(mode="kmeans", nbits=4, **choice or {"granularity": "per_tensor"})
    palettized = cto.palettize_weights(converted, cto.OptimizationConfig(global_config=palettizer))
    lap("palettize")
    package = work / "peer.mlpackage"
    palettized.save(str(package))
    lap("save")
    return package


STAGES: dict[str, Callable[[Path, int, Lap], Path]] = {
    "checkpoint": checkpoint_stage,
    "quantize": quantize_stage,
    "ours": ours_stage,
    "peer": peer_stage,
    "grouped": grouped_stage,
}


def run_stage(stage: str, work: Path, layers: int) -> Row:
    """Run one stage in this process."""
    laps: dict[str, tuple[float, float]] = {}
    last = time.perf_counter(), time.process_time()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter(), time.process_time()
        laps[name] = now[0] - last[0], now[1] - last[1]
        last = now

    output = STAGES[stage](work, layers, lap)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    steps = {name: wall for name, (wall, _) in laps.items() if name not in UNTIMED}
    cpu = sum(laps[name][1] for name in steps)
    return Row(stage, sum(steps.values()), cpu, steps, laps["imports"][0], peak, size)


def spawn_stage(stage: str, work: Path, layers: int) -> Row:
    """Run one stage in a process of its own; raises SystemExit with its stderr when it fails."""
    print(f"{stage} ...", file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", stage]
    command += ["--layers", str(layers), "--work", str(work)]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if stage in ("ours", "peer", "grouped") else {})
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise SystemExit(f"stage '{stage}' failed\n{process.stderr}")
    return Row(**json.loads(process.stdout.splitlines()[-1]))


def benchmark(work: Path, layers: int, json_file: Path | None, *, grouped: bool) -> None:
    """Make the checkpoint, run the stages one after the other, print and write what they took."""
    spawn_stage("checkpoint", work, layers)
    left_out = {"checkpoint"} if grouped else {"checkpoint", "grouped"}
    rows = {stage: spawn_stage(stage, work, layers) for stage in STAGES if stage not in left_out}
    measured = {"layers": layers, "context": CONTEXT, "batch": BATCH, "machine": machine()}
    measured["stages"] = [asdict(row) for row in rows.values()]
    print(report(measured))
    if json_file is not None:
        write_json(json_file, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=24, help="decoder layers; the real model has 24")
    parser.add_argument("--work", type=Path, help="new or empty folder to use and keep; default: temporary")
    parser.add_argument("--json", type=Path, help="write the measurements here too")
    parser.add_argument("--grouped", action="store_true", help="also one codebook for 16 channels")
    parser.add_argument("--stage", choices=tuple(STAGES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        print(json.dumps(asdict(run_stage(arguments.stage, arguments.work, arguments.layers))))
    elif arguments.layers < 1:
        parser.error("--layers must be at least 1")
    elif arguments.work is None:
        with tempfile.TemporaryDirectory(prefix="bench-lower-") as folder:
            benchmark(Path(folder), arguments.layers, arguments.json, grouped=arguments.grouped)
    elif arguments.work.exists() and any(arguments.work.iterdir()):
        parser.error(f"'{arguments.work}' is not empty")
    else:
        benchmark(arguments.work, arguments.layers, arguments.json, grouped=arguments.grouped)


def report(measured: Mapping[str, Any]) -> str:
    """What a file's measurements are, as a Markdown table and in words."""
    rows = {row["stage"]: Row(**row) for row in measured["stages"]}
    lines = ["| stage | seconds | CPU seconds | imports, seconds | peak memory, MB | size on disk, MB |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in rows.values():
        times = f"{row.seconds:.1f} | {row.cpu_seconds:.1f} | {row.import_seconds:.1f}"
        lines.append(f"| {row.stage} | {times} | {row.peak_bytes / 1e6:.0f} | {row.disk_bytes / 1e6:.1f} |")
    said = [
        f"{peer} / ours: " + ", ".join(f"{name} {ratio:.1f}x" for name, ratio in _ratios(rows, peer).items())
        for peer in ("peer", "grouped")
        if peer in rows
    ]
    for stage in ("ours", "peer", "grouped"):
        if stage in rows:
            steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in rows[stage].steps.items())
            said.append(f"{stage}: {steps}")
    about = ", ".join(f"{name} {value}" for name, value in measured["machine"].items())
    sizes = f"{measured['layers']} layers, context {measured['context']}, prefill {measured['batch']}"
    words = f"{'. '.join(said)}. {sizes}; {about}."
    return "\n".join([*lines, "", words])


def _ratios(rows: Mapping[str, Row], stage: str) -> dict[str, float]:
    peer, ours = rows[stage], rows["ours"]
    return {
        "seconds": peer.seconds / ours.seconds,
        "CPU seconds": peer.cpu_seconds / ours.cpu_seconds,
        "peak memory": peer.peak_bytes / ours.peak_bytes,
    }


if __name__ == "__main__":
    main()
