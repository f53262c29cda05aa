"""Time and peak memory of lowering to Core AI, next to Apple's own exporter in the same run.

    python tools/measure/bench_coreai.py --json docs/measured/bench_coreai.json [--layers 24] [--work DIR]
        [--sources URL] [--cache DIR]

Each stage is a process of its own, from its start to its end:

    lower   `anequant lower --target coreai` of a quantized checkpoint of Qwen2.5-0.5B's shape (random
            weights, w4-nearest), with the default options: magnitudes, constants, 16 functions, hashes
    small   the same for the bundled model
    apple   apple/coreai-models' iOS exporter on the bundled model in float16, with a head of its own, for the
            same contexts and windows (`record_coreai_contract.py`); it neither rounds nor reads codes

Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measured import machine, when_and_where, write_json
from peer_environments import CACHE, COREAI_MODELS, OwnPeer, make_environment, run_peer
from random_checkpoint import write_random_checkpoint
from record_coreai_contract import HEADS, SOURCES, fetch_sources

from anequant.checkpoints.source import BUNDLED_MODEL
from anequant.lower_options import AssetOptions

WATCHED = """
import json, resource, subprocess, sys, time
begun = time.monotonic()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
spent = {"seconds": time.monotonic() - begun, "cpu_seconds": used.ru_utime + used.ru_stime}
print(json.dumps({**spent, "peak": used.ru_maxrss * 1024}))
"""


def watch(command: Sequence[str]) -> dict[str, float]:
    """Run a command; return its seconds, CPU seconds and the most bytes that one process of it held."""
    words = [sys.executable, "-c", WATCHED, *command]
    spent: dict[str, float] = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    return spent


def lower(model: Path, work: Path) -> dict[str, Any]:
    """Quantize a model, untimed, and lower it to Core AI."""
    anequant = str(Path(sys.executable).with_name("anequant"))
    checkpoint, bundle = work / f"{model.name}-checkpoint", work / f"{model.name}-bundle"
    quantize = [anequant, "quantize", str(model), "-o", str(checkpoint), "--recipe", "w4-nearest", "--quiet"]
    subprocess.run(quantize, check=True)
    spent = watch([anequant, "lower", str(checkpoint), "-o", str(bundle), "--target", "coreai", "--quiet"])
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    return {**spent, "bytes": size}


def export(sources: str, cache: Path, work: Path) -> dict[str, Any]:
    """Run Apple's exporter on the bundled model, with a head of its own."""
    fetched = work / "sources"
    fetched.mkdir()
    fetch_sources(sources, fetched)
    options = ("--context", str(AssetOptions.context), *HEADS[False])
    peer = OwnPeer(COREAI_MODELS, "coreai_models_peer.py", options)
    python = make_environment(COREAI_MODELS, cache)
    return run_peer(python, peer, BUNDLED_MODEL, fetched, work / "apple.aimodel")


def report(measured: dict[str, Any]) -> str:
    """The three stages in words, and the ratio of the last two."""
    stages = measured["stages"]
    big, small, apple = (stages[name] for name in ("lower", "small", "apple"))
    return (
        f"Qwen2.5-0.5B's shape with {measured['layers']} layers is lowered in {big['seconds']:.1f} s "
        f"({big['cpu_seconds']:.1f} s of CPU) and {big['peak'] / 1e9:.2f} GB, from codes on disk to "
        f"{big['bytes'] / 1e6:.0f} MB with hashes. For the bundled model, Apple's exporter took "
        f"{apple['seconds'] / small['seconds']:.1f} times as long as `anequant lower` in the same run "
        f"({apple['seconds']:.0f} s and {small['seconds']:.1f} s; it neither rounds nor reads codes). "
        f"{when_and_where(measured['machine'])}, by `python tools/measure/bench_coreai.py`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--sources", default=SOURCES)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        write_random_checkpoint(work / "shape", options.layers)
        stages = {
            "lower": lower(work / "shape", work),
            "small": lower(BUNDLED_MODEL, work),
            "apple": export(options.sources, options.cache, work),
        }
    keys = ("seconds", "cpu_seconds", "peak", "bytes")
    kept = {name: {key: stage[key] for key in keys if key in stage} for name, stage in stages.items()}
    measured = {"layers": options.layers, "machine": machine(), "stages": kept}
    write_json(options.json, measured)
    print(report(measured))


if __name__ == "__main__":
    main()
