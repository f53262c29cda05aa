"""All that decides the bytes of a job's output: an interrupted run resumes only where nothing changed."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from anequant.checkpoints.license import CARD, LICENSE_FILES
from anequant.checkpoints.manifest import MANIFEST
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.rotation_files import ROTATIONS
from anequant.checkpoints.source import TOKENIZER_FILES
from anequant.recipe import Calibration, LowerOptions, Recipe
from anequant.versions import installed_versions


def fingerprint(
    job: str,
    checkpoint: Checkpoint,
    name: str,
    recipe: Recipe | None = None,
    calibration: Calibration | None = None,
    rotations: Path | None = None,
    lowering: LowerOptions | None = None,
) -> dict[str, Any]:
    """All that decides the bytes that `job` makes of the model `name`.

    Weights are told by size and time of change, small files that are named by their content.
    """
    folder = checkpoint.folder
    names = [*checkpoint.files, *TOKENIZER_FILES, CARD, *LICENSE_FILES, MANIFEST, ROTATIONS]
    sources = {name: _state(folder / name) for name in names if (folder / name).is_file()}
    named = {"rotations": rotations}
    if calibration is not None:
        named["calibration file"] = Path(calibration.source)
    return {
        "job": job,
        "model": name,
        "recipe": recipe and recipe.to_dict(),
        "calibration": calibration and asdict(calibration),
        "lowering": lowering and asdict(lowering),
        "source": sources,
        **{key: _digest(path) for key, path in named.items() if path is not None},
        "versions": installed_versions(),
        "threads": torch.get_num_threads(),
    }


def _state(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} bytes of {stat.st_mtime_ns}"


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if os.path.isfile(path) else None
