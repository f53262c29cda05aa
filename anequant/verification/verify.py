"""What was written is what was meant: checkpoints and packages are read back from disk and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.checkpoints.layers import open_quantized
from anequant.checkpoints.manifest import CHECKPOINT, ROTATED, hash_checkpoint
from anequant.checkpoints.places import CHECKPOINT_FOLDER, PACKAGES_FOLDER
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.errors import UsageError, VerificationError
from anequant.jobs.control import Progress, silent
from anequant.reference.forward import logits
from anequant.reference.windows import DECODE_TOKENS, PREFILL_TOKENS, choose_probe_tokens
from anequant.runtime.coreml_backend import package_by_package
from anequant.targets.coreml.interpreter.interpreter import Package
from anequant.targets.coreml.meta import read_meta
from anequant.targets.coreml.storage import damage
from anequant.targets.shared.headroom import attention_moved
from anequant.verification.hashes import (
    CONVERSION,
    PACKAGES,
    failing,
    recipe_of,
    verify_files,
    written_manifest,
)
from anequant.verification.package_files import verify_package_folder
from anequant.verification.package_weights import verify_constants
from anequant.verification.stored_tensors import verify_layout, verify_numbers, verify_static_scales

LEAST_AGREEMENT = 0.99
LARGEST_ERROR = 1e-2
FLOAT16_STEP = 2.0**-10
NOISE_FACTOR = 4.0
LARGEST_ROUNDING = 2.0
NOTED_SHIFT = 0.02
"""Of a token's attention: random models came out apart from 0.04 on, and none below 0.03."""


@dataclass(frozen=True)
class CheckpointCheck:
    """Quantized tensors whose stored weight equals what their codes, codebook and scales stand for."""

    tensors: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PackageCheck:
    """How the packages on disk compare with the checkpoint they were made from.

    weights         compressed constants equal to the checkpoint's codes, codebook and scales, bit for bit
    positions       decode positions at which logits were compared
    agreement       share of them where the arg-max is the same
    ties            positions where it is not, but the checkpoint's two logits are closer than one float16
                    step or four times the position's root mean square difference: rounding decides there
    relative_error  largest logit difference over the largest logit
    rounding        where activations are rounded, the numbers above are of a run without; this is the one of
                    `compare_rounding` with it, else None
    """

    weights: int
    prefill_tokens: int
    positions: int
    agreement: float
    ties: int
    relative_error: float
    rounding: float | None = None

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
        verify_layout(checkpoint, recipe_of(recorded), torch.float32 if rotated else torch.float16)
        verify_static_scales(checkpoint)
        names = [name.removesuffix(".codebook") for name in checkpoint.tensors if name.endswith(".codebook")]
        for number, name in enumerate(names):
            progress(name, number / len(names))
            verify_numbers(checkpoint, name)
    return CheckpointCheck(len(names))


def verify_folder(
    folder: Path, checkpoint: Path | None = None, *, progress: Progress = silent
) -> tuple[CheckpointCheck | None, PackageCheck | None]:
    """Verify whatever anequant wrote to `folder`: a checkpoint, packages (with `checkpoint`), or both.

    Raises InputError for a folder that is none of these, VerificationError when a check fails.
    """
    kind = written_manifest(folder)["kind"]
    if kind in (CHECKPOINT, ROTATED):
        return verify_checkpoint(folder, progress=progress), None
    if kind == PACKAGES:
        if checkpoint is None:
            verify_package_folder(folder)
            raise UsageError(
                f"'{folder}' holds packages only", remedy="name what they were made from with --checkpoint"
            )
        return None, verify_packages(folder, checkpoint, progress=progress)
    verify_files(folder, CONVERSION)
    written = folder / CHECKPOINT_FOLDER
    return (
        verify_checkpoint(written, progress=progress),
        verify_packages(folder / PACKAGES_FOLDER, written, progress=progress),
    )


def verify_packages(folder: Path, checkpoint_folder: Path, *, progress: Progress = silent) -> PackageCheck:
    """Run the packages with the interpreter beside the checkpoint in transformers.

    Raises VerificationError when a file changed, a compressed weight differs from the checkpoint's codes
    in one bit, the functions of a package do not share their weights, inputs are not rounded and turned as
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
            return _run_both(folder, checkpoint, weights, progress)
        except VerificationError as error:
            cause = _coarse_attention(recorded["headroom"]["ranges"])
            if cause is None:
                raise
            raise VerificationError(
                error.what, where=error.where, remedy=f"{error.remedy}; {cause}"
            ) from error


def _coarse_attention(ranges: Sequence[Mapping[str, Any]]) -> str | None:
    """The layer whose scores float16 moves most, as `lower` measured it; None where that is little."""
    worst = max(ranges, key=lambda layer: layer.get("attention", 0.0))
    share = worst.get("attention", 0.0)
    return attention_moved(worst["layer"], worst["scores"], share) if share > NOTED_SHIFT else None


def _run_both(folder: Path, checkpoint: Checkpoint, weights: int, progress: Progress) -> PackageCheck:
    """Feed whole blocks as a prompt, then one token after the other; compare from the prompt's end on."""
    online = checkpoint.online
    packages = read_meta(folder)
    context, batch = packages.context, packages.batch
    prefill = max(min(PREFILL_TOKENS, context // 2) // batch, 1) * batch
    decode = min(DECODE_TOKENS, context - prefill)
    tokens = choose_probe_tokens(checkpoint, prefill + decode)
    progress("checkpoint in transformers", 0.5)
    running = progress.part("run", 0.6, 1.0)
    plain = next(logits(replace(checkpoint, online=online.rotations), tokens[None]))[prefill - 1 :]
    result = compare_logits(
        weights,
        prefill,
        package_by_package(folder, tokens, prefill, running, partial(Package.open, rounding=False)),
        plain,
        str(folder),
        partial=packages.argmax,
    )
    if not online.activations:
        return result
    expected = next(logits(checkpoint, tokens[None]))[prefill - 1 :]
    ours = package_by_package(folder, tokens, prefill, running)
    return replace(result, rounding=compare_rounding(ours, expected, plain, str(folder)))


def compare_rounding(ours: Tensor, expected: Tensor, plain: Tensor, where: str) -> float:
    """How far logits [positions, vocab] are from the checkpoint's, over what rounding does to these.

    `plain` are the checkpoint's without rounded activations. Values next to a boundary round either way, and
    after a few layers two machines round as if independently: the ratio of root mean squares is then at most
    the root of 2 (it is 0.4 to 0.5 for transformers itself in float32 and float64). Raises VerificationError
    when it is more than LARGEST_ROUNDING.
    """
    known = ours != float("-inf")
    difference, rounding = (torch.where(known, part, 0) for part in (ours - expected, expected - plain))
    ratio = float(difference.square().sum().sqrt() / rounding.square().sum().sqrt().clamp_min(1e-30))
    if not ratio <= LARGEST_ROUNDING:
        raise VerificationError(
            "with rounded activations the packages' logits differ from the checkpoint's by "
            f"{ratio:.2f} times what rounding does to these",
            where=where,
            remedy=f"at most {LARGEST_ROUNDING} is accepted",
        )
    return ratio


def compare_logits(
    weights: int, prefill: int, ours: Tensor, expected: Tensor, where: str, *, partial: bool = False
) -> PackageCheck:
    """Judge logits [positions, vocab] against the checkpoint's; raises VerificationError when apart.

    With `partial`, a logit of -inf is one that the packages do not tell (arg-max heads).
    """
    best, choice = expected.max(-1)
    margin = best - expected.gather(-1, ours.argmax(-1, keepdim=True)).squeeze(-1)
    known = ours != float("-inf") if partial else torch.ones_like(ours, dtype=torch.bool)
    difference = torch.where(known, ours - expected, 0)
    noise = (difference.square().sum(-1) / known.sum(-1)).sqrt()
    ties = (margin > 0) & (margin < torch.maximum(best.abs() * FLOAT16_STEP, NOISE_FACTOR * noise))
    agreement = float((ours.argmax(-1) == choice).double().mean())
    error = float(difference.abs().max() / expected.abs().max())
    result = PackageCheck(weights, prefill, len(ours), agreement, int(ties.sum()), error)
    if not (agreement + result.ties / len(ours) >= LEAST_AGREEMENT and error <= LARGEST_ERROR):
        raise VerificationError(
            f"the packages' logits differ from the checkpoint's by {error:.2e} relative, "
            f"their arg-max agrees at {agreement:.1%} of {len(ours)} positions",
            where=where,
            remedy=f"at most {LARGEST_ERROR:.0e} and at least {LEAST_AGREEMENT:.0%} are accepted",
        )
    return result
