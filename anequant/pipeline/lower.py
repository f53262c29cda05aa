"""A quantized checkpoint becomes a set of Core ML packages, one chunk of layers in memory at a time."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.calibration.forward import lowered_rope_tables
from anequant.calibration.ranges import layer_ranges
from anequant.checkpoints.layers import load_layer, load_table, open_quantized, projection_bits
from anequant.checkpoints.manifest import MANIFEST, manifest
from anequant.checkpoints.output import file_hashes, staged_folder
from anequant.checkpoints.reader import Checkpoint, read_json
from anequant.checkpoints.source import TOKENIZER_FILES
from anequant.checkpoints.writer import write_json
from anequant.coreml.decoder import Geometry, chunk_program
from anequant.coreml.headroom import Headroom, fitted_layer, fitted_table, plan_headroom
from anequant.coreml.meta import PackageSet, write_meta
from anequant.coreml.package import package_bytes, save_package
from anequant.coreml.parts import embeddings_program, head_program
from anequant.pipeline.chunks import chunk_ranges, constant_bytes, least_chunks, table_bytes
from anequant.pipeline.lowerable import check_lowering, head_parts
from anequant.pipeline.probe import probe_tokens
from anequant.progress import Progress, silent
from anequant.quantization.linear import QuantizedLinear
from anequant.recipe import LowerOptions

RANGE_TOKENS = 128


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
    headroom: Headroom

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
    check_lowering(spec, options, checkpoint.online)
    progress("ranges", 0.0)
    headroom = plan_headroom(layer_ranges(checkpoint, probe_tokens(checkpoint, RANGE_TOKENS)[None]))
    tables = lowered_rope_tables(spec, options.context)
    geometry = Geometry(
        spec, options.context, options.batch, *tables, headroom.residual_scale, checkpoint.online
    )
    table = fitted_table(load_table(checkpoint, EMBEDDING), headroom)
    head = load_table(checkpoint, HEAD)
    chunks = options.chunks or least_chunks(checkpoint, options.context, options.max_chunk_mb)
    packages = PackageSet(
        model=name,
        architecture=spec.architecture.model_type,
        prefix=options.prefix or spec.architecture.package_prefix,
        context=options.context,
        batch=options.batch,
        chunks=chunks,
        head_parts=head_parts(spec),
        lut_embeddings=_bits(table),
        lut_ffn=min(projection_bits(checkpoint).values()),
        lut_head=_bits(head),
        vocab_size=spec.vocab_size,
        argmax=options.argmax,
    )
    sizes: list[PackageSize] = []

    def save(program: Any, package: str, constants: int, **metadata: object) -> None:
        path = folder / f"{package}.mlpackage"
        save_package(program, path, _metadata(packages, metadata))
        weights, graph = package_bytes(path)
        sizes.append(PackageSize(package, weights, constants, graph))

    progress("embeddings", 0.0)
    save(
        embeddings_program(table, options.batch),
        packages.embeddings,
        constant_bytes(table),
        lut_bits=_bits(table),
    )
    del table
    for number, layers in enumerate(chunk_ranges(spec.num_layers, chunks)):
        progress(f"chunk {number + 1} of {chunks}", (number + 1) / (chunks + 2))
        chunk = [fitted_layer(spec, load_layer(checkpoint, layer), headroom) for layer in layers]
        gain = checkpoint.read(f"{FINAL_NORM}.weight") if layers[-1] == spec.num_layers - 1 else None
        constants = sum(
            constant_bytes(
                weight, rounded=layer_prefix(layer.index) + linear in checkpoint.online.activations
            )
            for layer in chunk
            for linear, weight in layer.linears.items()
        )
        save(
            chunk_program(geometry, chunk, gain),
            packages.chunk_names[number],
            constants + table_bytes(spec, options.context, checkpoint.online),
            lut_bits=packages.lut_ffn,
            chunk_no=number + 1,
            functions="infer,prefill",
        )
    progress("head", (chunks + 1) / (chunks + 2))
    save(
        head_program(spec, head, packages.head_parts, argmax=options.argmax),
        packages.head,
        constant_bytes(head),
        lut_bits=_bits(head),
        argmax_in_model=options.argmax or None,
        vocab_size=spec.vocab_size if options.argmax else None,
        lm_head_chunk_sizes=packages.head_sizes if options.argmax else None,
    )
    write_meta(folder, packages)
    _write_side_files(folder, checkpoint)
    contents = {
        "checkpoint": checkpoint_hashes(checkpoint),
        "options": {**asdict(options), "chunks": chunks},
        "packages": [asdict(size) for size in sizes],
        "headroom": asdict(headroom),
        "files": file_hashes(folder),
    }
    write_json(folder / MANIFEST, manifest("packages", contents))
    return LowerResult(tuple(sizes), headroom)


def checkpoint_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """What identifies the checkpoint that packages were made from: its config and weights."""
    return file_hashes(checkpoint.folder, checkpoint.files)


def _bits(table: QuantizedLinear | Tensor) -> int | None:
    return table.bits if isinstance(table, QuantizedLinear) else None


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
