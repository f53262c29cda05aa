"""A set of packages as ANEMLL's runtimes expect it: names, metadata, and the files beside the packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from anequant.architectures.spec import EMBEDDING, HEAD
from anequant.checkpoints.foreign import complete_codebook
from anequant.checkpoints.layers import read_projection_bits
from anequant.checkpoints.reader import Checkpoint, read_object
from anequant.checkpoints.side_files import copy_tokenizer
from anequant.checkpoints.writer import write_json
from anequant.lower_options import LowerOptions
from anequant.quantization.codebook import count_code_bits
from anequant.targets.coreml.meta import PackageSet, write_meta
from anequant.targets.shared.geometry import count_head_parts, split_layers


def describe_packages(checkpoint: Checkpoint, options: LowerOptions, model: str, chunks: int) -> PackageSet:
    """Return what meta.yaml says of the packages of a quantized checkpoint, `chunks` of them with layers."""
    spec = checkpoint.spec
    return PackageSet(
        model=model,
        architecture=spec.architecture.model_type,
        prefix=options.prefix or spec.architecture.package_prefix,
        context=options.context,
        batch=options.batch,
        chunks=chunks,
        head_parts=count_head_parts(spec),
        lut_embeddings=_table_bits(checkpoint, EMBEDDING),
        lut_ffn=min(read_projection_bits(checkpoint).values()),
        lut_head=_table_bits(checkpoint, HEAD),
        vocab_size=spec.vocab_size,
        argmax=options.argmax,
    )


def list_parts(packages: PackageSet, layers: int) -> Iterator[tuple[str, str | range, dict[str, str]]]:
    """Yield the name, the part and the metadata of every package, in running order."""
    yield packages.embeddings, EMBEDDING, _metadata(packages, lut_bits=packages.lut_embeddings)
    for number, part in enumerate(split_layers(layers, packages.chunks)):
        metadata = _metadata(
            packages, lut_bits=packages.lut_ffn, chunk_no=number + 1, functions="infer,prefill"
        )
        yield packages.chunk_names[number], part, metadata
    argmax = packages.argmax
    metadata = _metadata(
        packages,
        lut_bits=packages.lut_head,
        argmax_in_model=argmax or None,
        vocab_size=packages.vocab_size if argmax else None,
        lm_head_chunk_sizes=packages.head_sizes if argmax else None,
    )
    yield packages.head, HEAD, metadata


def write_side_files(folder: Path, packages: PackageSet, checkpoint: Checkpoint) -> None:
    """Write meta.yaml, copy the tokenizer's files, and write of config.json what runtimes read."""
    write_meta(folder, packages)
    copy_tokenizer(checkpoint.folder, folder)
    tokenizer_class = None
    if (checkpoint.folder / "tokenizer_config.json").is_file():
        tokenizer_class = read_object(checkpoint.folder / "tokenizer_config.json").get("tokenizer_class")
    config = checkpoint.spec.config
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    model_type = checkpoint.spec.architecture.model_type
    write_json(folder / "config.json", {"tokenizer_class": tokenizer_class, "model_type": model_type, **ends})


def _table_bits(checkpoint: Checkpoint, name: str) -> int | None:
    """The width of the embedding or the head, None for float16."""
    if f"{name}.codebook" not in checkpoint.tensors:
        return None
    return count_code_bits(complete_codebook(name, checkpoint.read(f"{name}.codebook")).numel())


def _metadata(packages: PackageSet, **more: object) -> dict[str, str]:
    values = {
        "info": "Converted by anequant",
        "context_length": packages.context,
        "batch_size": packages.batch,
        "num_chunks": packages.chunks,
        **more,
    }
    return {f"com.anemll.{key}": str(value) for key, value in values.items() if value is not None}
