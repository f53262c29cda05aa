"""Peak memory as `anequant plan` predicts it and as a run then takes it, on models of several shapes.

    python tools/measure/measure_memory.py run [MODEL ...] [--work FOLDER]   predicted, measured, their ratio
    python tools/measure/measure_memory.py limited [--layers 4 12]           under RLIMIT_DATA at that peak

With --json docs/measured/memory.json what is measured takes the place of what that file says of the same:
`run` or `limited`.
Measured is ru_maxrss of the child that does the work. This process stays small, since a child starts with
the peak of what it was forked from. RLIMIT_DATA counts private writable memory, used or not; RLIMIT_AS would
also count mapped shards, libraries and thread stacks, none of which the machine has to hold.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from measured import REPOSITORY, machine, write_json

BUNDLED = REPOSITORY / "anequant" / "bundled" / "tiny-qwen2"
SHARED = Path(os.environ.get("ANEQUANT_SHARED", REPOSITORY.parent / "shared"))
SEED = 2026
NEAREST, GPTQ = "w4-nearest", "w4-ane"
RANDOM_CALIBRATION = ("--calib-samples", "24", "--calib-length", "512")


@dataclass(frozen=True)
class Shape:
    """model_type, hidden and intermediate size, heads, key-value heads, vocabulary, layers."""

    model_type: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    layers: int


SHAPES = {
    "small": Shape("llama", 1024, 4096, 16, 4, 32768, 4),
    "qwen2.5-0.5b": Shape("qwen2", 896, 4864, 14, 2, 151936, 2),
    "qwen2.5-0.5b-layers": Shape("qwen2", 896, 4864, 14, 2, 8192, 2),
    "qwen2.5-1.5b": Shape("qwen2", 1536, 8960, 12, 2, 151936, 2),
    "llama-3-8b": Shape("llama", 4096, 14336, 32, 8, 128256, 2),
    "llama-3-70b": Shape("llama", 8192, 28672, 64, 8, 128256, 80),
}


def config_of(shape: Shape) -> dict[str, Any]:
    """config.json of a model of that shape."""
    return {
        "model_type": shape.model_type,
        "architectures": [f"{shape.model_type.capitalize()}ForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }


def write_random_model(folder: Path, shape: Shape, *, rows: int = 4096, holes: bool = False) -> None:
    """A float16 checkpoint with an untied head, written some rows at a time; the same bytes every time. With
    `holes` it is headers alone."""
    import torch

    from anequant.architectures import read_spec
    from anequant.checkpoints.writer import CheckpointWriter, Entry, write_json

    config = config_of(shape)
    spec = read_spec(config, str(folder))
    shapes = dict(spec.outer_tensors())
    for layer in range(spec.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": size for name, size in spec.layer_tensors().items()}
    generator = torch.Generator().manual_seed(SEED)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    if holes:
        write_holes(folder / "model.safetensors", shapes)
        return
    entries = [Entry(name, torch.float16, size) for name, size in shapes.items()]
    with CheckpointWriter(folder, entries) as writer:
        for entry in entries:
            for start in range(0, entry.shape[0], rows):
                size = (min(rows, entry.shape[0] - start), *entry.shape[1:])
                values = torch.randn(size, generator=generator) * 0.02
                writer.write(entry.name, (values + ("norm" in entry.name)).half())


def write_holes(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of float16 tensors that takes no room on disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        target.truncate(8 + len(text) + end)


@dataclass(frozen=True)
class Run:
    """A finished child: its exit code, its peak resident bytes and its seconds."""

    code: int
    peak: int
    seconds: float


def run_child(arguments: Sequence[str], data_limit: int | None = None) -> Run:
    """`python arguments...` with nothing on stdout; `data_limit` is its RLIMIT_DATA in bytes."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if data_limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))
        os.execv(sys.executable, [sys.executable, *arguments])
    _, status, usage = os.wait4(pid, 0)
    return Run(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, time.monotonic() - start)


def in_child(work: Callable[[], None]) -> None:
    """Do it without making this process large."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, "the child failed"


def cli(*arguments: str) -> list[str]:
    return ["-c", "from anequant.cli import main; main()", *arguments]


def planned(model: Path, *options: str) -> dict[str, Any]:
    """What `anequant plan --json` says, by a process of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.execv(sys.executable, [sys.executable, *cli("plan", str(model), "--json", *options)])
    os.close(write)
    with os.fdopen(read) as output:
        text = output.read()
    os.waitpid(pid, 0)
    plan: dict[str, Any] = json.loads(text.splitlines()[-1])
    return plan


def compare(name: str, model: Path, work: Path, command: str, *options: str) -> dict[str, Any]:
    """Run `command` on a model; its planned peak and its measured one, in bytes, and their ratio."""
    plan = planned(model, *options)
    predicted = plan["peak_bytes"] if command == "convert" else plan["peak_bytes_by_step"][command]
    output = work / "output"
    run = run_child(cli(command, str(model), "-o", str(output), "--quiet", *options))
    shutil.rmtree(output, ignore_errors=True)
    ratio = predicted / run.peak
    label = f"{name} {command} {' '.join(options)}"
    print(f"{label:<90} {predicted / 1e6:7.0f} MB {run.peak / 1e6:7.0f} MB {ratio:5.2f}", flush=True)
    assert run.code == 0, f"{label} ended with {run.code}"
    return {"job": label, "planned": predicted, "peak": run.peak, "ratio": ratio, "seconds": run.seconds}


def compare_all(work: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The models that are asked for, or all."""
    known: dict[str, tuple[tuple[str, ...], ...]] = {
        "tiny-qwen2": (("quantize", NEAREST), ("quantize", GPTQ), ("convert", GPTQ)),
        "qwen2-29m": (("quantize", NEAREST), ("quantize", GPTQ), ("convert", NEAREST)),
        "small": (("quantize", NEAREST), ("convert", NEAREST)),
        "qwen2.5-0.5b": (("quantize", NEAREST), ("quantize", GPTQ), ("convert", NEAREST)),
        "llama-3-8b": (("quantize", NEAREST),),
    }
    print(f"{'model and job':<90} {'planned':>10} {'measured':>10} ratio")
    found = []
    for name in names or known:
        model = {"tiny-qwen2": BUNDLED, "qwen2-29m": SHARED / "models" / name}.get(name, work / name)
        if not model.is_dir():
            in_child(partial(write_random_model, model, SHAPES[name]))
        for command, recipe in known[name]:
            options = ("--recipe", recipe, *(RANDOM_CALIBRATION if recipe == GPTQ else ()))
            found.append(compare(name, model, work, command, *options))
    return found


def limited_run(model: Path, output: Path, data_limit: int | None = None) -> tuple[int, Run]:
    """Quantize with RLIMIT_DATA, by default the planned peak; that, and how it went."""
    peak: int = data_limit or planned(model, "--recipe", NEAREST)["peak_bytes_by_step"]["quantize"]
    arguments = ("quantize", str(model), "-o", str(output), "--quiet", "--recipe", NEAREST)
    run = run_child(cli(*arguments), peak)
    shutil.rmtree(output, ignore_errors=True)
    return peak, run


def limited(work: Path, layers: Sequence[int]) -> list[dict[str, Any]]:
    """A Llama-3-8B of so many layers, quantized with RLIMIT_DATA at its planned peak."""
    found = []
    for count in layers:
        model = work / f"llama-3-8b-{count}"
        if not model.is_dir():
            shape = replace(SHAPES["llama-3-8b"], layers=count)
            in_child(partial(write_random_model, model, shape))
        limit, run = limited_run(model, work / "output")
        shutil.rmtree(model)
        print(
            f"{count} layers: RLIMIT_DATA {limit / 1e9:.2f} GB, peak {run.peak / 1e9:.2f} GB, "
            f"exit {run.code}, {run.seconds:.0f} s",
            flush=True,
        )
        assert run.code == 0, f"{count} layers ended with {run.code}"
        found.append({"layers": count, "limit": limit, "peak": run.peak, "seconds": run.seconds})
    return found


def sentences(measured: Mapping[str, Any]) -> str:
    """What a file's measurements are, in words."""
    limits, jobs = measured["limited"]["runs"], measured["run"]["runs"]
    layers = " and with ".join(str(run["layers"]) for run in limits)
    most, peak = (max(run[key] for run in limits) / 1e9 for key in ("limit", "peak"))
    ratios = [run["ratio"] for run in jobs]
    dates = {what: measured[what]["machine"]["date"] for what in measured}
    return (
        f"A Llama-3-8B's shapes with {layers} layers and the whole vocabulary were quantized (`{NEAREST}`) "
        f"with the data segment limited to the {most:.1f} GB that `plan` had said, at a peak of {peak:.1f} "
        f"GB (`python tools/measure/measure_memory.py limited`, {dates['limited']}). On {len(ratios)} jobs "
        f"of models from 3M to 8B shapes the planned peak was {min(ratios):.2f} to {max(ratios):.2f} of the "
        f"measured one (`python tools/measure/measure_memory.py run`, {dates['run']})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "limited"))
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--work", type=Path, help="where random models go, 25 GB for 12 layers")
    parser.add_argument("--json", type=Path, help="also keep what was measured there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="anequant-memory-") as scratch:
        work = arguments.work or Path(scratch)
        if arguments.what == "run":
            found = compare_all(work, arguments.models)
        else:
            found = limited(work, arguments.layers)
    if arguments.json is not None:
        before = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        write_json(arguments.json, {**before, arguments.what: {"machine": machine(), "runs": found}})


if __name__ == "__main__":
    main()
