"""What the commands do, for Python: the same names, options and defaults, and results as dataclasses.

    anequant.convert("org/name", "OUT")
    anequant.quantize("org/name", "CHECKPOINT", recipe="w4-nearest", head_bits=6)

A model is a folder or a hub id, with an optional revision: org/name@revision. A recipe is a name, a file or
what a file holds, a mapping of keys; `keys` are more keys of the recipe, which override it as the command
line's options do. Every error is an `anequant.errors.AnequantError`. What the command line notes beside its
result goes to the logger "anequant".
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.checkpoints.manifest import rotation_keys
from anequant.checkpoints.side_files import custom_code
from anequant.checkpoints.source import Source, resolve_source
from anequant.evaluation.evaluate import Evaluation, evaluate_checkpoint
from anequant.evaluation.sample_size import LENGTH, WINDOWS
from anequant.jobs.control import Control, Progress, silent
from anequant.jobs.scheduler import open_scheduler
from anequant.pipeline.convert import ConvertResult
from anequant.pipeline.lower import LowerResult
from anequant.pipeline.lower import lower as run_lower
from anequant.pipeline.quantize import QuantizeResult
from anequant.pipeline.quantize import quantize as run_quantize
from anequant.recipe import Calibration, LowerOptions, Recipe
from anequant.recipe_files import DEFAULT_RECIPE, load_recipe, recipe_from_dict
from anequant.report.terminal.converted import convert_and_report
from anequant.targets.shared.agreement import PackageCheck
from anequant.verification.verify import CheckpointCheck, verify_folder

LOG = logging.getLogger("anequant")


@dataclass(frozen=True)
class Verification:
    """What was checked; None for the part that the folder does not hold."""

    checkpoint: CheckpointCheck | None
    packages: PackageCheck | None


def convert(
    model: str | Path | None,
    output: str | Path,
    *,
    recipe: str | Path | Mapping[str, Any] = DEFAULT_RECIPE,
    rotations: str | Path | None = None,
    calib: str | Path = Calibration.source,
    calib_samples: int = Calibration.samples,
    calib_length: int = Calibration.length,
    calib_seed: int = Calibration.seed,
    context: int = LowerOptions.context,
    batch: int = LowerOptions.batch,
    chunks: int | None = None,
    max_chunk_mb: int = LowerOptions.max_chunk_mb,
    argmax: bool = False,
    prefix: str | None = None,
    max_memory: int | None = None,
    scheduler: str = "local",
    force: bool = False,
    resume: bool = True,
    progress: Progress = silent,
    **keys: Any,
) -> ConvertResult:
    """Quantize a model, lower it, verify both, and write the report: `output`/checkpoint, `output`/packages.

    The bundled model where `model` is None. `calib` is self, wikitext2, a text file or a .json file of token
    ids, of which `calib_samples` windows of `calib_length` tokens are taken. `context` and `batch` are in
    tokens, `chunks` None takes as few packages as `max_chunk_mb` (megabytes) allows, `max_memory` is bytes.
    `scheduler` is local, or dask://host:port for a cluster that shares the folders (docs/cluster.md). With
    `resume` a run that was interrupted is gone on with. `progress` is called with what is being done and the
    share that is done.

    Raises UsageError for options that are wrong or an `output` that exists (without `force`), InputError or
    UnsupportedError for a model that cannot be read or handled, ResourceError where disk or memory do not
    suffice, VerificationError when a check fails.
    """
    source, read = _job(None if model is None else str(model), recipe, keys)
    options = LowerOptions(context, batch, chunks, max_chunk_mb, argmax, prefix)
    with _control(resume, max_memory, scheduler) as control:
        result, _ = convert_and_report(
            source,
            Path(output),
            read,
            Calibration(str(calib), calib_samples, calib_length, calib_seed),
            options,
            None if rotations is None else Path(rotations),
            force=force,
            progress=progress,
            control=control,
        )
    return result


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | Mapping[str, Any] = DEFAULT_RECIPE,
    rotations: str | Path | None = None,
    calib: str | Path = Calibration.source,
    calib_samples: int = Calibration.samples,
    calib_length: int = Calibration.length,
    calib_seed: int = Calibration.seed,
    max_memory: int | None = None,
    scheduler: str = "local",
    force: bool = False,
    resume: bool = True,
    progress: Progress = silent,
    **keys: Any,
) -> QuantizeResult:
    """Fold, rotate and quantize a model into the new checkpoint folder `output`.

    Options and errors as of `convert`.
    """
    source, read = _job(str(model), recipe, keys)
    with _control(resume, max_memory, scheduler) as control:
        return run_quantize(
            source,
            Path(output),
            read,
            Calibration(str(calib), calib_samples, calib_length, calib_seed),
            None if rotations is None else Path(rotations),
            force=force,
            progress=progress,
            control=control,
        )


def lower(
    checkpoint: str | Path,
    output: str | Path,
    *,
    context: int = LowerOptions.context,
    batch: int = LowerOptions.batch,
    chunks: int | None = None,
    max_chunk_mb: int = LowerOptions.max_chunk_mb,
    argmax: bool = False,
    prefix: str | None = None,
    max_memory: int | None = None,
    scheduler: str = "local",
    force: bool = False,
    resume: bool = True,
    progress: Progress = silent,
) -> LowerResult:
    """Lower a quantized checkpoint folder to Core ML packages in the new folder `output`.

    Options and errors as of `convert`; InputError also for a checkpoint that is not quantized.
    """
    options = LowerOptions(context, batch, chunks, max_chunk_mb, argmax, prefix)
    with _control(resume, max_memory, scheduler) as control:
        return run_lower(
            Path(checkpoint), Path(output), options, force=force, progress=progress, control=control
        )


def verify(
    folder: str | Path, checkpoint: str | Path | None = None, *, progress: Progress = silent
) -> Verification:
    """Read back and check what `convert`, `quantize` or `lower` wrote to `folder`.

    Packages alone need the `checkpoint` they were made from. Raises InputError for another kind of folder,
    UsageError for packages without a checkpoint, VerificationError when a check fails.
    """
    made_from = None if checkpoint is None else Path(checkpoint)
    return Verification(*verify_folder(Path(folder), made_from, progress=progress))


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    base: str | Path | None = None,
    windows: int = WINDOWS,
    length: int = LENGTH,
    progress: Progress = silent,
) -> Evaluation:
    """Perplexity of a checkpoint on at most `windows` windows of `length` tokens of a text.

    `text` is a file, or wikitext2 for that dataset's test split. With `base`, the float model: also extra NLL
    and KL in nats, the share of equal top tokens, and the error after every layer. Raises InputError for
    models that cannot be read or do not belong together, UsageError for a text that cannot be read or is too
    short, ResourceError when WikiText-2 cannot be had.
    """
    against = None if base is None else str(base)
    return evaluate_checkpoint(str(model), text, against, windows=windows, length=length, progress=progress)


def _job(
    model: str | None, recipe: str | Path | Mapping[str, Any], keys: Mapping[str, Any]
) -> tuple[Source, Recipe]:
    """A wrong recipe is noticed before a model is downloaded; what a model was rotated with stands in the
    place of the recipe's keys, not of `keys`."""
    _recipe(recipe, keys)
    source = resolve_source(model)
    code = custom_code(source.folder)
    if code:
        LOG.warning("ignored, no code of a checkpoint is run: %s", ", ".join(code))
    return source, _recipe(recipe, {**(rotation_keys(source.folder) or {}), **keys})


def _recipe(recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, Mapping):
        return recipe_from_dict({**recipe, **overrides})
    return load_recipe(str(recipe), overrides)


@contextmanager
def _control(resume: bool, max_memory: int | None, scheduler: str) -> Iterator[Control]:
    with open_scheduler(scheduler, LOG.info) as tasks:
        yield Control(resume, LOG.info, max_memory=max_memory, scheduler=tasks)
