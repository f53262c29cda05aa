"""What was written is what was meant: checkpoints and packages are read back from disk and compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anequant.checkpoints.layers import open_quantized
from anequant.checkpoints.manifest import CHECKPOINT, ROTATED, hash_checkpoint
from anequant.checkpoints.places import BUNDLE_FOLDER, BUNDLE_KIND, CHECKPOINT_FOLDER, PACKAGES_FOLDER
from anequant.checkpoints.reader import open_checkpoint
from anequant.errors import UsageError, VerificationError
from anequant.jobs.control import Progress, silent
from anequant.runtime.coreml_backend import run_package_by_package
from anequant.targets.coreml.interpreter.interpreter import Package
from anequant.targets.coreml.meta import read_meta
from anequant.targets.coreml.storage import damage
from anequant.targets.shared.agreement import LoweredModel, PackageCheck, compare_model
from anequant.targets.shared.headroom import describe_coarse_attention
from anequant.verification.assets import AssetCheck, verify_bundle
from anequant.verification.constants import verify_constants
from anequant.verification.files import (
    CONVERSION,
    PACKAGES,
    failing,
    read_checked_manifest,
    read_recorded_recipe,
    verify_files,
)
from anequant.verification.packages import verify_package_folder
from anequant.verification.tensors import verify_layout, verify_numbers, verify_static_scales


@dataclass(frozen=True)
class CheckpointCheck:
    """Quantized tensors whose stored weight equals what their codes, codebook and scales stand for."""

    tensors: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verification:
    """What was checked; None for the part that a folder does not hold."""

    checkpoint: CheckpointCheck | None = None
    packages: PackageCheck | None = None
    asset: AssetCheck | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify_checkpoint(folder: Path, *, progress: Progress = silent) -> CheckpointCheck:
    """Check hashes, then every tensor: its place, dtype, shape and range, and that each stored weight is
    exactly output_scale * codebook[codes] * input_scale."""
    progress("hashes", 0.0)
    recorded = verify_files(folder, CHECKPOINT, ROTATED)
    with failing(folder):
        checkpoint = open_checkpoint(folder)
        rotated = recorded["kind"] == ROTATED
        verify_layout(checkpoint, read_recorded_recipe(recorded), torch.float32 if rotated else torch.float16)
        verify_static_scales(checkpoint)
        names = [name.removesuffix(".codebook") for name in checkpoint.tensors if name.endswith(".codebook")]
        for number, name in enumerate(names):
            progress(name, number / len(names))
            verify_numbers(checkpoint, name)
    return CheckpointCheck(len(names))


def verify_folder(
    folder: Path, checkpoint: Path | None = None, *, progress: Progress = silent
) -> Verification:
    """Verify whatever anequant wrote to `folder`: a checkpoint, packages or an asset of Core AI (with
    `checkpoint`), or all of them.

    Raises InputError for a folder that is none of these, VerificationError when a check fails.
    """
    kind = read_checked_manifest(folder)["kind"]
    if kind in (CHECKPOINT, ROTATED):
        return Verification(checkpoint=verify_checkpoint(folder, progress=progress))
    if kind in (PACKAGES, BUNDLE_KIND):
        if checkpoint is None:
            if kind == PACKAGES:
                verify_package_folder(folder)
            only = "holds packages only" if kind == PACKAGES else "holds an asset only"
            raise UsageError(f"'{folder}' {only}", remedy="name what it was made from with --checkpoint")
        if kind == PACKAGES:
            return Verification(packages=verify_packages(folder, checkpoint, progress=progress))
        return Verification(asset=verify_bundle(folder, checkpoint, progress=progress))
    verify_files(folder, CONVERSION)
    written, packages, bundle = (
        folder / part for part in (CHECKPOINT_FOLDER, PACKAGES_FOLDER, BUNDLE_FOLDER)
    )
    lowered = packages if packages.is_dir() else None
    return Verification(
        verify_checkpoint(written, progress=progress),
        None if lowered is None else verify_packages(lowered, written, progress=progress),
        verify_bundle(bundle, written, lowered, progress=progress) if bundle.is_dir() else None,
    )


def verify_packages(folder: Path, checkpoint_folder: Path, *, progress: Progress = silent) -> PackageCheck:
    """Run the packages with the interpreter beside the checkpoint in transformers.

    Raises VerificationError when a file changed, a compressed weight differs from the checkpoint's codes
    in one bit, the functions of a package do not share their weights, inputs are not rounded and rotated as
    the checkpoint says, or the logits are apart.
    """
    progress("hashes", 0.0)
    recorded = verify_package_folder(folder)
    checkpoint = open_quantized(checkpoint_folder)
    if recorded.get("checkpoint") != hash_checkpoint(checkpoint):
        raise VerificationError(f"the packages were not made from '{checkpoint_folder}'", where=str(folder))
    with failing(folder), damage(str(folder)):
        weights = verify_constants(folder, checkpoint, progress)
        try:
            return compare_model(_open_lowered(folder), checkpoint, weights, progress)
        except VerificationError as error:
            cause = describe_coarse_attention(recorded["headroom"]["ranges"])
            if cause is None:
                raise
            raise VerificationError(
                error.what, where=error.where, remedy=f"{error.remedy}; {cause}"
            ) from error


def _open_lowered(folder: Path) -> LoweredModel:
    """Open the packages of a folder, to be run by the interpreter with one of them in memory at a time."""
    packages = read_meta(folder)
    unrounded = partial(Package.open, rounding=False)
    return LoweredModel(
        packages.context,
        packages.batch,
        packages.argmax,
        run=partial(run_package_by_package, folder),
        run_unrounded=partial(run_package_by_package, folder, open_package=unrounded),
        where=str(folder),
    )
