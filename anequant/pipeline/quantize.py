"""One pass over a float checkpoint: fold, rotate, check, round, write; one layer in memory at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, HEAD_LINEAR, layer_prefix
from anequant.calibration.equivalence import EquivalenceProbe
from anequant.checkpoints.config import plain_config
from anequant.checkpoints.layout import checkpoint_entries, norm_names
from anequant.checkpoints.manifest import MANIFEST, manifest, published_config
from anequant.checkpoints.output import file_hashes, staged_folder
from anequant.checkpoints.quantized import store
from anequant.checkpoints.reader import INDEX, Checkpoint, open_checkpoint
from anequant.checkpoints.source import TOKENIZER_FILES, Source
from anequant.checkpoints.writer import CheckpointWriter, write_json
from anequant.errors import InputError, UnsupportedError
from anequant.progress import Progress, silent
from anequant.quantization.quantize import LARGEST_FLOAT16, quantize_linear
from anequant.recipe import Recipe
from anequant.rotation.fold import fold_and_rotate_layer, fold_and_rotate_linear, rotate_embedding
from anequant.rotation.plan import RotationPlan, plan_rotations

ROWS = 16384


@dataclass(frozen=True)
class TensorError:
    """How far one quantized weight is from its float original: ||W - W'|| / ||W||."""

    name: str
    bits: int
    relative_error: float


@dataclass(frozen=True)
class QuantizeResult:
    """`equivalence` is the largest relative logit change by folding and rotation, before rounding."""

    equivalence: float
    bits_per_weight: float
    tensors: tuple[TensorError, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantize(
    source: Source, output: Path, recipe: Recipe, *, force: bool = False, progress: Progress = silent
) -> QuantizeResult:
    """Write the quantized checkpoint of `source` to the new folder `output`.

    Raises UsageError when `output` exists (without `force`), InputError or UnsupportedError for a model
    that cannot be read or handled, VerificationError when a check fails; nothing is left behind then.
    """
    with staged_folder(output, force=force, source=source.folder) as staging:
        return quantize_into(staging, source, recipe, progress)


def quantize_into(folder: Path, source: Source, recipe: Recipe, progress: Progress) -> QuantizeResult:
    """As `quantize`, into an existing empty folder."""
    checkpoint = open_checkpoint(source.folder)
    if checkpoint.is_quantized:
        raise InputError(
            f"'{source.folder}' is already quantized (it has output scales)",
            remedy="start from the original float checkpoint, or lower this one",
        )
    plan = plan_rotations(checkpoint.spec, recipe)
    entries = checkpoint_entries(checkpoint.spec, recipe)
    with CheckpointWriter(folder, entries) as writer:
        job = _Job(checkpoint, plan, recipe, writer, progress)
        result = job.run()
    write_json(folder / "config.json", plain_config(checkpoint.spec.config))
    count = sum(error.name != EMBEDDING and error.name != HEAD for error in result.tensors)
    write_json(folder / "quantization_config.json", published_config(checkpoint.spec, recipe, count))
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    progress("hash", 1.0)
    write_json(folder / MANIFEST, _manifest(folder, checkpoint, source, recipe, result))
    return result


class _Job:
    """The pass itself: what it reads, writes and has measured so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: RotationPlan,
        recipe: Recipe,
        writer: CheckpointWriter,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = checkpoint.spec
        self._plan = plan
        self._recipe = recipe
        self._writer = writer
        self._progress = progress
        self._probe = EquivalenceProbe(checkpoint, plan)
        self._errors: list[TensorError] = []
        self._bits = self._weights = 0

    def run(self) -> QuantizeResult:
        layers = self._spec.num_layers
        self._progress("embedding", 0.0)
        self._write_table(EMBEDDING, self._recipe.embedding_bits, self._embedding_blocks())
        for layer in range(layers):
            self._progress(f"layer {layer + 1} of {layers}", (layer + 1) / (layers + 2))
            self._write_layer(layer)
        self._progress("head", (layers + 1) / (layers + 2))
        self._writer.write(f"{FINAL_NORM}.weight", torch.ones(self._spec.hidden_size).half())
        self._write_table(HEAD, self._recipe.head_bits, self._head_blocks())
        equivalence = self._probe.relative_error()
        return QuantizeResult(equivalence, self._bits / self._weights, tuple(self._errors))

    def _write_layer(self, layer: int) -> None:
        original = self._checkpoint.layer(layer)
        turned = fold_and_rotate_layer(self._spec, original, self._plan, layer)
        self._probe.layer(layer, original, turned)
        prefix = layer_prefix(layer)
        for name in norm_names(self._spec):
            self._writer.write(prefix + name, float16(turned[name], prefix + name))
        for linear in self._spec.architecture.linears:
            bias = turned.get(f"{linear.name}.bias")
            weight = turned.pop(f"{linear.name}.weight").float()
            self._quantize(
                prefix + linear.name, weight, None if bias is None else bias.float(), self._recipe.bits
            )

    def _quantize(self, name: str, weight: Tensor, bias: Tensor | None, bits: int) -> None:
        projection = name not in (EMBEDDING, HEAD)
        quantized = quantize_linear(
            weight,
            bias,
            bits=bits,
            codebook=self._recipe.codebook,
            scales=self._recipe.scales if projection else "output",
            rounding=self._recipe.rounding,
            name=name,
        )
        tensors = store(name, quantized, bias=projection)
        error = _relative_error(tensors[f"{name}.weight"], weight)
        self._errors.append(TensorError(name, bits, error))
        self._count(weight, bits)
        for tensor_name, tensor in tensors.items():
            self._writer.write(tensor_name, tensor)

    def _write_table(self, name: str, bits: int, blocks: Iterator[Tensor]) -> None:
        """Embedding or head from float64 row blocks: as float16, or with one codebook and row scales."""
        if bits == 16:
            for block in blocks:
                self._writer.write(f"{name}.weight", float16(block, f"{name}.weight"))
                self._count(block, bits)
        else:
            table = torch.empty(self._spec.vocab_size, self._spec.hidden_size)
            for start, block in zip(range(0, table.shape[0], ROWS), blocks, strict=True):
                table[start : start + ROWS] = block
            self._quantize(name, table, None, bits)

    def _embedding_blocks(self) -> Iterator[Tensor]:
        for start in range(0, self._spec.vocab_size, ROWS):
            rows = self._checkpoint.read(f"{EMBEDDING}.weight", slice(start, start + ROWS))
            yield rotate_embedding(rows, self._plan)

    def _head_blocks(self) -> Iterator[Tensor]:
        gain = self._checkpoint.final_gain()
        self._probe.final_norm(gain)
        for start in range(0, self._spec.vocab_size, ROWS):
            rows = self._checkpoint.read(self._checkpoint.head_name, slice(start, start + ROWS))
            turned, _ = fold_and_rotate_linear(HEAD_LINEAR, rows, None, gain, self._plan, None)
            self._probe.head(rows, turned)
            yield turned

    def _count(self, weight: Tensor, bits: int) -> None:
        self._bits += weight.numel() * bits
        self._weights += weight.numel()


def _relative_error(stored: Tensor, weight: Tensor) -> float:
    """||stored - weight|| / ||weight||, squares summed in float64 over row blocks."""
    difference = size = 0.0
    for ours, original in zip(torch.split(stored, ROWS), torch.split(weight, ROWS), strict=True):
        difference += float((ours.float() - original).square_().sum(dtype=torch.float64))
        size += float(original.square().sum(dtype=torch.float64))
    return math.sqrt(difference / max(size, 1e-60))


def float16(values: Tensor, name: str) -> Tensor:
    """Narrow to float16; raises UnsupportedError naming the tensor when a value does not fit."""
    largest = max(abs(float(end)) for end in values.aminmax())
    if largest > LARGEST_FLOAT16:
        raise UnsupportedError(f"'{name}' holds {largest:.3g}, float16 ends at 65504")
    return values.half()


def _manifest(
    folder: Path, checkpoint: Checkpoint, source: Source, recipe: Recipe, result: QuantizeResult
) -> dict[str, Any]:
    index = [INDEX] if (source.folder / INDEX).is_file() else []
    read = ["config.json", *index, *(shard.name for shard in checkpoint.shards)]
    return manifest(
        "checkpoint",
        {
            "recipe": recipe.to_dict(),
            "source": {
                "name": source.name,
                "revision": source.revision,
                "files": file_hashes(source.folder, read),
            },
            "measured": result.to_dict(),
            "files": file_hashes(folder),
        },
    )
