"""A model of Llama-3-8B's shapes, quantized and lowered here and by a cluster of two workers: seconds and
bytes.

    python tools/measure/bench_cluster.py --json docs/measured/cluster.json [--layers 4] [--work DIR]

The cluster's bytes have to be those of one thread here, as its workers have one each. For comparison the same
is also done here on all cores. The vocabulary is a small one, as head and embedding stay in float16.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distributed import LocalCluster
from measure_memory import SHAPES, write_random_model
from measured import PACKAGES, machine, when_and_where, write_json

from anequant.jobs.output_folder import hash_files

WORKERS, VOCABULARY, RECIPE = 2, 8192, "w4-nearest"
SIZES = ("--context", "512", "--chunks", "4", "--max-chunk-mb", "4000")
TASKS = re.compile(r"(\d+) tasks? done by worker")


def anequant(threads: int, words: Sequence[str | Path]) -> tuple[float, list[int]]:
    """Seconds of a command in a process of its own, and how many tasks each worker did."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", "from anequant.cli import main; main()", *map(str, words)]
    begun = time.monotonic()
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return time.monotonic() - begun, sorted(map(int, TASKS.findall(ran.stderr)))


def convert(model: Path, folder: Path, threads: int, *options: str) -> dict[str, Any]:
    """Both steps: their seconds, and the tasks of their workers."""
    checkpoint, packages = folder / "checkpoint", folder / "packages"
    result: dict[str, Any] = {"threads": threads, "seconds": {}, "tasks": {}}
    commands: dict[str, list[str | Path]] = {
        "quantize": [model, "-o", checkpoint, "--recipe", RECIPE],
        "lower": [checkpoint, "-o", packages, *SIZES],
    }
    for step, words in commands.items():
        result["seconds"][step], result["tasks"][step] = anequant(threads, [step, *words, *options])
    return result


def measure(work: Path, layers: int) -> dict[str, Any]:
    shape = replace(SHAPES["llama-3-8b"], layers=layers, vocab=VOCABULARY)
    model = work / "model"
    write_random_model(model, shape)
    runs = {
        "here": convert(model, work / "here", 1),
        "here, all cores": convert(model, work / "cores", os.cpu_count() or 1),
    }
    with LocalCluster(
        n_workers=WORKERS,
        threads_per_worker=1,
        memory_limit=0,
        dashboard_address=None,
        local_directory=str(work / "dask"),
    ) as cluster:
        address = cluster.scheduler_address.replace("tcp://", "dask://")
        runs["cluster"] = convert(model, work / "cluster", 1, "--scheduler", address)
    if hash_files(work / "cluster") != hash_files(work / "here"):
        raise SystemExit("the cluster's bytes are not those of this process")
    return {
        "shape": asdict(shape),
        "recipe": RECIPE,
        "workers": WORKERS,
        "runs": runs,
        "same_bytes": True,
        "machine": machine((*PACKAGES, "distributed")),
    }


def sentences(measured: dict[str, Any]) -> str:
    """What docs/cluster.md says of a run."""
    rows = ["| | threads | quantize, s | lower, s | tasks of each worker |", "|---|---|---|---|---|"]
    for name, run in measured["runs"].items():
        times = " | ".join(f"{run['seconds'][step]:.0f}" for step in ("quantize", "lower"))
        tasks = "; ".join(", ".join(map(str, counts)) for counts in run["tasks"].values() if counts)
        rows.append(f"| {name} | {run['threads']} | {times} | {tasks} |")
    shape = measured["shape"]
    about = (
        f"{shape['layers']} layers of Llama-3-8B's shapes, `{measured['recipe']}`, "
        f"{measured['workers']} workers of one thread: the bytes are those of one thread "
        f"here. {when_and_where(measured['machine'])}."
    )
    return "\n".join([about, "", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--work", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        measured = measure(Path(work), arguments.layers)
    write_json(arguments.json, measured)
    for name, run in measured["runs"].items():
        seconds = ", ".join(f"{step} {value:.0f} s" for step, value in run["seconds"].items())
        print(f"{name}: {seconds}; tasks {run['tasks']}")


if __name__ == "__main__":
    main()
