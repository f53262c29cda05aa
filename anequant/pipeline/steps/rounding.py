"""The parts of a model that are rounded and written: the embedding, every layer, the head.

What a layer holds, with n a weight's size, [out, w] its shape, N a layer's size, T the calibration tokens:

    rotated     a weight as read and two float64 copies of it, beside the layer's float32 so far
    nearest     the float32 that is still to be rounded, and of the weight at hand its core and its codes
    statistics  of fit and of held-out windows: the Hessian, w^2, and a cross moment, w^2, or, of a linear
                that reads its input alone, the moment of its outputs, n; float32
    gptq        beside these: their mean over all windows; the factors of two Hessians (for each of two
                dampings where several linears share them); the damped Hessian; and for refinement the system
                of the input scales with its factor, target, steps, errors and pulls, and members of codebook
                entries for some rows
    walkers     hidden states of T tokens in two models, and in the quantized one what the last linear of
                attention or MLP reads; of a few windows, what attention or the MLP holds
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, Linear, ModelSpec, Space, layer_prefix
from anequant.calibration.equivalence import PROBE_LENGTH
from anequant.calibration.token_weights import couplings_file
from anequant.jobs.control import Progress
from anequant.jobs.step import Step, Work
from anequant.pipeline.quantizing import Quantizing
from anequant.pipeline.rounder import tell_errors
from anequant.pipeline.rounding_pass import RoundedPart
from anequant.pipeline.steps.sizes import (
    CORE_AND_CODES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    Facts,
    count_coupling_bytes,
    count_state_bytes,
    count_stored_bytes,
    count_table_weights,
)
from anequant.quantization.kernels import TILE
from anequant.quantization.refine import CODEBOOK_ROWS, CODEBOOK_WEIGHTS, LARGEST_CODEBOOK
from anequant.recipe import Recipe
from anequant.reference.forward import WINDOWS_AT_ONCE
from anequant.reference.rotated_model import ROWS

ROTATING_PASSES, ROUNDING_PASSES = 24, 60
"""Times that rotating and rounding go over a weight, in float32: measured on weights of 4096 x 4096."""

FEEDBACK, REFITTING, FACTORS = 5.0, 1.5, 4
"""Products of a weight with a Hessian that gptq and its target take, and a round of refinement without its
descent; Cholesky factors of a Hessian."""

LAST = "head"


@dataclass(frozen=True, eq=False)
class RoundPart(Step[Quantizing, RoundedPart]):
    """A part of the model that the pass writes."""

    stage = "quantize"
    result = RoundedPart

    facts: Facts

    @abstractmethod
    def write(self, state: Quantizing) -> RoundedPart:
        """Round the part and write it."""

    def run(self, state: Quantizing, progress: Progress) -> RoundedPart:
        return self.write(state)

    def replay(self, state: Quantizing, result: RoundedPart) -> None:
        state.rounding.skip(result)

    def accept(self, state: Quantizing, result: RoundedPart) -> None:
        state.rounding.accept(result)

    def tell(self, result: RoundedPart) -> Sequence[str]:
        return tell_errors(result.errors)


class RoundEmbedding(RoundPart):
    kind = "table"

    @property
    def id(self) -> str:
        return "embedding"

    @property
    def moves(self) -> tuple[int, int]:
        return self.facts.count_moves(f"{EMBEDDING}.")

    @property
    def holds(self) -> int:
        return _count_table_bytes(self.facts, self.facts.recipe.embedding_bits, probed=False)

    @property
    def cost(self) -> Work:
        return _count_table_work(self.facts.spec, self.facts.recipe.embedding_bits)

    def write(self, state: Quantizing) -> RoundedPart:
        return state.rounding.write_embedding()


class RoundHead(RoundPart):
    kind = "table"

    @property
    def id(self) -> str:
        return LAST

    @property
    def moves(self) -> tuple[int, int]:
        head = self.facts.checkpoint.head_name.removesuffix(".weight")
        read = count_stored_bytes(self.facts.checkpoint, f"{head}.", FINAL_NORM)
        return read, count_stored_bytes(self.facts.written, f"{HEAD}.", FINAL_NORM)

    @property
    def holds(self) -> int:
        states = count_state_bytes(self.facts.spec, self.facts.walked)
        return states + _count_table_bytes(self.facts, self.facts.recipe.head_bits, probed=True)

    @property
    def cost(self) -> Work:
        return _count_table_work(self.facts.spec, self.facts.recipe.head_bits)

    def write(self, state: Quantizing) -> RoundedPart:
        return state.rounding.write_head()

    def accept(self, state: Quantizing, result: RoundedPart) -> None:
        super().accept(state, result)
        for layer in range(state.spec.num_layers):
            couplings_file(state.journal.folder, layer).unlink(missing_ok=True)
        state.close_files()
        state.write_config(state.untuned)


@dataclass(frozen=True, eq=False)
class RoundLayer(RoundPart):
    """One decoder layer."""

    kind = "layer"

    layer: int

    @property
    def id(self) -> str:
        return f"layer {self.layer + 1} of {self.facts.spec.num_layers}"

    @property
    def title(self) -> str:
        return f"layer {self.layer + 1}"

    @property
    def moves(self) -> tuple[int, int]:
        return self.facts.count_moves(layer_prefix(self.layer))

    @property
    def holds(self) -> int:
        spec, recipe, windows = self.facts.spec, self.facts.recipe, self.facts.walked
        sizes = list(spec.linear_weights.values())
        total, largest = sum(sizes), max(sizes)
        one = self.facts.source_bytes + 2 * FLOAT64
        rotated = max(FLOAT32 * sum(sizes[:number]) + one * size for number, size in enumerate(sizes))
        if recipe.fold_input_scales:
            rotated = max((FLOAT64 + FLOAT32) * total, FLOAT64 * total + one * largest)
        if windows is None:
            nearest = 0 if recipe.bits == 16 else CORE_AND_CODES
            rounding = max(
                FLOAT32 * sum(sizes[number:]) + nearest * size for number, size in enumerate(sizes)
            )
            return max(rotated, rounding)
        count, length = windows
        inner = max(spec.query_size, spec.intermediate_size)
        states = FLOAT32 * count * length * (2 * spec.hidden_size + inner)
        running = max(_count_running_bytes(spec, group[0], length) for group in spec.input_groups)
        rounding = CORE_AND_CODES * largest
        if recipe.feeds_back:
            rounding = max(
                max(
                    3 * _count_moment_bytes(spec, linear) + _count_running_bytes(spec, linear, length),
                    _count_gptq_bytes(spec, linear),
                )
                for linear in spec.architecture.linears
            )
        stored = (FLOAT32 + FLOAT16) * total
        if recipe.weighs_tokens:
            stored += count_coupling_bytes(spec)
        return states + max(rotated, stored + max(rounding, running + FLOAT32 * largest))

    @property
    def cost(self) -> Work:
        return count_layer_work(self.facts.spec, self.facts.recipe, self.facts.walked)

    def write(self, state: Quantizing) -> RoundedPart:
        return state.rounding.write_layer(self.layer)

    def replay(self, state: Quantizing, result: RoundedPart) -> None:
        """Go through the layer again, unless everything is written and nothing comes after it."""
        super().replay(state, result)
        if not state.journal.done(LAST):
            state.rounding.replay_layer(self.layer)


def count_layer_work(spec: ModelSpec, recipe: Recipe, windows: tuple[int, int] | None) -> Work:
    """Return the work of a layer: rotating, the float64 probe, rounding, and what calibration adds."""
    size = spec.layer_weights
    passes = ROTATING_PASSES + (0 if recipe.bits == 16 else ROUNDING_PASSES)
    todo = Work(2 * 2 * 2 * PROBE_LENGTH * size, 4 * passes * size)
    if windows is None:
        return todo
    todo += count_walking_work(spec, windows)
    if recipe.feeds_back:
        todo += count_moment_work(spec, windows) + count_gptq_work(spec, recipe)
    return todo


def _count_table_bytes(facts: Facts, bits: int, *, probed: bool) -> int:
    """The bytes of the embedding or of the head, whose logits are `probed`."""
    spec = facts.spec
    block = min(ROWS, spec.vocab_size) * spec.hidden_size
    rotating = (facts.source_bytes + 2 * FLOAT64) * block + (FLOAT64 * block if probed else 0)
    if bits == 16:
        return rotating + FLOAT32 * block
    return FLOAT32 * count_table_weights(spec) + max(rotating, CORE_AND_CODES * count_table_weights(spec))


def _count_table_work(spec: ModelSpec, bits: int) -> Work:
    passes = ROTATING_PASSES + (0 if bits == 16 else ROUNDING_PASSES)
    return Work(4 * PROBE_LENGTH * count_table_weights(spec), 4 * passes * count_table_weights(spec))


def _count_moment_bytes(spec: ModelSpec, linear: Linear) -> int:
    """The bytes of one linear's moments: of fit or of held-out windows, or of a few that are being added."""
    rows, width = spec.shape(linear)
    return FLOAT32 * (width**2 + (rows * width if linear.norm is None else width**2))


def _count_gptq_bytes(spec: ModelSpec, linear: Linear) -> int:
    rows, width = spec.shape(linear)
    size, square = rows * width, width**2
    factors = 2 if linear.norm is None else 4
    chosen = min(rows, CODEBOOK_ROWS, max(1, CODEBOOK_WEIGHTS // width))
    refining = 2 * square + 8 * size + 3 * LARGEST_CODEBOOK * chosen * width
    return 3 * _count_moment_bytes(spec, linear) + FLOAT32 * ((factors + 1) * square + refining)


def _count_running_bytes(spec: ModelSpec, linear: Linear, length: int) -> int:
    """The bytes of a few windows on their way to a linear, in one model, and its input in both."""
    tokens = WINDOWS_AT_ONCE * length
    inner = 3 * spec.intermediate_size if linear.input.space is Space.FFN else 4 * spec.query_size
    return FLOAT32 * tokens * (2 * spec.hidden_size + inner + 2 * spec.width(linear.input))


def count_walking_work(spec: ModelSpec, windows: tuple[int, int]) -> Work:
    """Return the work of a layer that runs once in each of two models."""
    count, length = windows
    attention = 2 * count * length**2 * spec.query_size
    return Work(2 * (2 * count * length * spec.layer_weights + attention))


def count_moment_work(spec: ModelSpec, windows: tuple[int, int]) -> Work:
    """Return the work of Hessians, which are symmetric, and of cross moments or moments of outputs."""
    todo = Work()
    for group in spec.input_groups:
        rows, width = spec.shape(group[0])
        mixed = rows if group[0].norm is None else width
        todo += Work(math.prod(windows) * width * (width + 2 * mixed))
    return todo


def count_gptq_work(spec: ModelSpec, recipe: Recipe) -> Work:
    """Return the work of factors and calibrated rounding of a layer's linears."""
    products = FEEDBACK + recipe.refinement * (REFITTING + max(1, recipe.descent))
    todo = Work()
    for group in spec.input_groups:
        todo += Work(FACTORS * spec.width(group[0].input) ** 3 / 3)
    for linear in spec.architecture.linears:
        rows, width = spec.shape(linear)
        todo += Work(2 * products * rows * width**2 + recipe.refinement * width**3 / 3)
        if recipe.weighs_tokens:
            passes = max(1, recipe.refinement) * max(1, recipe.descent)
            todo += Work(2 * passes * rows * width * TILE)
    return todo
