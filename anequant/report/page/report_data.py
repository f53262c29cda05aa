"""The data of a report, `report.json`: what the manifests say, and what is measured for it.

docs/report.md describes every key. A part that cannot be told is null, and `missing` says why.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anequant.architectures.spec import EMBEDDING, HEAD, ModelSpec
from anequant.checkpoints.manifest import CHECKPOINT, MANIFEST, keep_six_digits, read_manifest
from anequant.checkpoints.places import CHECKPOINT_FOLDER, PACKAGES_FOLDER, find_bundle
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import has_tokenizer
from anequant.errors import UsageError
from anequant.inspection.inspect_asset import AssetPort, inspect_recorded_asset
from anequant.inspection.inspect_package import inspect_package
from anequant.jobs.control import Progress
from anequant.jobs.machine import memory, usable_cores
from anequant.jobs.output_folder import hash_files
from anequant.pipeline.converting import measure_sample
from anequant.report.page.report_layers import Known, collect_layers
from anequant.targets.coreml.meta import read_meta
from anequant.targets.coreml.signatures import TensorSpec
from anequant.verification.files import CONVERSION

SCHEMA = 1
ALONE = "this is a checkpoint alone; convert and lower make"


def collect_report(folder: Path, known: Known, progress: Progress) -> dict[str, Any]:
    """Collect the report of an output of convert or quantize.

    Where the run or the float model is not known, a former report of the same checkpoint lends its part.
    Raises UsageError for another kind of folder, InputError for one that is damaged.
    """
    recorded = read_manifest(folder)
    kind = recorded.get("kind")
    if kind not in (CHECKPOINT, CONVERSION):
        raise UsageError(
            f"'{folder}' is no output of convert or quantize",
            where=f"{MANIFEST} says '{kind}'",
            remedy="name the folder of one of them",
        )
    whole = kind == CONVERSION
    checkpoint = open_checkpoint(folder / CHECKPOINT_FOLDER if whole else folder)
    made = read_manifest(checkpoint.folder) if whole else recorded
    identity = checkpoint_identity(checkpoint.folder)
    if known.former is not None and known.former["checkpoint"] != identity:
        known = replace(known, former=None)
    former = known.former or {}
    missing: dict[str, str] = {}
    quality = recorded["measured"]["quality"] if whole else _measure_quality(checkpoint, known, progress)
    quality = quality or former.get("quality")
    if quality is None:
        untold = "the model comes without a tokenizer"
        missing["quality"] = known.origin.missing if has_tokenizer(checkpoint.folder) else untold
    held = folder / PACKAGES_FOLDER
    packages = _packages(held) if whole and held.is_dir() else None
    asset = _asset(find_bundle(folder)) if whole else None
    if not whole:
        missing["packages"] = missing["lint"] = f"{ALONE} packages"
        missing["asset"] = f"{ALONE} an asset"
    elif packages is None:
        missing["packages"] = "they were not asked for (--target coreml or both)"
    elif asset is None:
        missing["asset"] = "it was not asked for (--target coreai or both)"
    run = known.run or former.get("run")
    if run is None:
        missing["run"] = "only convert, which measures them, tells time and memory"
    layers, unmeasured = collect_layers(checkpoint, made, known, progress.part("layers", 0.5, 1.0))
    rounding = made["measured"]
    data = {
        "schema": SCHEMA,
        "kind": kind,
        "checkpoint": identity,
        "model": _model(checkpoint.spec, made["source"]),
        "recipe": made["recipe"],
        "calibration": made["calibration"],
        "sizes": _sizes(checkpoint, packages, asset, rounding["bits_per_weight"]),
        "quality": quality,
        "equivalence": rounding["equivalence"],
        "tuning": rounding["tuning"],
        "rotations": rounding["rotations"],
        "verified": recorded["measured"]["verified"] if whole else None,
        "run": run,
        "packages": packages,
        "asset": asset,
        **layers,
        "tables": [item for item in rounding["tensors"] if item["name"] in (EMBEDDING, HEAD)],
        "lint": recorded["measured"]["lint"] if whole else None,
        "environment": _environment(made["versions"]),
        "missing": missing | unmeasured,
    }
    rounded: dict[str, Any] = keep_six_digits(data)
    return rounded


def _measure_quality(checkpoint: Checkpoint, known: Known, progress: Progress) -> dict[str, Any] | None:
    """Measure a checkpoint on the bundled text; None without the float model or a tokenizer."""
    source = known.origin.source
    if source is None or not has_tokenizer(source.folder):
        return None
    step = progress.part("quality", 0.0, 0.5)
    return measure_sample(open_checkpoint(source.folder), checkpoint.folder, step).to_dict()


def checkpoint_identity(folder: Path) -> str:
    """Return what tells two checkpoints apart: the hash of the manifest, which holds those of all files."""
    return hash_files(folder, [MANIFEST])[MANIFEST]


def _model(spec: ModelSpec, source: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": source["name"],
        "repo": source.get("repo"),
        "revision": source["revision"],
        "model_type": spec.architecture.model_type,
        "parameters": _parameters(spec),
        **spec.sizes,
        "input_groups": [[linear.name for linear in group] for group in spec.input_groups],
    }


def _parameters(spec: ModelSpec) -> int:
    """Count parameters as the checkpoint holds them, which always has a head of its own."""
    of_layer = sum(math.prod(shape) for shape in spec.layer_tensors().values())
    return sum(math.prod(shape) for shape in spec.outer_tensors().values()) + spec.num_layers * of_layer


def _sizes(
    checkpoint: Checkpoint, packages: dict[str, Any] | None, asset: dict[str, Any] | None, bits: float
) -> dict[str, Any]:
    return {
        "bits_per_weight": bits,
        "float16_bytes": 2 * _parameters(checkpoint.spec),
        "packages_bytes": packages and sum(item["bytes"] for item in packages["packages"]),
        "asset_bytes": asset and asset["bytes"],
        "checkpoint_bytes": sum(shard.stat().st_size for shard in checkpoint.shards),
    }


def _asset(bundle: Path | None) -> dict[str, Any] | None:
    """An asset by its record; None where there is none."""
    if bundle is None:
        return None
    facts = inspect_recorded_asset(bundle)
    language = (facts.bundle or {}).get("language", {})
    return {
        "name": facts.name,
        "bytes": sum(facts.files.values()),
        "constant_bytes": facts.blob_bytes,
        "bits": facts.bits,
        "context": language.get("max_context_length"),
        "functions": [
            {
                "name": function.name,
                **{
                    kind: [_port(port) for port in ports]
                    for kind, ports in (
                        ("inputs", function.inputs),
                        ("outputs", function.outputs),
                        ("states", function.states),
                    )
                },
            }
            for function in facts.functions or ()
        ],
    }


def _port(port: AssetPort) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype, "shape": list(port.shape), "shapes": []}


def _packages(folder: Path) -> dict[str, Any]:
    packages = read_meta(folder)
    found = []
    for name in packages.package_names:
        facts = inspect_package(folder / f"{name}.mlpackage")
        functions = [
            {
                "name": function.name,
                **{
                    kind: [_tensor(tensor, function.enumerated) for tensor in values]
                    for kind, values in (
                        ("inputs", function.inputs),
                        ("outputs", function.outputs),
                        ("states", function.states),
                    )
                },
            }
            for function in facts.functions
        ]
        size = sum(facts.files.values())
        found.append({"name": facts.name, "bytes": size, "bits": facts.bits, "functions": functions})
    return {"context": packages.context, "batch": packages.batch, "packages": found}


def _tensor(tensor: TensorSpec, enumerated: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Any]:
    """Return a tensor's form; `shapes` are the only ones, where there are several."""
    shapes = [list(shape) for shape in enumerated.get(tensor.name, ())]
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "shapes": shapes}


def _environment(versions: dict[str, str]) -> dict[str, Any]:
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory().total,
    }
