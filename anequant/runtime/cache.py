"""A KV cache for transformers that stores small integers: codes, and a scale and a lowest value per token
and head (see `quantization.kv_cache`). What attention reads is what the codes stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from anequant.errors import UsageError
from anequant.quantization.kv_cache import QuantizedStates, dequantize_states, quantize_states
from anequant.runtime.quantizer import read_model_online


class _QuantizedStatesLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values: the first `prefix` tokens as they come, the later ones in `bits`.

    `_stored` holds, for keys and for values, the prefix [n, heads, tokens, head_dim] and the later states.
    """

    def __init__(self, bits: int, prefix: int) -> None:
        super().__init__()
        self.bits = bits
        self.prefix = prefix
        self._stored: list[tuple[Tensor, QuantizedStates]] = []

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes + later.nbytes for kept, later in self._stored)

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [n, heads, tokens, head_dim]; return all that are held, in their dtype."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        first = self.get_seq_length()
        kept = min(max(0, self.prefix - first), keys.shape[-2])
        new = [(part[:, :, :kept], quantize_states(part[:, :, kept:], self.bits)) for part in (keys, values)]
        if self._stored:
            new = [_append(old, added) for old, added in zip(self._stored, new, strict=True)]
        self._stored = new
        whole_keys, whole_values = (
            torch.cat([kept_states, dequantize_states(later, keys.dtype)], -2) for kept_states, later in new
        )
        return whole_keys, whole_values

    def get_seq_length(self) -> int:
        """Return how many tokens are held."""
        if not self._stored:
            return 0
        kept, later = self._stored[0]
        return int(kept.shape[-2] + later.low.shape[-2])

    def reset(self) -> None:
        """Forget all tokens."""
        self._stored = []

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is negative, as transformers counts them.

        Raises ValueError for a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, not {tokens_to_remove}")
        length = self.get_seq_length() + tokens_to_remove
        prefix = self._stored[0][0].shape[-2] if self._stored else 0
        self._stored = [
            (kept[:, :, :length], _map_states(lambda part: part[:, :, : max(0, length - prefix)], later))
            for kept, later in self._stored
        ]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self._map_batch(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        self._map_batch(lambda part: part[indices.to(part.device)])

    reorder_cache = batch_select_indices

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._map_batch(lambda part: part.to("cpu"))

    def prefetch(self) -> None:
        """Move everything back to where attention runs."""
        self._map_batch(lambda part: part.to(self.device))

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self._stored = [(change(kept), _map_states(change, later)) for kept, later in self._stored]


class QuantizedCache(Cache):  # type: ignore[misc]
    """The cache of a model whose checkpoint says `kv_bits`; give it to the model as `past_key_values`.

    Without it such a model computes the same, and holds its rounded keys and values as floats.
    Raises UsageError for the config of a model that keeps its keys and values in float.
    """

    rounds_states = True

    def __init__(self, config: Any) -> None:
        online = read_model_online(config)
        if online.kv_bits == 16:
            raise UsageError("this model keeps its keys and values in float", remedy="use DynamicCache")
        count = config.num_hidden_layers
        super().__init__(layers=[_QuantizedStatesLayer(online.kv_bits, online.prefix) for _ in range(count)])

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held: codes, scales, lowest values and the prefix."""
        return sum(layer.nbytes for layer in self.layers)


def make_cache(config: Any) -> Cache:
    """Return an empty cache of the kind that a model's config asks for."""
    return DynamicCache(config=config) if read_model_online(config).kv_bits == 16 else QuantizedCache(config)


def _map_states(change: Callable[[Tensor], Tensor], states: QuantizedStates) -> QuantizedStates:
    return QuantizedStates(change(states.codes), change(states.low), change(states.scale), states.bits)


def _append(
    old: tuple[Tensor, QuantizedStates], new: tuple[Tensor, QuantizedStates]
) -> tuple[Tensor, QuantizedStates]:
    (kept, first), (new_kept, later) = old, new
    parts = ((first.codes, later.codes), (first.low, later.low), (first.scale, later.scale))
    codes, low, scale = (torch.cat(pair, -2) for pair in parts)
    return torch.cat([kept, new_kept], -2), QuantizedStates(codes, low, scale, first.bits)
