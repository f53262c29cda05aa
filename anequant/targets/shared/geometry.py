"""How a model is split over packages, the sizes that are fixed in them, and what they take on disk."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from anequant.architectures.spec import EMBEDDING, HEAD, ModelSpec, layer_prefix
from anequant.checkpoints.layers import read_projection_bits
from anequant.checkpoints.reader import Checkpoint
from anequant.errors import UnsupportedError
from anequant.quantization.codebook import count_code_bits
from anequant.quantization.linear import FloatTable, QuantizedLinear
from anequant.quantization.online import NOTHING, Online
from anequant.targets.shared.packed_codes import stores_integers
from anequant.targets.shared.rotation_weights import make_online_weights

MEGABYTE = 1_000_000
GRAPH_BYTES_PER_LAYER = 50_000
"""The program itself: 40 kB a layer at two functions, measured on the three architectures."""

LARGEST_AXIS = 16384
MOST_HEAD_PARTS = 64
SMALLEST_FLOAT16 = 2.0**-24


@dataclass(frozen=True)
class Geometry:
    """Sizes that are fixed in the packages; cos and sin are float tables [context, head_dim].

    The residual stream carries `residual_scale` times the model's values. `online` says what runs beside the
    weights: its activations have static scales.
    """

    spec: ModelSpec
    context: int
    batch: int
    cos: Tensor
    sin: Tensor
    residual_scale: float = 1.0
    online: Online = NOTHING

    @property
    def residual_eps(self) -> float:
        """The epsilon of a norm that reads the scaled stream, at least float16's smallest number."""
        return max(self.spec.rms_norm_eps * self.residual_scale**2, SMALLEST_FLOAT16)


def split_layers(layers: int, chunks: int) -> list[range]:
    """Split layers into consecutive ranges; their sizes differ by at most one."""
    small, larger = divmod(layers, chunks)
    starts = [i * small + min(i, larger) for i in range(chunks + 1)]
    return [range(start, end) for start, end in itertools.pairwise(starts)]


def find_least_chunks(checkpoint: Checkpoint, context: int, most_megabytes: int) -> int:
    """Find the least number of chunks whose packages take at most `most_megabytes` (10^6 bytes) each.

    Raises UnsupportedError when a single layer, the embedding or the head alone takes more.
    """
    spec = checkpoint.spec
    most = most_megabytes * MEGABYTE
    for name in (EMBEDDING, HEAD):
        size = count_vocabulary_bytes(checkpoint, name)
        if size > most:
            option = "--embedding-bits" if name == EMBEDDING else "--head-bits"
            raise UnsupportedError(
                f"'{name}' takes {size / MEGABYTE:.0f} MB, a package may take {most_megabytes}",
                remedy=f"quantize it ({option} 8), or allow more with --max-chunk-mb",
            )
    tables = count_table_bytes(spec, context, checkpoint.online)
    layers = count_layer_bytes(checkpoint)
    for chunks in range(1, spec.num_layers + 1):
        ranges = split_layers(spec.num_layers, chunks)
        if max(sum(layers[layer] for layer in chunk) for chunk in ranges) + tables <= most:
            return chunks
    raise UnsupportedError(
        f"one decoder layer takes {max(layers) / MEGABYTE:.0f} MB, a package may take {most_megabytes}",
        remedy="use fewer bits, or allow more with --max-chunk-mb",
    )


def count_head_parts(spec: ModelSpec) -> int:
    """Return the least number of equal parts, from the architecture's own on, that each fit an axis.

    Raises UnsupportedError for a vocabulary that does not split so.
    """
    for parts in range(spec.architecture.head_split, MOST_HEAD_PARTS + 1):
        if spec.vocab_size % parts == 0 and spec.vocab_size // parts <= LARGEST_AXIS:
            return parts
    raise UnsupportedError(
        f"a vocabulary of {spec.vocab_size} does not split into equal parts of at most {LARGEST_AXIS}",
        remedy="pad the embedding and the head to a multiple of 64 rows",
    )


def count_table_bytes(spec: ModelSpec, context: int, online: Online) -> int:
    """Count the bytes that layers of a package share: RoPE's tables and the factors of online rotations."""
    factors = [weight for weights in make_online_weights(spec, online).values() for weight in weights]
    return 4 * context * spec.head_dim + sum(count_constant_bytes(weight) for weight in factors)


def count_layer_bytes(checkpoint: Checkpoint) -> Sequence[int]:
    """Count the bytes of each layer in a package: codes, codebooks, scales, biases, gains and its graph."""
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


def count_vocabulary_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Count the bytes of the embedding or the head in its package."""
    spec = checkpoint.spec
    entries = spec.vocab_size * spec.hidden_size
    codebook = checkpoint.tensors.get(f"{name}.codebook")
    if codebook is None:
        return 2 * entries
    return entries * count_code_bits(codebook.shape[0]) // 8 + 2 * spec.vocab_size


def count_constant_bytes(value: QuantizedLinear | FloatTable | Tensor, *, rounded: bool = False) -> int:
    """Count the bytes of one copy of a constant; `rounded` says that a linear's input is."""
    if not isinstance(value, QuantizedLinear):
        return math.prod(value.shape) * 2
    vectors = [value.output_scale]
    vectors += [value.input_scale] if bool((value.input_scale != 1).any()) else []
    vectors += [value.bias] if value.bias is not None else []
    table = 0 if stores_integers(value, rounded=rounded) else value.codebook.numel() * (1 if rounded else 2)
    return value.codes.numel() * value.bits // 8 + table + sum(2 * vector.numel() for vector in vectors)
