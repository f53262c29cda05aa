"""What is asked for: a model, how it is to be quantized and lowered, and what decides the bytes of that."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.calibration.equivalence import PROBE_LENGTH
from anequant.calibration.rotation_choice import check_rotations, matrices_from_file
from anequant.calibration.tokens import check_calibration
from anequant.checkpoints.layers import open_quantized
from anequant.checkpoints.layout import list_projections
from anequant.checkpoints.license import CARD, LICENSE_FILES
from anequant.checkpoints.manifest import MANIFEST, read_rotation_keys
from anequant.checkpoints.quantized import require_parts
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.rotation_files import ROTATIONS, read_rotations
from anequant.checkpoints.side_files import check_side_files
from anequant.checkpoints.source import TOKENIZER_FILES, Source
from anequant.lower_options import AssetOptions, LowerOptions, Targets
from anequant.quantization.online import plan_online
from anequant.recipe import Calibration, Recipe
from anequant.reference.forward import check_window
from anequant.reference.open_float import check_rotated, open_float
from anequant.versions import installed_versions

UNROTATED: dict[str, Any] = {"r1": "none", "r2": "none", "restarts": 1, "learn": 0}
"""What is left to rotate in a checkpoint that is rotated already."""


@dataclass(frozen=True, eq=False)
class Request:
    """A float model, and what is to be made of it.

    `rotations` is the file of an r1 or r2 of file; `lowering` is None where packages are not asked for, and
    `asset` where none of Core AI is; `tokens` [n, length] are those of `calibration` where somebody has them
    already.
    """

    source: Source
    recipe: Recipe
    calibration: Calibration = Calibration()  # noqa: RUF009
    rotations: Path | None = None
    lowering: LowerOptions | None = None
    tokens: Tensor | None = None
    asset: AssetOptions | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The source, opened once; raises as `open_float`."""
        return open_float(self.source)

    @cached_property
    def rotated_with(self) -> Mapping[str, Any] | None:
        """The recipe's keys that the source was rotated with already, None for any other source."""
        return read_rotation_keys(self.source.folder)

    @property
    def targets(self) -> Targets:
        return Targets(self.lowering, self.asset)

    @property
    def calibrates(self) -> bool:
        """Whether quantizing needs calibration tokens; a source that is rotated needs none for that."""
        recipe = self.recipe if self.rotated_with is None else replace(self.recipe, **UNROTATED)
        return recipe.calibrated

    def used_calibration(self, seen: Mapping[str, Any] | None) -> Calibration:
        """The calibration as far as it matters to the output; `seen` is None where no tokens were."""
        return Calibration() if seen is None and not self.recipe.tunes else self.calibration

    def check(self) -> None:
        """Refuse what quantizing would be refused for on its way, before a weight is read.

        Raises as `open_float`, `check_window` for the tokens of the equivalence check, `check_rotations`,
        `read_rotations`, `check_rotated`, `plan_online` and `check_calibration` do.
        """
        checkpoint = self.checkpoint
        check_window(checkpoint.spec, PROBE_LENGTH)
        if self.rotated_with is None:
            check_rotations(checkpoint.spec, self.recipe, self.rotations)
            if self.rotations is not None:
                read_rotations(self.rotations, matrices_from_file(checkpoint.spec, self.recipe))
        else:
            check_rotated(checkpoint, self.rotated_with, self.recipe, self.rotations)
        plan_online(checkpoint.spec, self.recipe)
        if self.calibrates:
            check_calibration(self.calibration, checkpoint)

    def fingerprint(self, job: str) -> dict[str, Any]:
        """All that decides the bytes that `job` makes of the request."""
        rotations = {} if self.rotations is None else {"rotations": _hash_file(self.rotations)}
        return {
            **_fingerprint(job, self.source.name, self.checkpoint),
            "recipe": self.recipe.to_dict(),
            "calibration": asdict(self.calibration),
            "calibration files": [_hash_file(Path(source)) for source in self.calibration.sources],
            "lowering": None if self.lowering is None else asdict(self.lowering),
            **({} if self.asset is None else {"asset": asdict(self.asset)}),
            **rotations,
        }


@dataclass(frozen=True)
class LowerRequest:
    """A quantized checkpoint that is to be lowered; `called` is the model's name in the packages, None for
    the folder's."""

    folder: Path
    lowering: LowerOptions | AssetOptions
    called: str | None = None

    @property
    def name(self) -> str:
        return self.called or self.folder.resolve().name

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, opened once; raises as `open_quantized`."""
        return open_quantized(self.folder)

    def check(self) -> None:
        """Raises InputError for a checkpoint that is not quantized, is incomplete, or has side files that
        cannot be read."""
        checkpoint = self.checkpoint
        check_side_files(self.folder)
        for projection in list_projections(checkpoint.spec):
            require_parts(projection, checkpoint.tensors)

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the bytes of the packages."""
        unasked = {"recipe": None, "calibration": None}
        made = _fingerprint("lower", self.name, self.checkpoint)
        return {**made, **unasked, "lowering": asdict(self.lowering)}


def _fingerprint(job: str, name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What of the model `name` and of this installation decides bytes.

    Weights are told by size and time of change.
    """
    folder = checkpoint.folder
    names = [*checkpoint.files, *TOKENIZER_FILES, CARD, *LICENSE_FILES, MANIFEST, ROTATIONS]
    return {
        "job": job,
        "model": name,
        "source": {name: _state(folder / name) for name in names if (folder / name).is_file()},
        "versions": installed_versions(),
        "threads": torch.get_num_threads(),
    }


def _state(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} bytes of {stat.st_mtime_ns}"


def _hash_file(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if os.path.isfile(path) else None
