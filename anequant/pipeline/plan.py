"""The steps of a job in their order, with what they move, hold and cost: a run does this very list.

Everything follows from config.json and the shards' headers; no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from anequant.architectures.spec import ModelSpec
from anequant.calibration.tokens import SELF
from anequant.checkpoints.header import TensorInfo
from anequant.checkpoints.layout import list_entries, list_widest
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.writer import DTYPE_NAMES
from anequant.errors import ResourceError, UsageError
from anequant.jobs.process import resident_bytes
from anequant.jobs.step import AnyStep, Speed
from anequant.lower_options import AssetOptions
from anequant.pipeline.lowering_steps import list_conversion, list_packages
from anequant.pipeline.skips import Kept, advise, list_kept
from anequant.pipeline.speed import measure_speed
from anequant.pipeline.steps.build_asset import BuildAsset, WriteBundleFiles
from anequant.pipeline.steps.build_packages import BuildPackage, WritePackageFiles
from anequant.pipeline.steps.checkpoint_files import WriteCheckpointFiles, WriteRotatedFiles
from anequant.pipeline.steps.collect_tokens import CollectTokens, fits_whole
from anequant.pipeline.steps.magnitudes import MeasureRanges
from anequant.pipeline.steps.rotations import ChooseRotations
from anequant.pipeline.steps.rounding import RoundEmbedding, RoundHead, RoundLayer
from anequant.pipeline.steps.sizes import Facts, predict_peak
from anequant.pipeline.steps.tuning import Tune
from anequant.pipeline.steps.weigh_tokens import WeighTokens
from anequant.pipeline.steps.widths import ChooseWidths
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.online import plan_online
from anequant.quantization.weight_format import WeightFormat
from anequant.recipe import Recipe
from anequant.recipe_files import ROTATION_KEYS, recipe_from_dict
from anequant.reference.forward import ReferenceModel
from anequant.reference.windows import RANGE_TOKENS, choose_probe_tokens
from anequant.request import LowerRequest, Request
from anequant.rotation.rotation_plan import is_drawn
from anequant.targets.coreai.asset_limits import check_asset
from anequant.targets.coreml.lowerable import check_lowering

FLOAT = {"bits": 16, "rounding": "nearest"}
SMALL = 256
"""A weight's rows and columns, enough for every loop to run once."""


@dataclass(frozen=True)
class Disk:
    """Bytes written: those that stay, and the second copy of a package while it is written, the checkpoint
    that is yet to be tuned beside couplings of outputs, or states between layers, whichever is most."""

    checkpoint: int
    packages: int
    temporary: int

    @property
    def total(self) -> int:
        return self.checkpoint + self.packages + self.temporary


@dataclass(frozen=True)
class Plan:
    """Steps in their order; `base` are the resident bytes of the imports alone."""

    base: int
    steps: tuple[AnyStep, ...]
    kept: tuple[Kept, ...] = ()
    advice: tuple[str, ...] = ()

    def peak(self, step: AnyStep) -> int:
        """Return the most resident bytes of the process during a step."""
        return predict_peak(self.base, step.holds)

    @property
    def largest(self) -> AnyStep:
        return max(self.steps, key=lambda step: step.holds)

    @property
    def disk(self) -> Disk:
        packages = [step.moves[1] for step in self.steps if isinstance(step, (BuildPackage, BuildAsset))]
        untuned = sum(step.moves[1] for step in self.steps if isinstance(step, Tune))
        weighing = [step for step in self.steps if isinstance(step, WeighTokens)]
        scratch, kept = (sum(sizes) for sizes in ([s.scratch for s in weighing], [s.kept for s in weighing]))
        written = sum(step.moves[1] for step in self.steps)
        temporary = max([scratch, untuned + kept, *packages])
        return Disk(written - sum(packages) - untuned, sum(packages), temporary)

    def peaks(self) -> dict[str, int]:
        """Return the peak of every stage."""
        stages = dict.fromkeys(step.stage for step in self.steps)
        return {stage: max(map(self.peak, self.stage(stage))) for stage in stages}

    def stage(self, name: str) -> tuple[AnyStep, ...]:
        """Return the steps of a stage."""
        return tuple(step for step in self.steps if step.stage == name)

    def to_dict(self, speed: Speed) -> dict[str, Any]:
        jobs = [
            {
                "step": step.stage,
                "name": step.title,
                "bytes_in": step.moves[0],
                "bytes_out": step.moves[1],
                "peak": self.peak(step),
                "seconds": speed.seconds(step.cost),
            }
            for step in self.steps
        ]
        return {
            "base_bytes": self.base,
            "peak_bytes": self.peak(self.largest),
            "peak_job": self.largest.title,
            "peak_bytes_by_step": self.peaks(),
            "seconds": sum(speed.seconds(step.cost) for step in self.steps),
            "disk": {**asdict(self.disk), "total": self.disk.total},
            "jobs": jobs,
            "kept": [asdict(row) for row in self.kept],
            "advice": list(self.advice),
        }


def plan_request(request: Request, max_memory: int | None = None, base: int | None = None) -> Plan:
    """Return the plan of `quantize`, or of `convert` where the request has a lowering.

    With `max_memory`, in bytes, it is the one that stays within it without changing a byte of the output.
    `base` is measured where it is None and a limit asks for it. Raises ResourceError naming the least
    `max_memory` that works, and what the steps raise for an impossible recipe or lowering, or a tokenizer
    that packages cannot be checked with.
    """
    checkpoint, recipe, options = request.checkpoint, request.recipe, request.lowering
    asset = request.asset
    online = plan_online(checkpoint.spec, recipe)
    if options is not None:
        check_lowering(checkpoint.spec, options, online)
    if asset is not None:
        check_asset(checkpoint.spec, asset, online)
    if options is not None or asset is not None:
        if 16 in recipe.widths:
            problem = "recipe key 'bits' is 16, and packages hold palettized weights"
            raise UsageError(problem, remedy="use fewer")
        choose_probe_tokens(checkpoint, RANGE_TOKENS)
    if base is None:
        base = measure_base_if_limited(checkpoint.spec, max_memory)
    facts = Facts(checkpoint, foresee_checkpoint(checkpoint, recipe), recipe, request.calibration)
    rounding = _list_rounding(request, facts, recipe, max_memory, base)
    steps: list[AnyStep] = [*rounding, WriteCheckpointFiles(facts)]
    if options is not None or asset is not None:
        steps += list_conversion(facts, options, asset)
    kept = list_kept(checkpoint, recipe, options)
    return _keep_within(Plan(base, tuple(steps), kept, advise(recipe)), max_memory)


def plan_rotating(request: Request) -> Plan:
    """Return the plan of `rotate`: the whole recipe chooses rotations, and nothing is quantized."""
    plain = keep_rotations(request.recipe)
    written = foresee_checkpoint(request.checkpoint, plain, torch.float32)
    facts = Facts(request.checkpoint, written, plain, request.calibration)
    steps = list(_list_rounding(request, facts, plain, None, 0))
    return Plan(0, (*steps, WriteRotatedFiles(facts)))


def plan_lowering(request: LowerRequest, max_memory: int | None = None) -> Plan:
    """Return the plan of `lower` for a quantized checkpoint; raises as `plan_request`."""
    checkpoint, options = request.checkpoint, request.lowering
    steps: tuple[AnyStep, ...]
    if isinstance(options, AssetOptions):
        check_asset(checkpoint.spec, options, checkpoint.online)
        asset = BuildAsset(checkpoint, options)
        steps = (MeasureRanges(checkpoint), asset, WriteBundleFiles(asset))
    else:
        check_lowering(checkpoint.spec, options, checkpoint.online)
        packages = list(list_packages(checkpoint, options))
        steps = (MeasureRanges(checkpoint), *packages, WritePackageFiles(packages))
    return _keep_within(Plan(measure_base_if_limited(checkpoint.spec, max_memory), steps), max_memory)


def plan_conversion(request: Request, max_memory: int | None) -> tuple[Plan, Speed]:
    """Return the plan of `convert` for a float model, and how fast this machine is.

    Raises what `convert` raises before it reads a weight.
    """
    request.check()
    base = measure_base(request.checkpoint.spec)
    return plan_request(request, max_memory, base), measure_speed()


def keep_rotations(recipe: Recipe) -> Recipe:
    """Return a recipe with the rotations of this one, that quantizes nothing."""
    return recipe_from_dict({**{key: getattr(recipe, key) for key in ROTATION_KEYS}, **FLOAT})


def foresee_checkpoint(
    checkpoint: Checkpoint, recipe: Recipe, dtype: torch.dtype = torch.float16
) -> Checkpoint:
    """Return the checkpoint that quantizing writes, as its headers will say; what is not quantized is in
    `dtype`."""
    spec = replace(checkpoint.spec, tied=False)
    entries = list_entries(spec, recipe, list_widest(spec, recipe), dtype)
    tensors = {
        entry.name: TensorInfo(Path("model.safetensors"), DTYPE_NAMES[entry.dtype], entry.shape, 0)
        for entry in entries
    }
    return Checkpoint(checkpoint.folder, spec, tensors, plan_online(spec, recipe))


def measure_base_if_limited(spec: ModelSpec, max_memory: int | None) -> int:
    """Return `measure_base` for a job that is about to run: nothing where no limit asks for its peaks."""
    return 0 if max_memory is None else measure_base(spec)


def measure_base(spec: ModelSpec) -> int:
    """Return the resident bytes of this process with all that a run imports, the model without weights, and
    what libraries keep from their first use: a BLAS's buffers, and compiled loops."""
    ReferenceModel(spec, torch.float32)
    for dtype in (torch.float32, torch.float64):
        square = torch.ones(SMALL, SMALL, dtype=dtype)
        _ = square @ square
    small = torch.linspace(-1, 1, SMALL * SMALL).view(SMALL, SMALL)
    quantize_linear(small, None, WeightFormat(4, "lut", "balanced"), "none")
    return resident_bytes()


def _list_rounding(
    request: Request, facts: Facts, recipe: Recipe, max_memory: int | None, base: int
) -> Iterator[AnyStep]:
    """The steps that make a checkpoint's weights with `recipe`; rotations are chosen by the request's own."""
    calibrates = request.calibrates if recipe is request.recipe else recipe.calibrated
    if calibrates:
        sampled = SELF in request.calibration.sources
        whole = not sampled or fits_whole(facts.checkpoint, request.calibration, max_memory, base)
        yield CollectTokens(facts, whole)
    if request.rotated_with is None and not is_drawn(recipe):
        yield ChooseRotations(replace(facts, recipe=request.recipe), request.rotations)
    if calibrates and recipe.weighs_tokens:
        yield WeighTokens(facts)
    if calibrates and recipe.target_bits:
        yield ChooseWidths(facts)
    yield RoundEmbedding(facts)
    for layer in range(facts.spec.num_layers):
        yield RoundLayer(facts, layer)
    yield RoundHead(facts)
    if recipe.tunes:
        yield Tune(facts)


def _keep_within(plan: Plan, max_memory: int | None) -> Plan:
    """Return the plan; raises ResourceError when a step of it needs more."""
    peak = plan.peak(plan.largest)
    if max_memory is not None and peak > max_memory:
        least = math.ceil(peak / 1e7) / 100
        raise ResourceError(
            f"'{plan.largest.title}' needs {peak / 1e9:.2f} GB, and --max-memory allows "
            f"{max_memory / 1e9:.2f} GB",
            remedy=f"the least that works is --max-memory {least:.2f}GB",
        )
    return plan
