"""Text that a model writes itself: calibration data that is always at hand.

The model's own distribution is the one its activations are made for (LLM-QAT: Liu et al. 2023, section
3.1). Sampling needs all layers at every token, so this holds the whole model, in bfloat16 where it is stored
so or where products of bfloat16 are fast, else in float32.

Left alone, a model writes what it was trained on last. So every text has an opening, and these are of many
kinds: an encyclopedia's, a novel's, a letter's, a program's. Texts are short, many at once, and several fill
a window: a step costs hardly more for many texts than for few, and what attention reads and holds grows with
their length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.calibration.surprise import draw_tokens
from anequant.checkpoints.reader import Checkpoint
from anequant.errors import InputError
from anequant.jobs.control import Progress, silent
from anequant.quantization.products import has_bfloat16
from anequant.recipe import Calibration
from anequant.reference.empty_model import OnDemand, borrow, build_empty_model
from anequant.reference.hooks import attach_all

TEXT_LENGTH = 128
"""The most tokens of a text."""
TEXTS_AT_ONCE = 96

OPENING_SHARE = 4
"""An opening is at most this part of its text."""


@torch.no_grad()
def sample_windows(
    checkpoint: Checkpoint,
    openings: Sequence[Sequence[int]],
    calibration: Calibration,
    *,
    resident: bool = True,
    progress: Progress = silent,
) -> Tensor:
    """Let the model write independent texts at temperature 1, each after one of the `openings` in turn, and
    put them together to windows: int64 [samples, length], drawn by the seed of `calibration`, whose source
    does not matter.

    An opening is a list of tokens, of which the first starts a text; it is cut off where it would be more
    than a quarter of one.

    Unless the model is `resident`, its weights are read again for every token: slow, and the same texts.
    Raises InputError when the logits are not finite.
    """
    spec = checkpoint.spec
    model, _ = build_empty_model(spec)
    attach_all(model, spec, checkpoint.online)
    names = [f"{EMBEDDING}.weight", f"{FINAL_NORM}.weight"]
    names += [layer_prefix(layer) + name for layer in range(spec.num_layers) for name in spec.layer_tensors()]
    (_load if resident else _stream)(model, checkpoint, names, choose_dtype(checkpoint))

    generator = torch.Generator().manual_seed(calibration.seed)
    count, length = split_windows(calibration.samples, calibration.length)
    tokens, given = _begin_texts(openings, count, length)
    for begin in range(0, count, TEXTS_AT_ONCE):
        texts, kept = (part[begin : begin + TEXTS_AT_ONCE] for part in (tokens, given))
        share = progress.share(begin / count, (begin + len(texts)) / count)
        for position, logits in _write(model, texts, share):
            drawn = draw_tokens(logits, generator)
            if drawn is None:
                raise InputError(
                    f"the model's own logits are not finite when it writes token {position}",
                    where=str(checkpoint.folder),
                    remedy="check the checkpoint for a damaged tensor",
                )
            texts[:, position] = torch.where(kept[:, position], texts[:, position], drawn)
    return tokens.view(calibration.samples, -1)[:, : calibration.length].clone()


def split_windows(samples: int, length: int) -> tuple[int, int]:
    """Return how many texts of which length fill so many windows of `length` tokens: all windows of equally
    many, none longer than TEXT_LENGTH."""
    texts = math.ceil(length / TEXT_LENGTH)
    return samples * texts, math.ceil(length / texts)


def _begin_texts(openings: Sequence[Sequence[int]], count: int, length: int) -> tuple[Tensor, Tensor]:
    """Return texts [count, length] that hold their openings, and which of their tokens do."""
    tokens = torch.zeros(count, length, dtype=torch.int64)
    given = torch.zeros(count, length, dtype=torch.bool)
    most = max(1, length // OPENING_SHARE)
    for number in range(count):
        opening = torch.tensor(openings[number % len(openings)][:most])
        tokens[number, : len(opening)] = opening
        given[number, : len(opening)] = True
    return tokens, given


def choose_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return what weights, states and logits are held in while a model writes."""
    stored = checkpoint.tensors[f"{EMBEDDING}.weight"].dtype
    return torch.bfloat16 if stored == "BF16" or has_bfloat16() else torch.float32


class _Growing(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in memory that is taken once, for `length` tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Add those of some tokens, and return those of all up to them: [n, heads, tokens, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self._whole = [
                part.new_empty(*part.shape[:2], self._length, part.shape[3]) for part in (keys, values)
            ]
        begin = self.get_seq_length()
        end = begin + keys.shape[2]
        for whole, part in zip(self._whole, (keys, values), strict=True):
            whole[:, :, begin:end] = part
        self.keys, self.values = (whole[:, :, :end] for whole in self._whole)
        return self.keys, self.values


def _write(model: Any, texts: Tensor, progress: Progress) -> Iterator[tuple[int, Tensor]]:
    """Yield a position and the logits [n, vocab] of the token there, for texts [n, length] that are filled up
    to it."""
    length = texts.shape[1]
    cache = Cache(layers=[_Growing(length) for _ in range(model.config.num_hidden_layers)])
    for position in range(1, length):
        progress(f"sample token {position} of {length}", position / length)
        before = texts[:, position - 1 : position]
        output = model(before, past_key_values=cache, use_cache=True, logits_to_keep=1)
        yield position, output.logits[:, -1]


def _load(model: Any, checkpoint: Checkpoint, names: list[str], dtype: torch.dtype) -> None:
    state = {name: checkpoint.read(name).to(dtype) for name in names}
    head = checkpoint.head_name
    state[f"{HEAD}.weight"] = state[head] if head in state else checkpoint.read(head).to(dtype)
    model.load_state_dict(state, assign=True)


def _stream(model: Any, checkpoint: Checkpoint, names: list[str], dtype: torch.dtype) -> None:
    """Keep norms only; every linear and the head borrow their weight, and the embedding reads single rows."""
    spec, table = checkpoint.spec, f"{EMBEDDING}.weight"
    layers = range(spec.num_layers)
    linears = [layer_prefix(layer) + linear.name for layer in layers for linear in spec.architecture.linears]
    borrowed = [name for name in names if name.rpartition(".")[0] in linears]
    kept = {name: checkpoint.read(name).to(dtype) for name in names if name not in (table, *borrowed)}
    model.load_state_dict(kept, strict=False, assign=True)
    for name in linears:
        borrow(model.get_submodule(name), OnDemand(borrowed, checkpoint.read), name, dtype)
    head = OnDemand([f"{HEAD}.weight"], lambda name: checkpoint.read(checkpoint.head_name))
    borrow(model.get_submodule(HEAD), head, HEAD, dtype)

    def rows(tokens: Tensor) -> Tensor:
        used, places = torch.unique(tokens, return_inverse=True)
        read = (checkpoint.read(table, slice(token, token + 1)) for token in used.tolist())
        return torch.cat(list(read)).to(dtype)[places]

    model.model.embed_tokens.forward = rows
