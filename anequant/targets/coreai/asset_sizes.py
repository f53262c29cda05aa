"""What an asset takes on disk, told from a checkpoint's headers."""

from __future__ import annotations

from anequant.architectures.spec import EMBEDDING, HEAD
from anequant.checkpoints.reader import Checkpoint
from anequant.lower_options import AssetOptions
from anequant.targets.coreai.design import list_contexts
from anequant.targets.shared.geometry import (
    GRAPH_BYTES_PER_LAYER,
    count_layer_bytes,
    count_table_bytes,
    count_vocabulary_bytes,
)

GRAPH_BYTES_OF_FUNCTION, GRAPH_BYTES_OF_LAYER, GRAPH_BYTES_OF_HEAD = 1_000, 3_600, 180
"""An asset's operations: of a function, of a layer in it, and of a head of attention in that; measured."""


def count_asset_bytes(checkpoint: Checkpoint, options: AssetOptions) -> int:
    """Count the bytes of an asset: one copy of every constant, and its functions."""
    spec = checkpoint.spec
    layers = sum(size - GRAPH_BYTES_PER_LAYER for size in count_layer_bytes(checkpoint))
    tables = sum(count_vocabulary_bytes(checkpoint, name) for name in (EMBEDDING, HEAD))
    shared = count_table_bytes(spec, options.context, checkpoint.online)
    functions = 2 * len(options.ladder) * len(list_contexts(options.context))
    layer = GRAPH_BYTES_OF_LAYER + GRAPH_BYTES_OF_HEAD * spec.num_heads
    return layers + tables + shared + functions * (GRAPH_BYTES_OF_FUNCTION + layer * spec.num_layers)
