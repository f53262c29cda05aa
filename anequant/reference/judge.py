"""Stock transformers as the judge of how a model folder is read.

Everything else here reads both sides of a comparison with one reader, which would agree with itself about a
folder that it misreads. So before a model is worked on, and when one is written, what was read is held
against what stock transformers reads: keys of config.json, the origin of every tensor, rotary tables and
windows. What differs is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from anequant.architectures.config import KEPT
from anequant.architectures.spec import HEAD
from anequant.checkpoints.header import read_header
from anequant.checkpoints.online_config import SUFFIX
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.errors import UnsupportedError, VerificationError, quote
from anequant.reference.forward import ReferenceModel
from anequant.reference.miniature import TOKENS, WINDOW, StockReading, Stored, read_as_stock

ADAPTER, WEIGHTS_KEY = "adapter_config.json", "transformers_weights"
REMEDY = "report this with the model's config.json"
REWRITTEN = ("tie_word_embeddings", "rope_theta", "rope_scaling", *KEPT)
"""What a written config.json says otherwise than its source: the head has weights of its own, and RoPE is
there in the words of two generations."""


def check_reading(checkpoint: Checkpoint) -> None:
    """Hold a folder as it was opened here against what stock transformers makes of it.

    Raises VerificationError naming the key or the tensor that is read differently, UnsupportedError for
    weights that config.json names and for an adapter, both of which transformers would load, and InputError
    for what it does not open.
    """
    if WEIGHTS_KEY in checkpoint.spec.config:
        raise UnsupportedError(
            f"config key '{WEIGHTS_KEY}' asks for other files than model{SUFFIX}",
            where=str(checkpoint.folder / "config.json"),
            remedy="give the weights their usual name and remove the key",
        )
    if (checkpoint.folder / ADAPTER).exists():
        raise UnsupportedError(
            f"'{ADAPTER}' makes this an adapter of another model",
            where=str(checkpoint.folder),
            remedy="merge it into its base model, or remove the file if the weights are whole",
        )
    model = ReferenceModel(checkpoint.spec, torch.float32)
    stock = read_as_stock(checkpoint)
    _compare_configs(checkpoint, stock.config)
    _compare_origins(checkpoint, stock.origins)
    _compare_layers(checkpoint, model, stock)


def check_written(source: Checkpoint, folder: Path) -> None:
    """Hold a written folder against its source: the same model to stock transformers, but for what is
    rewritten, and itself read as stock transformers reads it.

    Raises VerificationError naming the key or tensor.
    """
    written = open_checkpoint(folder)
    check_reading(written)
    for key in sorted(source.spec.config.keys() | written.spec.config.keys()):
        ours, theirs = (spec.config.get(key) for spec in (written.spec, source.spec))
        if key not in REWRITTEN and ours != theirs:
            raise VerificationError(
                f"config key '{key}' was written as {quote(ours)} and is {quote(theirs)} in the source",
                where=str(folder / "config.json"),
                remedy=REMEDY,
            )


def _compare_configs(checkpoint: Checkpoint, stock: Mapping[str, Any]) -> None:
    for key, value in checkpoint.spec.config.items():
        theirs = stock.get(key)
        if key not in KEPT and theirs != value:
            raise VerificationError(
                f"transformers reads config key '{key}' as {quote(theirs)}, anequant as {quote(value)}",
                where=str(checkpoint.folder / "config.json"),
                remedy=REMEDY,
            )


def _compare_origins(checkpoint: Checkpoint, origins: Mapping[str, Stored | None]) -> None:
    spec = checkpoint.spec
    ours = {f"{HEAD}.weight": checkpoint.tensors[checkpoint.head_name]}
    ours |= {name: checkpoint.tensors[name] for name in spec.tensors()}
    headers = {path.name: read_header(path) for path in checkpoint.shards}
    for name in sorted(ours.keys() | origins.keys()):
        info, theirs = ours.get(name), origins.get(name)
        header = {} if theirs is None else headers.get(theirs.file, {})
        if info is None or theirs is None or header.get(theirs.name) != info:
            place = "nowhere" if theirs is None else f"'{theirs.name}' in '{theirs.file}'"
            here = "nowhere" if info is None else f"'{info.shard.name}'"
            raise VerificationError(
                f"transformers takes '{name}' from {place}, anequant from {here}",
                where=str(checkpoint.folder),
                remedy="remove the files that do not belong to the model, or report this",
            )


def _compare_layers(checkpoint: Checkpoint, model: ReferenceModel, stock: StockReading) -> None:
    spec = checkpoint.spec
    tables = zip(model.rope_tables(TOKENS), (stock.cos, stock.sin), strict=True)
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    sliding = causal.triu(1 - WINDOW)
    slides = any(torch.equal(mask, sliding) for mask in stock.masks)
    reasons = {
        "rope_parameters": all(torch.equal(ours, theirs) for ours, theirs in tables),
        "is_causal": all(torch.equal(mask, causal) or torch.equal(mask, sliding) for mask in stock.masks),
        "sliding_window": slides == (spec.window is not None),
    }
    for key, agree in reasons.items():
        if not agree:
            raise VerificationError(
                f"transformers obeys config key '{key}' otherwise than anequant",
                where=str(checkpoint.folder / "config.json"),
                remedy=REMEDY,
            )
