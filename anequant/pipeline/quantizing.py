"""A model on its way to a written checkpoint: what the steps of quantizing and rotating share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import ModelSpec
from anequant.calibration.distill import TuneResult
from anequant.calibration.rotation_choice import RotationChoice, Rotations
from anequant.checkpoints.layout import list_entries, list_widest
from anequant.checkpoints.online_config import build_config, choose_stem
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.rotation_files import ROTATIONS, write_rotations
from anequant.checkpoints.writer import CheckpointWriter, Entry, write_json
from anequant.jobs.journal import Journal
from anequant.pipeline.rounder import PassResult
from anequant.pipeline.rounding_pass import CalibrationTokens, RoundingPass
from anequant.quantization.online import Online, plan_online
from anequant.recipe import Recipe
from anequant.reference.rotated_model import RotatedModel
from anequant.request import Request
from anequant.rotation.rotation_plan import RotationPlan, is_drawn, plan_rotations

UNTUNED = "untuned"


@dataclass(frozen=True)
class QuantizeResult:
    """What the passes measured; `tuning` is None without tuning, which comes after `rounding`'s errors.

    `rotated_before`: the source was a rotated checkpoint. `rotations`: how they were found here, None where
    the seed alone tells them.
    """

    rounding: PassResult
    tuning: TuneResult | None
    rotations: RotationChoice | None = None
    rotated_before: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.rounding),
            "tuning": None if self.tuning is None else asdict(self.tuning),
            "rotations": None if self.rotations is None else self.rotations.to_dict(),
            "rotated_before": self.rotated_before,
        }


@dataclass(frozen=True)
class RotateResult:
    """`equivalence` is the largest relative logit change, in float64; `rotations` says how they were found,
    None where the seed alone tells them."""

    equivalence: float
    rotations: RotationChoice | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "equivalence": self.equivalence,
            "rotations": None if self.rotations is None else self.rotations.to_dict(),
        }


@dataclass(eq=False)
class Quantizing:
    """What the steps that write a checkpoint to `folder` hand on, each to those after it.

    `recipe` says what is written, which is less than the request's where a model is rotated alone; what is
    not quantized is written in `dtype`. `files` closes what is open. A step sets what it finds: `tokens`
    [n, length], their `token_weights` [n, length] by linear and the `couplings` of a layer's outputs,
    `rotations`, the widths `bits` of projections and tables by full name, `tuning`.
    """

    request: Request
    recipe: Recipe
    folder: Path
    journal: Journal
    files: ExitStack
    dtype: torch.dtype = torch.float16
    tokens: Tensor | None = None
    rotations: Rotations = field(init=False)
    bits: Mapping[str, int] = field(init=False)
    tuning: TuneResult | None = None
    token_weights: Mapping[str, Tensor] | None = None
    couplings: Callable[[int], Mapping[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        drawn = self.request.rotated_with is None and is_drawn(self.recipe)
        self.rotations = Rotations(plan_rotations(self.spec, self.recipe) if drawn else RotationPlan())
        self.bits = list_widest(self.spec, self.recipe)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.request.checkpoint

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @cached_property
    def online(self) -> Online:
        """What the written model does while it runs, static scales still missing."""
        return plan_online(self.spec, self.recipe)

    @cached_property
    def model(self) -> RotatedModel:
        """The float model as it is rotated; the rotations are chosen by then."""
        fold = self.recipe.fold_input_scales
        return RotatedModel(self.checkpoint, self.rotations.plan, fold, self.online)

    @property
    def untuned(self) -> Path:
        """Where the pass writes: the folder itself, or one beside the output for tuning to read."""
        return self.journal.folder / UNTUNED if self.recipe.tunes else self.folder

    @cached_property
    def rounding(self) -> RoundingPass:
        """The pass; tokens, rotations and widths are known by then."""
        for made in (self.folder, self.untuned):
            made.mkdir(exist_ok=True)
        calibrated = self.recipe.feeds_back or self.recipe.static_activations
        tokens = self.tokens if calibrated else None
        seen = None if tokens is None else CalibrationTokens(tokens, self.token_weights, self.couplings)
        return RoundingPass(
            self.model, self.recipe, self.bits, self.writer, self.journal.scheduler, seen, self.dtype
        )

    @cached_property
    def entries(self) -> list[Entry]:
        """The tensors of the checkpoint, in their order."""
        return list_entries(self.spec, self.recipe, self.bits, self.dtype)

    @cached_property
    def writer(self) -> CheckpointWriter:
        return self.files.enter_context(self.new_writer(self.untuned))

    @property
    def result(self) -> QuantizeResult:
        """What was measured, once the head is written and, where it is asked for, tuned."""
        rotated_before = self.request.rotated_with is not None
        return QuantizeResult(self.rounding.result, self.tuning, self.rotations.choice, rotated_before)

    @property
    def rotate_result(self) -> RotateResult:
        """What was measured of a model that is rotated alone."""
        return RotateResult(self.rounding.result.equivalence, self.rotations.choice)

    def new_writer(self, folder: Path) -> CheckpointWriter:
        """A writer of the checkpoint's tensors to a folder, to be entered."""
        return CheckpointWriter(folder, self.entries, stem=choose_stem(self.online))

    def close_files(self) -> None:
        """Finish the files that the pass writes; called once its last part is accepted."""
        self.files.close()

    def write_config(self, folder: Path) -> None:
        """Write config.json beside the weights; the pass is complete."""
        online = self.online.with_scales(self.rounding.result.static_scales)
        name = str(self.dtype).removeprefix("torch.")
        config = build_config(self.spec, self.recipe, online, self.writer.first_file, dtype=name)
        write_json(folder / "config.json", config)

    def write_rotations(self) -> None:
        """Write the rotations that no seed tells, or copy those that the source came with."""
        theirs = self.request.source.folder / ROTATIONS
        if self.rotations.matrices is not None:
            write_rotations(self.folder, self.rotations.matrices)
        elif self.request.rotated_with is not None and theirs.is_file():
            shutil.copyfile(theirs, self.folder / ROTATIONS)
