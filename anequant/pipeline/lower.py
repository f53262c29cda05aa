"""A quantized checkpoint becomes a set of Core ML packages, one chunk of layers in memory at a time."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, ModelSpec
from anequant.calibration.forward import lowered_rope_tables
from anequant.checkpoints.layers import load_layer, load_table, open_quantized, projection_bits
from anequant.checkpoints.manifest import MANIFEST, manifest
from anequant.checkpoints.output import file_hashes, staged_folder
from anequant.checkpoints.reader import Checkpoint, read_json
from anequant.checkpoints.source import TOKENIZER_FILES
from anequant.checkpoints.writer import write_json
from anequant.coreml.decoder import Geometry, chunk_program
from anequant.coreml.meta import PackageSet, write_meta
from anequant.coreml.package import package_bytes, save_package
from anequant.coreml.parts import embeddings_program, head_program
from anequant.errors import UnsupportedError, UsageError
from anequant.progress import Progress, silent
from anequant.quantization.linear import QuantizedLinear

LARGEST_AXIS = 16384
MOST_HEAD_PARTS = 64


@dataclass(frozen=True)
class LowerOptions:
    """Sizes fixed in the packages: context length, prefill batch, number of chunks."""

    context: int = 512
    batch: int = 64
    chunks: int = 1


@dataclass(frozen=True)
class PackageSize:
    """A package's weight file and graph on disk, and what one copy of each of its constants takes."""

    name: str
    weight_bytes: int
    constant_bytes: int
    graph_bytes: int


@dataclass(frozen=True)
class LowerResult:
    packages: tuple[PackageSize, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def lower(
    checkpoint_folder: Path,
    output: Path,
    options: LowerOptions,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> LowerResult:
    """Write the packages of a quantized checkpoint to the new folder `output`.

    Raises UsageError when `output` exists (without `force`) or a size is impossible, InputError for a
    checkpoint that is not quantized or breaks the contract, UnsupportedError for what cannot be lowered.
    """
    with staged_folder(output, force=force, source=checkpoint_folder) as staging:
        name = checkpoint_folder.resolve().name
        return lower_into(staging, checkpoint_folder, name, options, progress)


def lower_into(
    folder: Path, checkpoint_folder: Path, name: str, options: LowerOptions, progress: Progress
) -> LowerResult:
    """As `lower`, into an existing empty folder; `name` is the model's name in meta.yaml."""
    checkpoint = open_quantized(checkpoint_folder)
    spec = checkpoint.spec
    check_lowering(spec, options)
    geometry = Geometry(spec, options.context, options.batch, *lowered_rope_tables(spec, options.context))
    first = load_layer(checkpoint, 0)
    table = load_table(checkpoint, EMBEDDING)
    head = load_table(checkpoint, HEAD)
    packages = PackageSet(
        model=name,
        architecture=spec.architecture.model_type,
        prefix=spec.architecture.package_prefix,
        context=options.context,
        batch=options.batch,
        chunks=options.chunks,
        head_parts=head_parts(spec),
        lut_embeddings=_bits(table),
        lut_ffn=min(projection_bits(checkpoint).values()),
        lut_head=_bits(head),
    )
    sizes: list[PackageSize] = []

    def save(program: Any, package: str, constant_bytes: int, **metadata: object) -> None:
        path = folder / f"{package}.mlpackage"
        save_package(program, path, _metadata(packages, metadata))
        weights, graph = package_bytes(path)
        sizes.append(PackageSize(package, weights, constant_bytes, graph))

    progress("embeddings", 0.0)
    save(embeddings_program(table, options.batch), packages.embeddings, _bytes(table), lut_bits=_bits(table))
    del table
    for number, layers in enumerate(chunk_ranges(spec.num_layers, options.chunks)):
        progress(f"chunk {number + 1} of {options.chunks}", (number + 1) / (options.chunks + 2))
        chunk = [first if layer == 0 else load_layer(checkpoint, layer) for layer in layers]
        gain = checkpoint.read(f"{FINAL_NORM}.weight") if layers[-1] == spec.num_layers - 1 else None
        constants = sum(_bytes(weight) for layer in chunk for weight in layer.linears.values())
        save(
            chunk_program(geometry, chunk, gain),
            packages.chunk_names[number],
            constants + _bytes(geometry.cos) + _bytes(geometry.sin),
            lut_bits=packages.lut_ffn,
            chunk_no=number + 1,
            functions="infer,prefill",
        )
    progress("head", (options.chunks + 1) / (options.chunks + 2))
    save(head_program(spec, head, packages.head_parts), packages.head, _bytes(head), lut_bits=_bits(head))
    write_meta(folder, packages)
    _write_side_files(folder, checkpoint)
    contents = {
        "checkpoint": checkpoint_hashes(checkpoint),
        "options": asdict(options),
        "packages": [asdict(size) for size in sizes],
        "files": file_hashes(folder),
    }
    write_json(folder / MANIFEST, manifest("packages", contents))
    return LowerResult(tuple(sizes))


def chunk_ranges(layers: int, chunks: int) -> list[range]:
    """Consecutive layers of each chunk; sizes differ by at most one."""
    small, larger = divmod(layers, chunks)
    starts = [i * small + min(i, larger) for i in range(chunks + 1)]
    return [range(start, end) for start, end in itertools.pairwise(starts)]


def head_parts(spec: ModelSpec) -> int:
    """The least number of equal parts, from the architecture's own on, that keeps each within an axis."""
    for parts in range(spec.architecture.head_split, MOST_HEAD_PARTS + 1):
        if spec.vocab_size % parts == 0 and spec.vocab_size // parts <= LARGEST_AXIS:
            return parts
    raise UnsupportedError(
        f"a vocabulary of {spec.vocab_size} does not split into equal parts of at most {LARGEST_AXIS}",
        remedy="pad the embedding and the head to a multiple of 64 rows",
    )


def checkpoint_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """What identifies the checkpoint that packages were made from: its config and weights."""
    return file_hashes(checkpoint.folder, ["config.json", *(shard.name for shard in checkpoint.shards)])


def check_lowering(spec: ModelSpec, options: LowerOptions) -> None:
    """Raises UsageError for impossible sizes, UnsupportedError for a model that cannot be lowered to them."""
    for name, value, most in (
        ("context", options.context, 65536),
        ("batch", options.batch, options.context),
        ("chunks", options.chunks, spec.num_layers),
    ):
        if not 1 <= value <= most:
            raise UsageError(f"--{name} is {value}, it must be between 1 and {most}")
    if options.batch < 2:
        raise UsageError("--batch is 1, prefill needs at least 2 positions at once")
    if options.context % options.batch:
        raise UsageError(
            f"--context {options.context} is not a multiple of --batch {options.batch}",
            remedy="ANEMLL's Swift runtime prefills whole batches only",
        )
    head_parts(spec)
    lowered_rope_tables(spec, options.context)


def _bits(table: QuantizedLinear | Tensor) -> int | None:
    return table.bits if isinstance(table, QuantizedLinear) else None


def _bytes(value: QuantizedLinear | Tensor) -> int:
    if isinstance(value, Tensor):
        return value.numel() * 2
    vectors = [value.codebook, value.output_scale]
    vectors += [value.input_scale] if bool((value.input_scale != 1).any()) else []
    vectors += [value.bias] if value.bias is not None else []
    return value.codes.numel() * value.bits // 8 + sum(2 * vector.numel() for vector in vectors)


def _metadata(packages: PackageSet, more: dict[str, object]) -> dict[str, str]:
    values = {
        "info": "Converted by anequant",
        "context_length": packages.context,
        "batch_size": packages.batch,
        "num_chunks": packages.chunks,
        **more,
    }
    return {f"com.anemll.{key}": str(value) for key, value in values.items() if value is not None}


def _write_side_files(folder: Path, checkpoint: Checkpoint) -> None:
    tokenizer_class = None
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    if (checkpoint.folder / "tokenizer_config.json").is_file():
        tokenizer_class = read_json(checkpoint.folder / "tokenizer_config.json").get("tokenizer_class")
    write_json(
        folder / "config.json",
        {"tokenizer_class": tokenizer_class, "model_type": checkpoint.spec.architecture.model_type},
    )
