"""Where the time of a conversion goes: seconds of every stage, beside what the machine could do.

A random checkpoint of a model's shape is quantized with `w4-ane`, calibrated on 24 windows of 512 random
tokens, then with `w4-nearest`, and lowered, each in a process of its own. The functions that make up a stage
are timed from outside; one that runs within another stops the other's clock, so that the seconds add up. The
floor of a stage is what its matrix products take at the rate of this machine's best product of two float32
matrices (`numpy` and `torch` are tried), or its bytes at the rate of copying 128 MB;
`anequant/pipeline/steps/rounding.py` counts both.

    python tools/measure/bench_pipeline.py qwen2.5-0.5b --layers 24 --json docs/measured/pipeline.json
    python tools/measure/bench_pipeline.py llama-3-8b --layers 2 --json docs/measured/pipeline.json

A file that is there is added to. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measured import RESULTS, machine, when_and_where, write_json
from pipeline_stages import lower, quantize

# Only the standard library up here: a child's ru_maxrss starts at the size of the process it came from.

WINDOWS, LENGTH = 24, 512
TOKENS = "tokens.json"
RECIPES = ("w4-ane", "w4-nearest")


def rates() -> dict[str, float]:
    """Floating-point operations a second of torch's and numpy's products, and bytes a second of a copy."""
    import torch

    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    values, target = torch.zeros(1 << 25), torch.empty(1 << 25)

    def best(run: Callable[[], object], amount: float) -> float:
        run()
        times = []
        for _ in range(7):
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
        return amount / min(times)

    return {
        "torch": best(lambda: left @ right, 2 * 2048**3),
        "numpy": best(lambda: left.numpy() @ right.numpy(), 2 * 2048**3),
        "copy": best(lambda: target.copy_(values), 2 * 4 * values.numel()),
    }


def needed(model: Path, recipe: str) -> dict[str, tuple[float, float]]:
    """Floating-point operations and bytes that stages cannot do without."""
    from anequant.calibration.equivalence import PROBE_LENGTH
    from anequant.checkpoints.reader import open_checkpoint
    from anequant.pipeline.steps import rounding
    from anequant.recipe_files import load_recipe

    checkpoint, windows, chosen = open_checkpoint(model), (WINDOWS, LENGTH), load_recipe(recipe)
    spec, layers = checkpoint.spec, checkpoint.spec.num_layers
    stored = sum((checkpoint.folder / file).stat().st_size for file in checkpoint.files)
    layer = sum(math.prod(shape) for shape in spec.layer_tensors().values())
    tables = 2 * spec.vocab_size * spec.hidden_size
    result = {
        "read": (0.0, float(stored)),
        "fold and rotate": (0.0, 16.0 * (layers * layer + tables)),
        "probe": (2 * 2 * 2 * PROBE_LENGTH * (layers * layer + tables / 2), 0.0),
        "write": (0.0, 2.0 * (layers * layer + tables)),
    }
    if chosen.feeds_back:
        result |= {
            "forward": (layers * rounding.count_walking_work(spec, windows).flops, 0.0),
            "Hessians": (layers * rounding.count_moment_work(spec, windows).flops, 0.0),
            "rounding": (layers * rounding.count_gptq_work(spec, chosen).flops, 0.0),
        }
    return result


def child(step: str, model: Path, work: Path) -> dict[str, Any]:
    """A step in a process of its own: seconds of its stages, and its peak in bytes. What one of that name has
    written before is removed."""
    shutil.rmtree(work / step, ignore_errors=True)
    arguments = [sys.executable, __file__, "--child", step, str(model), str(work)]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def in_child(step: str, model: Path, work: Path) -> None:
    import anequant.pipeline.convert  # noqa: F401  (imports are not timed)

    if step == "rates":
        print(json.dumps(rates()))
        return
    if step == "model":
        make_model(model, work)
        print("{}")
        return
    import_model(model)
    begun = time.perf_counter()
    if step == "lower":
        run = lower(work / RECIPES[0], work / "packages")
    else:
        run = quantize(model, work / step, step, work / TOKENS)
    result = {
        "seconds": time.perf_counter() - begun,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "stages": run,
        "needed": {} if step == "lower" else needed(model, step),
    }
    print(json.dumps(result))


def import_model(model: Path) -> None:
    """What transformers imports when it first makes a model."""
    from anequant.checkpoints.reader import open_checkpoint
    from anequant.reference.empty_model import build_empty_model

    build_empty_model(open_checkpoint(model).spec)


def make_model(model: Path, work: Path) -> None:
    """Of the shape and with the layers that its name tells, and the tokens that calibrate."""
    from dataclasses import replace

    from measure_memory import SHAPES, write_random_model

    name, layers = model.name.rsplit("-", 1)
    shape = replace(SHAPES[name], layers=int(layers))
    write_random_model(model, shape)
    write_tokens(work, shape.vocab, WINDOWS)


def write_tokens(work: Path, vocabulary: int, windows: int) -> None:
    generator = random.Random(1)
    tokens = [[generator.randrange(vocabulary) for _ in range(LENGTH)] for _ in range(windows)]
    (work / TOKENS).write_text(json.dumps(tokens))


def measure(shape: str, layers: int, work: Path) -> dict[str, Any]:
    model = work / f"{shape}-{layers}"
    child("model", model, work)
    speed = child("rates", model, work)
    steps = {step: child(step, model, work) for step in (*RECIPES, "lower")}
    return {"shape": shape, "layers": layers, "rates": speed, "steps": steps, "machine": machine()}


def table(run: dict[str, Any]) -> str:
    """Of every step the stages: seconds, share, rate, floor and how far above it."""
    speed = run["rates"]
    product = max(speed["torch"], speed["numpy"])
    lines = [
        f"{run['shape']}, {run['layers']} layers: products at {product / 1e9:.0f} GFLOP/s (numpy "
        f"{speed['numpy'] / 1e9:.0f}, torch {speed['torch'] / 1e9:.0f}), copies at "
        f"{speed['copy'] / 1e9:.1f} GB/s.",
        "",
        "| step | stage | s | share | GFLOP/s | GB/s | floor, s | times the floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, step in run["steps"].items():
        total = step["seconds"]
        lines.append(f"| **{name}** | all, peak {step['peak'] / 1e9:.2f} GB | **{total:.0f}** | | | | | |")
        for stage, seconds in sorted(step["stages"].items(), key=lambda item: -item[1]):
            flops, moved = step["needed"].get(stage, (0.0, 0.0))
            floor = flops / product + moved / speed["copy"]
            cells = (
                f"{flops / seconds / 1e9:.0f}" if flops else "",
                f"{moved / seconds / 1e9:.2f}" if moved else "",
                f"{floor:.1f}" if floor else "",
                f"{seconds / floor:.1f}" if floor else "",
            )
            lines.append(f"| | {stage} | {seconds:.1f} | {seconds / total:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(measured: dict[str, Any]) -> str:
    """What docs/performance.md says of the runs."""
    about = when_and_where(measured["runs"][0]["machine"])
    return "\n\n".join([f"Measured on {about}.", *map(table, measured["runs"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", nargs="?", default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--json", type=Path, default=RESULTS / "pipeline.json")
    parser.add_argument("--work", type=Path, help="Folder for models and outputs; a temporary one without.")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        in_child(options.child[0], *map(Path, options.child[1:]))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        run = measure(options.shape, options.layers, Path(work))
    print(table(run))
    known = json.loads(options.json.read_text(encoding="utf-8"))["runs"] if options.json.is_file() else []
    same = (run["shape"], run["layers"])
    runs = [one for one in known if (one["shape"], one["layers"]) != same]
    write_json(options.json, {"runs": [*runs, run]})


if __name__ == "__main__":
    main()
