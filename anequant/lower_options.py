"""What lowering is told beside the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LowerOptions:
    """What is fixed in the packages that a checkpoint is lowered to.

    context        positions the state holds
    batch          positions that prefill takes at once
    chunks         decoder packages; None: as few as keep every package within `max_chunk_mb`
    max_chunk_mb   millions of bytes
    argmax         the head ends in the best token of each part instead of logits
    prefix         of the file names; None: ANEMLL's for the architecture
    """

    context: int = 512
    batch: int = 64
    chunks: int | None = None
    max_chunk_mb: int = 950
    argmax: bool = False
    prefix: str | None = None
