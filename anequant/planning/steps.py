"""The steps of quantizing, lowering and verifying, each with what it reads, writes, holds and computes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.calibration.tokens import SELF
from anequant.checkpoints.header import BITS, TensorInfo
from anequant.checkpoints.layout import checkpoint_entries, projection_names
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.source import has_tokenizer
from anequant.checkpoints.writer import DTYPE_NAMES
from anequant.evaluation.sample_size import SAMPLE_LENGTH, SAMPLE_WINDOWS
from anequant.planning import memory, work
from anequant.planning.baseline import samples_resident
from anequant.planning.work import Work
from anequant.quantization.linear import ROWS
from anequant.quantization.online import plan_online
from anequant.recipe import Calibration, LowerOptions, Recipe
from anequant.targets.shared.geometry import (
    count_head_parts,
    count_layer_bytes,
    count_table_bytes,
    count_vocabulary_bytes,
    find_least_chunks,
    split_layers,
)

QUANTIZE, LOWER, VERIFY = "quantize", "lower", "verify"
RESIDENT, STREAMED = "sample", "sample, reading the model for every token"
"""What sampling is called with the whole model in memory, and without."""

ROTATING, TUNE = "rotations", "tune"
RANGES, EMBEDDING_PACKAGE, HEAD_PACKAGE = "ranges", "embedding package", "head package"


@dataclass(frozen=True)
class Job:
    """One step: bytes read and written, its peak resident bytes with those of the imports, and what it
    computes."""

    step: str
    name: str
    bytes_in: int
    bytes_out: int
    peak: int
    work: Work


@dataclass(frozen=True)
class Disk:
    """Bytes written: those that stay, and the second copy of a package while it is written, or the checkpoint
    that is yet to be tuned."""

    checkpoint: int
    packages: int
    temporary: int

    @property
    def total(self) -> int:
        return self.checkpoint + self.packages + self.temporary


def disk(jobs: Sequence[Job]) -> Disk:
    quantized = sum(job.bytes_out for job in jobs if job.step == QUANTIZE and job.name != TUNE)
    packages = [job.bytes_out for job in jobs if job.step == LOWER]
    untuned = sum(job.bytes_out for job in jobs if job.name == TUNE)
    return Disk(quantized, sum(packages), max([untuned, *packages]))


def planned_checkpoint(
    checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype = torch.float16
) -> Checkpoint:
    """The checkpoint that quantizing writes, as its headers will say; `dtype` of what is not quantized."""
    spec = replace(checkpoint.spec, tied=False)
    width = recipe.bits if not recipe.target_bits else max(recipe.widths)
    entries = checkpoint_entries(spec, recipe, dict.fromkeys(projection_names(spec), width), dtype)
    tensors = {
        entry.name: TensorInfo(Path("model.safetensors"), DTYPE_NAMES[entry.dtype], entry.shape, 0)
        for entry in entries
    }
    return Checkpoint(checkpoint.folder, spec, tensors, plan_online(spec, recipe))


def _bytes(checkpoint: Checkpoint, *beginnings: str) -> int:
    """Of the tensors whose names begin so, once each."""
    found = (info for name, info in checkpoint.tensors.items() if name.startswith(beginnings))
    return sum(math.prod(info.shape) * BITS[info.dtype] // 8 for info in found)


def quantizing(
    checkpoint: Checkpoint,
    written: Checkpoint,
    recipe: Recipe,
    calibration: Calibration,
    base: int,
    max_memory: int | None,
) -> Iterator[Job]:
    spec = checkpoint.spec
    dtype = checkpoint.tensors[f"{EMBEDDING}.weight"].dtype
    source = BITS[dtype] // 8
    windows = (calibration.samples, calibration.length) if recipe.calibrated else None
    head = checkpoint.head_name.removesuffix(".weight")
    whole = _bytes(checkpoint, "model.", "lm_head.")
    if windows and calibration.source == SELF:
        resident = samples_resident(checkpoint, calibration, max_memory, base)
        peak = memory.sampling(spec, calibration, dtype, resident=resident)
        todo = work.sampling(spec, calibration, whole, resident=resident)
        yield Job(QUANTIZE, RESIDENT if resident else STREAMED, whole, 0, memory.resident(base, peak), todo)
    if windows and (recipe.r1 == "pca" or recipe.learn or recipe.restarts > 1):
        peak = memory.rotations(spec, recipe, windows, source)
        todo = work.rotations(spec, recipe, windows)
        yield Job(QUANTIZE, ROTATING, whole, 0, memory.resident(base, peak), todo)
    if windows and recipe.target_bits:
        peak = memory.sensitivity(spec, windows, source)
        yield Job(
            QUANTIZE,
            "sensitivity",
            whole,
            0,
            memory.resident(base, peak),
            work.forward(spec, windows, passes=4),
        )
    states = memory.states(spec, windows if recipe.feeds_back or recipe.static_activations else None)
    peak = memory.table(spec, recipe.embedding_bits, source, probe=False)
    turning = work.table(spec, recipe.embedding_bits)
    out = _bytes(written, f"{EMBEDDING}.")
    yield Job(
        QUANTIZE, "embedding", _bytes(checkpoint, f"{EMBEDDING}."), out, memory.resident(base, peak), turning
    )
    used = windows if recipe.feeds_back or recipe.static_activations else None
    for layer in range(spec.num_layers):
        prefix = layer_prefix(layer)
        name, peak = f"layer {layer + 1}", memory.layer(spec, recipe, used, source)
        sizes = _bytes(checkpoint, prefix), _bytes(written, prefix)
        yield Job(QUANTIZE, name, *sizes, memory.resident(base, peak), work.layer(spec, recipe, used))
    peak = states + memory.table(spec, recipe.head_bits, source, probe=True)
    sizes = _bytes(checkpoint, f"{head}.", FINAL_NORM), _bytes(written, f"{HEAD}.", FINAL_NORM)
    yield Job(QUANTIZE, "head", *sizes, memory.resident(base, peak), work.table(spec, recipe.head_bits))
    if recipe.tune:
        peak = memory.tuning(spec, (calibration.samples, calibration.length), source)
        size = _bytes(written, "model.", "lm_head.")
        todo = work.forward(spec, (calibration.samples, calibration.length), passes=3 * recipe.tune)
        yield Job(QUANTIZE, TUNE, size + whole, size, memory.resident(base, peak), todo)


def lowering(written: Checkpoint, options: LowerOptions, base: int) -> Iterator[Job]:
    """`written` is quantized: one that is there, or that is planned."""
    spec = written.spec
    everything = _bytes(written, "model.layers.")
    yield Job(LOWER, RANGES, everything, 0, memory.resident(base, memory.ranges(spec)), work.ranges(spec))
    sizes, shared = count_layer_bytes(written), count_table_bytes(spec, options.context, written.online)
    chunks = options.chunks or find_least_chunks(written, options.context, options.max_chunk_mb)
    layer = [math.prod(spec.shape(linear)) for linear in spec.architecture.linears]
    yield _table_job(written, EMBEDDING, base)
    for number, layers in enumerate(split_layers(spec.num_layers, chunks)):
        read = sum(_bytes(written, layer_prefix(index)) for index in layers)
        out = sum(sizes[index] for index in layers) + shared
        peak = memory.packed(layer * len(layers))
        name = f"chunk {number + 1} of {chunks}"
        yield Job(LOWER, name, read, out, memory.resident(base, peak), work.packing(len(layers) * sum(layer)))
    yield _table_job(written, HEAD, base)


def _table_job(written: Checkpoint, name: str, base: int) -> Job:
    spec, codebook = written.spec, written.tensors.get(f"{name}.codebook")
    size = spec.vocab_size * spec.hidden_size
    peak = ROWS * memory.FLOAT32 * spec.hidden_size if codebook is None else memory.packed([size])
    label = EMBEDDING_PACKAGE if name == EMBEDDING else HEAD_PACKAGE
    out = count_vocabulary_bytes(written, name)
    return Job(
        LOWER, label, _bytes(written, f"{name}."), out, memory.resident(base, peak), work.packing(size)
    )


def verifying(
    checkpoint: Checkpoint, written: Checkpoint, packages: list[Job], options: LowerOptions, base: int
) -> Iterator[Job]:
    spec, tensors = written.spec, written.tensors
    size = _bytes(written, "model.", "lm_head.")
    packages = [job for job in packages if job.bytes_out]
    weights = [math.prod(info.shape) for name, info in tensors.items() if f"{name[:-6]}codebook" in tensors]
    total = spec.num_layers * memory.layer_size(spec)
    yield Job(
        VERIFY,
        "checkpoint",
        2 * size,
        0,
        memory.resident(base, memory.stored(max(weights))),
        work.packing(2 * total),
    )
    chunks = len(packages) - 2
    layer = [math.prod(spec.shape(linear)) for linear in spec.architecture.linears]
    most = max(len(layers) for layers in split_layers(spec.num_layers, chunks))
    table = spec.vocab_size * spec.hidden_size
    peak = max(
        memory.interpreted(layer * most),
        memory.interpreted([table // count_head_parts(spec)] * count_head_parts(spec)),
        memory.tokens_in_transformers(spec, memory.FLOAT16),
        *(memory.stored(size) + size for size in weights),
    )
    read = size + 2 * sum(job.bytes_out for job in packages)
    yield Job(VERIFY, "packages", read, 0, memory.resident(base, peak), work.verification(spec, options))
    if has_tokenizer(checkpoint.folder):
        source = BITS[checkpoint.tensors[f"{EMBEDDING}.weight"].dtype] // 8
        read = size + _bytes(checkpoint, "model.", "lm_head.")
        todo = work.forward(spec, (SAMPLE_WINDOWS, SAMPLE_LENGTH), passes=2)
        yield Job(VERIFY, "quality", read, 0, memory.resident(base, memory.comparison(spec, source)), todo)
