"""The pass over a float checkpoint: fold, rotate, check, calibrate, round, write; one layer at a time.

What is rounded or kept are the turned weights as float32 holds them, as `anequant rotate` stores them: so
rotating and quantizing in two steps gives the bytes that one step does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

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
from anequant.calibration.walkers import Walkers
from anequant.checkpoints.layout import list_norms
from anequant.checkpoints.writer import CheckpointWriter
from anequant.jobs.control import Progress
from anequant.jobs.journal import Journal
from anequant.jobs.process import give_back_memory
from anequant.pipeline.rounder import PassResult, Rounder, RoundingTask, round_linear, told
from anequant.quantization.statistics import InputStatistics
from anequant.recipe import Recipe
from anequant.reference.empty_model import OnDemand
from anequant.reference.rotated_model import ROWS, RotatedModel

LAST_UNIT = "head"


class QuantizePass:
    """The pass itself: what it reads and writes, and what it has measured so far.

    `bits` are the widths of the projections by full name; `tokens` [n, length] calibrate, None without.
    """

    def __init__(
        self,
        model: RotatedModel,
        recipe: Recipe,
        bits: Mapping[str, int],
        writer: CheckpointWriter,
        journal: Journal,
        progress: Progress,
        tokens: Tensor | None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        self._model = model
        self._spec = model.spec
        self._recipe = recipe
        widths = {**bits, EMBEDDING: recipe.embedding_bits, HEAD: recipe.head_bits}
        self._rounder = Rounder(recipe, widths, writer, dtype)
        self._writer = writer
        self._journal = journal
        self._progress = progress
        self._dtype = dtype
        self._tokens = tokens if recipe.feeds_back or recipe.static_activations else None
        self._walkers: Walkers | None = None
        self._probe = EquivalenceProbe(model.checkpoint, model.plan, model.online)
        self._scales: dict[str, float] = {}

    def run(self) -> PassResult:
        """Write what an interrupted run did not; what it did is walked through with what it wrote."""
        layers = self._spec.num_layers
        self._unit("embedding", lambda: self._write_table(EMBEDDING, self._model.embedding(), None))
        complete = self._journal.done(LAST_UNIT)
        if self._tokens is not None and not complete:
            self._walkers = self._start_walkers(self._tokens)
        for layer in range(layers):
            name = f"layer {layer + 1} of {layers}"
            done = self._journal.done(name)
            self._unit(name, partial(self._write_layer, layer))
            if done and not complete:
                self._replay_layer(layer)
        state = self._unit(LAST_UNIT, self._write_head)
        rounder = self._rounder
        return PassResult(state["equivalence"], rounder.bits_per_weight, tuple(rounder.errors), self._scales)

    def _unit(self, name: str, write: Callable[[], object]) -> dict[str, Any]:
        """Write a part, or take over what an earlier run wrote of it and measured."""
        self._progress(name, self._journal.share(name)[0])
        known, scales = len(self._rounder.errors), set(self._scales)

        def run() -> dict[str, Any]:
            write()
            self._writer.flush()
            return {
                "entries": self._writer.position,
                "rounder": self._rounder.state(known),
                "scales": {key: scale for key, scale in self._scales.items() if key not in scales},
                "equivalence": self._probe.relative_error() if name == LAST_UNIT else None,
            }

        done = self._journal.done(name)
        state: dict[str, Any] = self._journal.unit(name, run, lambda state: told(state["rounder"]))
        if done:
            self._writer.resume_at(state["entries"])
            self._rounder.restore(state["rounder"])
            self._scales.update(state["scales"])
        return state

    def _write_head(self) -> None:
        gain = torch.ones(self._spec.hidden_size)
        self._rounder.write(f"{FINAL_NORM}.weight", gain)
        statistics = None
        if self._walkers is not None and self._recipe.feeds_back and self._recipe.head_bits < 16:
            statistics = self._walkers.head_statistics(gain)
        self._write_table(HEAD, self._head_blocks(), statistics)

    def _turned(self, layer: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A layer's turned tensors in float32 and, for walkers, as they are stored where none is quantized.

        The probe, which runs every tensor once, sees them in float64 before.
        """
        original, turned = self._model.layer(layer)
        floats: dict[str, Tensor] = {}

        def kept(name: str) -> Tensor:
            tensor = turned[name]
            floats[name] = tensor.float()
            return tensor

        self._probe.layer(layer, original, OnDemand(turned, kept))
        if self._walkers is None:
            return floats, {}
        return floats, {name: tensor.to(self._dtype) for name, tensor in floats.items()}

    def _replay_layer(self, layer: int) -> None:
        """Walk through a layer that is written."""
        floats, current = self._turned(layer)
        if self._walkers is None:
            return
        for group in self._spec.input_groups:
            self._walkers.read(layer, floats, current, group, moments=False)
            for linear in group:
                name = layer_prefix(layer) + linear.name
                if not self._rounder.keeps(name):
                    current[f"{linear.name}.weight"] = self._writer.read(f"{name}.weight")
            self._walkers.write(current, group)

    def _write_layer(self, layer: int) -> None:
        floats, current = self._turned(layer)
        give_back_memory()
        for name in list_norms(self._spec):
            self._rounder.write(layer_prefix(layer) + name, floats[name])
        if self._walkers is None:
            self._write_linears(layer, self._spec.architecture.linears, floats, current, None)
            return
        for group in self._spec.input_groups:
            statistics = self._walkers.read(layer, floats, current, group, moments=self._recipe.feeds_back)
            self._write_linears(layer, group, floats, current, statistics)
            inputs = partial(self._walkers.quantized_inputs, layer, current, group)
            self._scales |= measure_static_scales(
                self._recipe, self._model.online, layer, group, current, inputs
            )
            self._walkers.write(current, group)
            give_back_memory()

    def _write_linears(
        self,
        layer: int,
        linears: Sequence[Linear],
        floats: dict[str, Tensor],
        current: dict[str, Tensor],
        statistics: InputStatistics | None,
    ) -> None:
        """Round projections, and put what was stored into `current`; at 16 bits they stay as they are."""
        names, walkers = {linear: layer_prefix(layer) + linear.name for linear in linears}, self._walkers
        scales: dict[Linear, Tensor | None] = dict.fromkeys(linears)
        if walkers is not None:
            inputs = partial(walkers.quantized_inputs, layer, current, linears)
            for linear in linears:
                scales[linear] = choose_input_scale(
                    self._recipe, linear, floats[f"{linear.name}.weight"], inputs
                )

        def tasks() -> Iterator[RoundingTask]:
            for linear, name in names.items():
                if self._rounder.keeps(name):
                    continue
                weight, bias = floats[f"{linear.name}.weight"], floats.get(f"{linear.name}.bias")
                if walkers is None:
                    del floats[f"{linear.name}.weight"]
                yield self._rounder.task(name, weight, bias, statistics, scales[linear])

        with closing(self._journal.scheduler.map(round_linear, tasks())) as results:
            for linear, name in names.items():
                input_scale = scales[linear]
                if self._rounder.keeps(name):
                    weight, bias = floats[f"{linear.name}.weight"], floats.get(f"{linear.name}.bias")
                    self._rounder.keep(name, weight, bias, input_scale)
                else:
                    rounded = next(results)
                    self._rounder.take(rounded)
                    input_scale = rounded.input_scale
                    if walkers is not None:
                        current[f"{linear.name}.weight"] = rounded.tensors[f"{name}.weight"]
                if input_scale is not None and self._recipe.static_activations:
                    current[f"{linear.name}.{INPUT_SCALES}"] = input_scale[None]

    def _write_table(
        self, name: str, blocks: Iterable[Tensor], statistics: InputStatistics | None
    ) -> Tensor | None:
        """Embedding or head from float64 row blocks: as float16, or with one codebook and row scales.

        Returns the table as it was stored if it was quantized.
        """
        if self._rounder.keeps(name):
            for block in blocks:
                self._rounder.keep(name, block.float())
            return None
        table = torch.empty(self._spec.vocab_size, self._spec.hidden_size)
        for start, block in zip(range(0, table.shape[0], ROWS), blocks, strict=True):
            table[start : start + ROWS] = block
        rounded = round_linear(self._rounder.task(name, table, None, statistics))
        self._rounder.take(rounded)
        return rounded.tensors[f"{name}.weight"]

    def _start_walkers(self, tokens: Tensor) -> Walkers:
        """Embed the tokens as the float model does and as the written one does."""
        embedded = self._model.embed(tokens)
        current = embedded.to(self._dtype)
        if not self._rounder.keeps(EMBEDDING):
            used, places = torch.unique(tokens, return_inverse=True)
            rows = (slice(token, token + 1) for token in used.tolist())
            current = torch.cat([self._writer.read(f"{EMBEDDING}.weight", row) for row in rows])[places]
        exact = self._recipe.static_activations
        return Walkers(self._spec, embedded, current, self._model.online, exact=exact)

    def _head_blocks(self) -> Iterable[Tensor]:
        self._probe.final_norm(self._model.checkpoint.final_gain())
        for rows, turned in self._model.head():
            self._probe.head(rows, turned)
            yield turned
