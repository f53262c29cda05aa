"""Calibration tokens: collected once, and kept beside the output for the run that resumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from safetensors.torch import load_file, save_file
from torch import Tensor

from anequant.architectures.spec import EMBEDDING
from anequant.calibration.sample import TEXTS_AT_ONCE, choose_dtype, split_windows
from anequant.calibration.shares import count_share
from anequant.calibration.tokens import SELF, read_calibration_tokens
from anequant.checkpoints.header import BITS
from anequant.checkpoints.reader import Checkpoint
from anequant.jobs.control import Progress
from anequant.jobs.process import resident_bytes
from anequant.jobs.step import Step, Work
from anequant.jobs.work_folder import reading_work
from anequant.pipeline.quantizing import Quantizing
from anequant.pipeline.steps.sizes import (
    FLOAT32,
    Facts,
    count_forward_work,
    count_table_weights,
    predict_peak,
)
from anequant.recipe import Calibration

TOKENS = "tokens"
TOKENS_FILE = f"{TOKENS}.safetensors"
CALIBRATION_TOKENS = "calibration tokens"
RESIDENT, STREAMED = "sample", "sample, reading the model for every token"
"""What sampling is called with the whole model in memory, and without."""

CHANCES = 2
"""Tables [texts, vocab] of float32 that sampling holds beside the logits."""


@dataclass(frozen=True, eq=False)
class CollectTokens(Step[Quantizing, tuple[int, int]]):
    """Collect the calibration tokens; a model that writes them itself is `resident`, or read every time."""

    stage = "quantize"
    kind = CALIBRATION_TOKENS
    result = tuple[int, int]

    facts: Facts
    resident: bool

    @property
    def title(self) -> str:
        if not self._samples:
            return self.id
        return RESIDENT if self.resident else STREAMED

    @property
    def moves(self) -> tuple[int, int]:
        return (self.facts.source_size if self._samples else 0), 0

    @property
    def holds(self) -> int:
        if not self._samples:
            return 0
        return count_sampling_bytes(self.facts.checkpoint, self.facts.calibration, whole=self.resident)

    @property
    def cost(self) -> Work:
        """A token of some texts after the other; a model that is not resident is read each time, and copied
        twice."""
        if not self._samples:
            return Work()
        count, length = split_windows(
            count_share(self.facts.calibration, SELF), self.facts.calibration.length
        )
        once = count_forward_work(self.facts.spec, (count, 1), passes=1)
        read = 0 if self.resident else 3 * self.facts.source_size
        steps = math.ceil(count / TEXTS_AT_ONCE) * length
        return Work(once.flops * length, (once.bytes + read) * steps)

    @property
    def _samples(self) -> bool:
        return SELF in self.facts.calibration.sources

    def run(self, state: Quantizing, progress: Progress) -> tuple[int, int]:
        tokens = state.request.tokens
        if tokens is None:
            calibration, checkpoint = self.facts.calibration, self.facts.checkpoint
            tokens = read_calibration_tokens(calibration, checkpoint, progress, resident=self.resident)
        save_file({TOKENS: tokens.contiguous()}, state.journal.folder / TOKENS_FILE)
        windows, length = tokens.shape
        return windows, length

    def accept(self, state: Quantizing, result: tuple[int, int]) -> None:
        """Read the tokens; raises DamagedWork for a damaged file."""
        path = state.journal.folder / TOKENS_FILE
        with reading_work(path):
            state.tokens = load_file(path)[TOKENS].view(result)

    def tell(self, result: tuple[int, int]) -> Sequence[str]:
        return (f"{result[0]} windows of {result[1]}",)


def count_sampling_bytes(checkpoint: Checkpoint, calibration: Calibration, *, whole: bool) -> int:
    """Return the bytes held while a model writes text: `whole`, its cache, and logits with their chances; or,
    of its weights, the one that is used, of which the head is the largest."""
    spec, dtype = checkpoint.spec, checkpoint.tensors[f"{EMBEDDING}.weight"].dtype
    itemsize = choose_dtype(checkpoint).itemsize
    table = count_table_weights(spec)
    widened = BITS[dtype] // 8 * table if BITS[dtype] // 8 != itemsize else 0
    count, length = split_windows(count_share(calibration, SELF), calibration.length)
    texts = min(count, TEXTS_AT_ONCE)
    cache = 2 * spec.key_value_size * spec.num_layers * texts * length
    logits = (CHANCES * FLOAT32 + itemsize) * texts * spec.vocab_size
    if not whole:
        return itemsize * (cache + table) + max(widened, logits)
    model = spec.num_layers * spec.layer_weights + table * (1 if spec.tied else 2)
    return itemsize * (model + cache) + max(widened, logits)


def fits_whole(checkpoint: Checkpoint, calibration: Calibration, max_memory: int | None, base: int) -> bool:
    """Whether the model stays in memory while it writes its own calibration text, beside `base` bytes."""
    if max_memory is None:
        return True
    return predict_peak(base, count_sampling_bytes(checkpoint, calibration, whole=True)) <= max_memory


def collect_tokens(
    calibration: Calibration, checkpoint: Checkpoint, progress: Progress, max_memory: int | None = None
) -> Tensor:
    """Return `read_calibration_tokens`, the model in memory where there is room. Raises what it does."""
    whole = fits_whole(checkpoint, calibration, max_memory, resident_bytes())
    return read_calibration_tokens(calibration, checkpoint, progress, resident=whole)
