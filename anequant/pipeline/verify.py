"""What was written is what was meant: checkpoints and packages are read back from disk and compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, HEAD, layer_prefix
from anequant.calibration.forward import logits
from anequant.checkpoints.layers import open_quantized
from anequant.checkpoints.manifest import MANIFEST, read_manifest
from anequant.checkpoints.output import file_hashes
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.coreml.interpreter import Package, PalettizedWeight
from anequant.coreml.meta import read_meta
from anequant.coreml.program import head_part, weight_value
from anequant.errors import UsageError, VerificationError
from anequant.pipeline.folders import CHECKPOINT_FOLDER, PACKAGES_FOLDER
from anequant.pipeline.lower import checkpoint_hashes
from anequant.pipeline.probe import probe_tokens
from anequant.progress import Progress, silent
from anequant.quantization.linear import QuantizedLinear
from anequant.runtime.coreml_backend import PackageModel

PREFILL_TOKENS = 64
DECODE_TOKENS = 64
LEAST_AGREEMENT = 0.99
LARGEST_ERROR = 1e-2
FLOAT16_STEP = 2.0**-10
NOISE_FACTOR = 4.0


@dataclass(frozen=True)
class CheckpointCheck:
    """Quantized tensors whose stored weight equals what their codes, codebook and scales stand for."""

    tensors: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PackageCheck:
    """How the packages on disk compare with the checkpoint they were made from.

    weights         palettized constants equal to the checkpoint's codes and codebook, bit for bit
    positions       decode positions at which logits were compared
    agreement       share of them where the arg-max is the same
    ties            positions where it is not, but the checkpoint's two logits are closer than one float16
                    step or four times the position's root mean square difference: rounding decides there
    relative_error  largest logit difference over the largest logit
    """

    weights: int
    prefill_tokens: int
    positions: int
    agreement: float
    ties: int
    relative_error: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify_files(folder: Path) -> dict[str, Any]:
    """Compare every file with the hash in the folder's anequant.json; returns that manifest.

    Raises VerificationError naming the first file that is missing, changed or extra.
    """
    recorded = read_manifest(folder)
    expected = dict(recorded.get("files", {}))
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted(set(expected) - present):
        raise VerificationError(f"file '{name}' is missing", where=str(folder))
    for name in sorted(present - set(expected) - {MANIFEST}):
        raise VerificationError(f"file '{name}' is not one that anequant wrote", where=str(folder))
    for name, digest in file_hashes(folder, sorted(expected)).items():
        if digest != expected[name]:
            raise VerificationError(f"file '{name}' has changed since it was written", where=str(folder))
    return recorded


def verify_checkpoint(folder: Path, *, progress: Progress = silent) -> CheckpointCheck:
    """Check hashes, and that each stored weight is exactly output_scale * codebook[codes] * input_scale."""
    progress("hashes", 0.0)
    verify_files(folder)
    checkpoint = open_checkpoint(folder)
    names = [name.removesuffix(".codebook") for name in checkpoint.tensors if name.endswith(".codebook")]
    for number, name in enumerate(names):
        progress(name, number / len(names))
        quantized = load(name, checkpoint.read, checkpoint.tensors)
        if not torch.equal(checkpoint.read(f"{name}.weight"), quantized.dequantize().half()):
            raise VerificationError(f"the weight of '{name}' is not what its codes say", where=str(folder))
    return CheckpointCheck(len(names))


def verify_folder(
    folder: Path, checkpoint: Path | None = None, *, progress: Progress = silent
) -> tuple[CheckpointCheck | None, PackageCheck | None]:
    """Verify whatever anequant wrote to `folder`: a checkpoint, packages (with `checkpoint`), or both.

    Raises InputError for a folder that is none of these, VerificationError when a check fails.
    """
    kind = read_manifest(folder).get("kind")
    if kind == "checkpoint":
        return verify_checkpoint(folder, progress=progress), None
    if kind == "packages":
        if checkpoint is None:
            raise UsageError(
                f"'{folder}' holds packages only", remedy="name what they were made from with --checkpoint"
            )
        return None, verify_packages(folder, checkpoint, progress=progress)
    verify_files(folder)
    written = folder / CHECKPOINT_FOLDER
    return (
        verify_checkpoint(written, progress=progress),
        verify_packages(folder / PACKAGES_FOLDER, written, progress=progress),
    )


def verify_packages(folder: Path, checkpoint_folder: Path, *, progress: Progress = silent) -> PackageCheck:
    """Run the packages with the interpreter beside the checkpoint in transformers.

    Raises VerificationError when a file changed, a palettized weight differs from the checkpoint's codes
    in one bit, the functions of a package do not share their weights, or the logits are apart.
    """
    progress("hashes", 0.0)
    recorded = verify_files(folder)
    checkpoint = open_quantized(checkpoint_folder)
    if recorded.get("checkpoint") != checkpoint_hashes(checkpoint):
        raise VerificationError(f"the packages were not made from '{checkpoint_folder}'", where=str(folder))
    weights = _verify_weights(folder, checkpoint, progress)
    return _run_both(folder, checkpoint, weights, progress)


def _verify_weights(folder: Path, checkpoint: Checkpoint, progress: Progress) -> int:
    packages = read_meta(folder)
    quantized = _quantized_names(checkpoint, packages.head_parts)
    count = 0
    for number, package in enumerate(packages.package_names):
        progress(f"weights of {package}", 0.5 * number / len(packages.package_names))
        path = folder / f"{package}.mlpackage"
        opened = Package.open(path)
        offsets: dict[str, list[int | None]] = {}
        loaded = ""
        for _, value, weight in opened.palettized_weights():
            if value not in quantized:
                raise VerificationError(f"palettized weight '{value}' is unknown", where=str(path))
            name, part = quantized[value]
            if value not in offsets:
                if name != loaded:
                    whole, loaded = load(name, checkpoint.read, checkpoint.tensors), name
                _check_weight(value, weight, whole, part, str(path))
                count += 1
            offsets.setdefault(value, []).append(weight.offset)
        for value, places in offsets.items():
            if len(places) != len(opened.functions) or len(set(places)) != 1:
                raise VerificationError(
                    f"the functions of '{package}' do not share one copy of '{value}'", where=str(path)
                )
    expected = len(quantized)
    if count != expected:
        raise VerificationError(f"{count} palettized weights where {expected} are due", where=str(folder))
    return count


def _quantized_names(checkpoint: Checkpoint, head_parts: int) -> dict[str, tuple[str, slice]]:
    """What each palettized value of the packages holds: a quantized tensor's name, and which rows."""
    everything = slice(None)
    names = {}
    for layer in range(checkpoint.spec.num_layers):
        for linear in checkpoint.spec.architecture.linears:
            name = layer_prefix(layer) + linear.name
            names[weight_value(name)] = (name, everything)
    if f"{EMBEDDING}.codebook" in checkpoint.tensors:
        names[weight_value(EMBEDDING)] = (EMBEDDING, everything)
    if f"{HEAD}.codebook" in checkpoint.tensors:
        rows = checkpoint.spec.vocab_size // head_parts
        for part in range(head_parts):
            names[weight_value(head_part(part + 1))] = (HEAD, slice(part * rows, (part + 1) * rows))
    return names


def _check_weight(
    value: str, weight: PalettizedWeight, whole: QuantizedLinear, part: slice, where: str
) -> None:
    """Equal codes, and a codebook equal but for the power of two that headroom may have moved."""
    codes = whole.codes[part].numpy()
    if not np.array_equal(weight.codes.reshape(codes.shape), codes):
        raise VerificationError(f"the codes of '{value}' are not the checkpoint's", where=where)
    codebook = whole.codebook.half().numpy()
    stored = weight.codebook.reshape(-1)
    power = np.frexp(codebook[-1])[1] - np.frexp(stored[-1])[1]
    if not np.array_equal(np.ldexp(stored, power), codebook):
        raise VerificationError(f"'{value}' has not the checkpoint's one codebook", where=where)


def _run_both(folder: Path, checkpoint: Checkpoint, weights: int, progress: Progress) -> PackageCheck:
    """Feed whole blocks as a prompt, then one token after the other; compare from the prompt's end on."""
    model = PackageModel(folder)
    context, batch = model.packages.context, model.packages.batch
    prefill = max(min(PREFILL_TOKENS, context // 2) // batch, 1) * batch
    decode = min(DECODE_TOKENS, context - prefill)
    tokens = probe_tokens(checkpoint, prefill + decode)
    progress("checkpoint in transformers", 0.5)
    expected = next(logits(checkpoint, tokens[None]))[prefill - 1 :]
    ours = [model.feed(tokens[:prefill].tolist())]
    for step in range(decode):
        progress(f"decode {step + 1} of {decode}", 0.6 + 0.4 * step / decode)
        ours.append(model.feed([int(tokens[prefill + step])]))
    partial = model.packages.argmax
    return compare_logits(weights, prefill, torch.stack(ours), expected, str(folder), partial=partial)


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
