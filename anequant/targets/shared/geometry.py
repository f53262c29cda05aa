"""How decoder layers are split over packages, and what their constants take on disk."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from anequant.architectures.spec import EMBEDDING, HEAD, ModelSpec, layer_prefix
from anequant.checkpoints.layers import read_projection_bits
from anequant.checkpoints.reader import Checkpoint
from anequant.errors import UnsupportedError
from anequant.quantization.codebook import count_code_bits
from anequant.quantization.linear import FloatTable, QuantizedLinear
from anequant.quantization.online import Online
from anequant.targets.shared.rotation_weights import online_weights
from anequant.targets.shared.weight_forms import stores_integers

MEGABYTE = 1_000_000
GRAPH_BYTES_PER_LAYER = 50_000
"""The program itself: 40 kB a layer at two functions, measured on the three architectures."""


def chunk_ranges(layers: int, chunks: int) -> list[range]:
    """Consecutive layers of each chunk; sizes differ by at most one."""
    small, larger = divmod(layers, chunks)
    starts = [i * small + min(i, larger) for i in range(chunks + 1)]
    return [range(start, end) for start, end in itertools.pairwise(starts)]


def least_chunks(checkpoint: Checkpoint, context: int, most_megabytes: int) -> int:
    """The least number of chunks whose packages stay within `most_megabytes` (millions of bytes) each.

    Raises UnsupportedError when a single layer, the embedding or the head alone takes more.
    """
    spec = checkpoint.spec
    most = most_megabytes * MEGABYTE
    for name in (EMBEDDING, HEAD):
        size = vocabulary_bytes(checkpoint, name)
        if size > most:
            option = "--embedding-bits" if name == EMBEDDING else "--head-bits"
            raise UnsupportedError(
                f"'{name}' takes {size / MEGABYTE:.0f} MB, a package may take {most_megabytes}",
                remedy=f"quantize it ({option} 8), or allow more with --max-chunk-mb",
            )
    tables = table_bytes(spec, context, checkpoint.online)
    layers = layer_bytes(checkpoint)
    for chunks in range(1, spec.num_layers + 1):
        ranges = chunk_ranges(spec.num_layers, chunks)
        if max(sum(layers[layer] for layer in chunk) for chunk in ranges) + tables <= most:
            return chunks
    raise UnsupportedError(
        f"one decoder layer takes {max(layers) / MEGABYTE:.0f} MB, a package may take {most_megabytes}",
        remedy="use fewer bits, or allow more with --max-chunk-mb",
    )


def table_bytes(spec: ModelSpec, context: int, online: Online) -> int:
    """Bytes of what the layers of a package share: RoPE's tables and the factors of online rotations."""
    factors = [weight for weights in online_weights(spec, online).values() for weight in weights]
    return 4 * context * spec.head_dim + sum(constant_bytes(weight) for weight in factors)


def layer_bytes(checkpoint: Checkpoint) -> Sequence[int]:
    """Bytes of each layer in a package: codes, codebooks, scales, biases and gains, and its graph."""
    spec, bits = checkpoint.spec, read_projection_bits(checkpoint)
    sizes = []
    for layer in range(spec.num_layers):
        size = GRAPH_BYTES_PER_LAYER + 2 * 4 * spec.hidden_size
        for linear in spec.architecture.linears:
            rows, columns = spec.shape(linear)
            name = layer_prefix(layer) + linear.name
            width, scales = bits[name], math.prod(checkpoint.tensors[f"{name}.output_scales"].shape)
            size += rows * columns * width // 8 + 2 * (scales + rows + columns + 2**width)
        sizes.append(size)
    return sizes


def vocabulary_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Of the embedding or the head in its package."""
    spec = checkpoint.spec
    entries = spec.vocab_size * spec.hidden_size
    codebook = checkpoint.tensors.get(f"{name}.codebook")
    if codebook is None:
        return 2 * entries
    return entries * count_code_bits(codebook.shape[0]) // 8 + 2 * spec.vocab_size


def constant_bytes(value: QuantizedLinear | FloatTable | Tensor, *, rounded: bool = False) -> int:
    """Bytes of one copy of a constant in a package; `rounded` says it of a linear's input."""
    if not isinstance(value, QuantizedLinear):
        return math.prod(value.shape) * 2
    vectors = [value.output_scale]
    vectors += [value.input_scale] if bool((value.input_scale != 1).any()) else []
    vectors += [value.bias] if value.bias is not None else []
    table = 0 if stores_integers(value, rounded=rounded) else value.codebook.numel() * (1 if rounded else 2)
    return value.codes.numel() * value.bits // 8 + table + sum(2 * vector.numel() for vector in vectors)
