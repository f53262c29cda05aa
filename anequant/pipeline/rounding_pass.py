"""The pass over a float checkpoint: fold, rotate, check, calibrate, round, write; one layer at a time.

What is rounded or kept are the rotated weights as float32 holds them, as `anequant rotate` stores them: so
rotating and quantizing in two steps gives the bytes that one step does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anequant.architectures.spec import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    INPUT_SCALES,
    Linear,
    layer_prefix,
)
from anequant.calibration.activation_scales import choose_input_scale, measure_static_scales
from anequant.calibration.equivalence import EquivalenceProbe
from anequant.calibration.walkers import COMPENSATION, GroupInputs, Walkers
from anequant.checkpoints.layout import list_norms
from anequant.checkpoints.writer import CheckpointWriter
from anequant.jobs.process import give_back_memory
from anequant.jobs.tasks import Scheduler
from anequant.pipeline.rounder import PassResult, Rounder, RoundingTask, TensorError, round_linear
from anequant.quantization.statistics import InputStatistics
from anequant.recipe import Recipe
from anequant.reference.rotated_model import ROWS, RotatedModel


@dataclass(frozen=True)
class RoundedPart:
    """What is known once the embedding, a layer or the head is written.

    `entries` counts the tensors of the file so far, `weights` and `bits` all weights so far and the bits of
    their codes; `errors` are those of this part, `scales` its inputs' static scales by the linear's name.
    `equivalence`, the largest relative change of the logits by folding and rotation, is known with the head.
    """

    entries: int
    weights: int
    bits: int
    errors: tuple[TensorError, ...]
    scales: Mapping[str, float]
    equivalence: float | None = None


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """Tokens [n, length] that walk through the layers; how much each of them counts for every linear, [n,
    length] by full name, None where all count the same; and, for a layer, how errors of its linears' outputs
    count together, by name."""

    tokens: Tensor
    weights: Mapping[str, Tensor] | None
    couplings: Callable[[int], Mapping[str, Tensor]] | None


class RotatedCopies(Mapping[str, Tensor]):
    """A layer's rotated tensors in float64 for whoever reads them; of each a float32 copy is kept."""

    def __init__(self, rotated: Mapping[str, Tensor]) -> None:
        self._rotated = rotated
        self.floats: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._rotated[name]
        self.floats[name] = tensor.float()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._rotated)

    def __len__(self) -> int:
        return len(self._rotated)


class LayerInHand:
    """A layer that is being rounded: its tensors in float32, and as they are stored so far; and how errors of
    outputs count together, by the linear's name, where that is known.

    `release` hands a float tensor over and forgets it, where no walker needs it any more.
    """

    def __init__(self, floats: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
        self.floats = floats
        self.stored = stored
        self.couplings: Mapping[str, Tensor] = {}

    def release(self, name: str) -> Tensor:
        return self.floats.pop(name)


class RoundingPass:
    """The pass itself: what it reads and writes, and the walkers and the probe that go along.

    `bits` are the widths of projections and tables by full name; `seen` are the tokens that walk through the
    layers, None where nothing is calibrated on them. What is not quantized is written in `dtype`.
    """

    def __init__(
        self,
        model: RotatedModel,
        recipe: Recipe,
        bits: Mapping[str, int],
        writer: CheckpointWriter,
        scheduler: Scheduler,
        seen: CalibrationTokens | None,
        dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._spec = model.spec
        self._recipe = recipe
        self._rounder = Rounder(recipe, bits, writer, dtype)
        self._writer = writer
        self._scheduler = scheduler
        self._dtype = dtype
        self._seen = seen
        self._walkers: Walkers | None = None
        self._probe = EquivalenceProbe(model.checkpoint, model.plan, model.online)
        self._parts: list[RoundedPart] = []

    @property
    def result(self) -> PassResult:
        """What all parts came to; the head is the last."""
        errors = tuple(error for part in self._parts for error in part.errors)
        scales = {name: scale for part in self._parts for name, scale in part.scales.items()}
        last = self._parts[-1]
        assert last.equivalence is not None
        return PassResult(last.equivalence, last.bits / last.weights, errors, scales)

    def accept(self, part: RoundedPart) -> None:
        """Take what a part came to, whichever run wrote it."""
        self._parts.append(part)

    def skip(self, part: RoundedPart) -> None:
        """Leave out a part that an earlier run wrote."""
        self._writer.resume_at(part.entries)
        self._rounder.count_on(part.bits, part.weights)

    def write_embedding(self) -> RoundedPart:
        self._write_table(EMBEDDING, self._model.embedding(), None)
        return self._finish_part({})

    def write_layer(self, layer: int) -> RoundedPart:
        walkers = None if self._seen is None else self._walk(self._seen)
        hand = self._rotate_layer(layer)
        give_back_memory()
        for name in list_norms(self._spec):
            self._rounder.write(layer_prefix(layer) + name, hand.floats[name])
        if walkers is None:
            self._write_linears(layer, self._spec.architecture.linears, hand, None)
            return self._finish_part({})
        scales: dict[str, float] = {}
        moments = self._recipe.feeds_back
        if moments and self._seen is not None and self._seen.couplings is not None:
            hand.couplings = self._seen.couplings(layer)
        for inputs in walkers.layer(layer, hand.floats, hand.stored, moments=moments):
            self._write_linears(layer, inputs.group, hand, inputs)
            scales |= measure_static_scales(
                self._recipe, self._model.online, layer, inputs.group, hand.stored, inputs.quantized
            )
            give_back_memory()
        return self._finish_part(scales)

    def replay_layer(self, layer: int) -> None:
        """Go through a layer that an earlier run wrote, with probe and walkers."""
        walkers = None if self._seen is None else self._walk(self._seen)
        hand = self._rotate_layer(layer)
        if walkers is None:
            return
        for inputs in walkers.layer(layer, hand.floats, hand.stored, moments=False):
            for linear in inputs.group:
                name = layer_prefix(layer) + linear.name
                if not self._rounder.keeps(name):
                    hand.stored[f"{linear.name}.weight"] = self._writer.read(f"{name}.weight")

    def write_head(self) -> RoundedPart:
        gain = torch.ones(self._spec.hidden_size)
        self._rounder.write(f"{FINAL_NORM}.weight", gain)
        statistics = None
        if self._seen is not None and self._recipe.feeds_back and not self._rounder.keeps(HEAD):
            statistics = self._walk(self._seen).head_statistics(gain)
        self._write_table(HEAD, self._head_blocks(), statistics)
        return replace(self._finish_part({}), equivalence=self._probe.relative_error())

    def _finish_part(self, scales: Mapping[str, float]) -> RoundedPart:
        self._writer.flush()
        rounder = self._rounder
        errors = rounder.hand_over_errors()
        return RoundedPart(self._writer.position, rounder.weights, rounder.bits, errors, scales)

    def _rotate_layer(self, layer: int) -> LayerInHand:
        """Return a layer in float32 and, for walkers, as its tensors are stored where none is quantized.

        The probe, which runs every tensor once, sees them in float64 before.
        """
        original, rotated = self._model.layer(layer)
        copies = RotatedCopies(rotated)
        self._probe.layer(layer, original, copies)
        if self._seen is None:
            return LayerInHand(copies.floats, {})
        return LayerInHand(copies.floats, {name: t.to(self._dtype) for name, t in copies.floats.items()})

    def _write_linears(
        self, layer: int, linears: Sequence[Linear], hand: LayerInHand, inputs: GroupInputs | None
    ) -> None:
        """Round projections, and keep what was stored in hand; at 16 bits they stay as they are."""
        names = {linear: layer_prefix(layer) + linear.name for linear in linears}
        measure = None if inputs is None else inputs.measure
        scales: dict[Linear, Tensor | None] = dict.fromkeys(linears)
        if inputs is not None:
            for linear in linears:
                weight = hand.floats[f"{linear.name}.weight"]
                scales[linear] = choose_input_scale(self._recipe, linear, weight, inputs.quantized)

        def tasks() -> Iterator[RoundingTask]:
            for linear, name in names.items():
                if self._rounder.keeps(name):
                    continue
                key, bias = f"{linear.name}.weight", hand.floats.get(f"{linear.name}.bias")
                weight = hand.release(key) if inputs is None else hand.floats[key]
                statistics = None if measure is None else measure(linear)
                if statistics is not None and linear.name in hand.couplings:
                    statistics = replace(statistics, coupling=hand.couplings[linear.name])
                yield self._rounder.task(name, weight, bias, statistics, scales[linear])

        with closing(self._scheduler.map(round_linear, tasks())) as results:
            for linear, name in names.items():
                key, input_scale = f"{linear.name}.weight", scales[linear]
                if self._rounder.keeps(name):
                    bias = hand.floats.get(f"{linear.name}.bias")
                    self._rounder.keep(name, hand.floats[key], bias, input_scale)
                else:
                    rounded = next(results)
                    self._rounder.take(rounded)
                    input_scale = rounded.input_scale
                    if inputs is not None:
                        hand.stored[key] = rounded.tensors[f"{name}.weight"]
                if input_scale is not None and self._recipe.static_activations:
                    hand.stored[f"{linear.name}.{INPUT_SCALES}"] = input_scale[None]

    def _write_table(self, name: str, blocks: Iterable[Tensor], statistics: InputStatistics | None) -> None:
        """Write the embedding or the head from float64 row blocks: as it is, or with one codebook and row
        scales."""
        if self._rounder.keeps(name):
            for block in blocks:
                self._rounder.keep(name, block.float())
            return
        table = torch.empty(self._spec.vocab_size, self._spec.hidden_size)
        for start, block in zip(range(0, table.shape[0], ROWS), blocks, strict=True):
            table[start : start + ROWS] = block
        self._rounder.take(round_linear(self._rounder.task(name, table, None, statistics)))

    def _walk(self, seen: CalibrationTokens) -> Walkers:
        """Return the walkers, which start from tokens as the float model embeds them and as the written one
        does."""
        if self._walkers is None:
            embedded = self._model.embed(seen.tokens)
            current = embedded.to(self._dtype)
            if not self._rounder.keeps(EMBEDDING):
                used, places = torch.unique(seen.tokens, return_inverse=True)
                rows = (slice(token, token + 1) for token in used.tolist())
                current = torch.cat([self._writer.read(f"{EMBEDDING}.weight", row) for row in rows])[places]
            self._walkers = Walkers(
                self._spec,
                embedded,
                current,
                self._model.online,
                weights=seen.weights,
                compensation=COMPENSATION if self._recipe.correction else 0.0,
                exact=self._recipe.static_activations,
            )
        return self._walkers

    def _head_blocks(self) -> Iterable[Tensor]:
        self._probe.final_norm(self._model.checkpoint.final_gain())
        for rows, rotated in self._model.head():
            self._probe.head(rows, rotated)
            yield rotated
