"""What tokens and outputs mean to the end loss: measured once, and kept for the run that resumes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from anequant.calibration.token_weights import (
    couplings_file,
    measure_token_weights,
    read_couplings,
)
from anequant.jobs.control import Progress
from anequant.jobs.step import Step, Work
from anequant.jobs.work_folder import reading_work
from anequant.pipeline.quantizing import Quantizing
from anequant.pipeline.steps.sizes import (
    FLOAT32,
    FLOAT64,
    Facts,
    count_autograd_bytes,
    count_coupling_bytes,
    count_forward_work,
    count_table_weights,
)
from anequant.quantization.kernels import TILE
from anequant.reference.forward import WINDOWS_AT_ONCE
from anequant.reference.head_loss import PIECE

FILE = "token_weights.safetensors"

PASSES = 3
"""Times that the windows go through the model."""


@dataclass(frozen=True, eq=False)
class WeighTokens(Step[Quantizing, int]):
    """Measure the weights of the calibration tokens, by a backward pass of the float model."""

    stage = "quantize"
    kind = "token weights"
    result = int

    facts: Facts

    @property
    def moves(self) -> tuple[int, int]:
        return 2 * self.facts.source_size, 0

    @property
    def scratch(self) -> int:
        """The most bytes of files at once that are no part of the output: the states before every layer, in
        the place of which couplings come."""
        states = FLOAT32 * math.prod(self.facts.windows) * self.facts.spec.hidden_size
        return self.facts.spec.num_layers * max(states, count_coupling_bytes(self.facts.spec))

    @property
    def kept(self) -> int:
        """The bytes of files that stay until all layers are rounded."""
        return self.facts.spec.num_layers * count_coupling_bytes(self.facts.spec)

    @property
    def holds(self) -> int:
        """States and their gradient; the head and some logits, or a layer as it is rotated, its couplings and
        what autograd keeps of a few windows in it; and the weights."""
        spec, (count, length) = self.facts.spec, self.facts.windows
        states = 3 * FLOAT32 * count * length * spec.hidden_size
        busy = count_autograd_bytes(spec, min(count, WINDOWS_AT_ONCE) * length)
        layer = (2 * FLOAT32 + self.facts.source_bytes) * spec.layer_weights
        layer += 2 * FLOAT64 * max(spec.linear_weights.values()) + count_coupling_bytes(spec)
        head = 2 * FLOAT32 * count_table_weights(spec) + 4 * FLOAT32 * PIECE * spec.vocab_size
        kept = FLOAT32 * count * length * spec.num_layers * len(spec.architecture.linears)
        return states + max(busy + layer, head) + kept

    @property
    def cost(self) -> Work:
        spec, windows = self.facts.spec, self.facts.windows
        rows = sum(spec.width(linear.output) for linear in spec.architecture.linears)
        coupling = Work(2 * math.prod(windows) * spec.num_layers * rows * TILE)
        return count_forward_work(spec, windows, PASSES) + coupling

    def run(self, state: Quantizing, progress: Progress) -> int:
        assert state.tokens is not None
        folder, seed = state.journal.folder, self.facts.calibration.seed
        weights = measure_token_weights(state.model, state.tokens, seed, folder, progress)
        save_file(weights, folder / FILE)
        return state.tokens.numel()

    def accept(self, state: Quantizing, result: int) -> None:
        """Read the weights; raises DamagedWork for a damaged file, and so does reading couplings later."""
        path = state.journal.folder / FILE
        with reading_work(path):
            state.token_weights = load_file(path)
        state.couplings = partial(_read_couplings, state.journal.folder)


def _read_couplings(folder: Path, layer: int) -> dict[str, Tensor]:
    with reading_work(couplings_file(folder, layer)):
        return read_couplings(folder, layer)
