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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anequant.calibration.shares import Word, make_calibration
from anequant.checkpoints.manifest import load_recipe_for
from anequant.checkpoints.side_files import find_custom_code
from anequant.checkpoints.source import Source, resolve_source
from anequant.evaluation import LENGTH, WINDOWS
from anequant.evaluation.evaluate import Evaluation, evaluate_checkpoint
from anequant.jobs.control import Progress, Run
from anequant.jobs.scheduler import open_scheduler
from anequant.lower_options import AssetOptions, LowerOptions, choose_targets
from anequant.pipeline.asset_lowering import AssetResult
from anequant.pipeline.converting import ConvertResult
from anequant.pipeline.lower import lower as run_lower
from anequant.pipeline.lowering import LowerResult
from anequant.pipeline.quantize import quantize as run_quantize
from anequant.pipeline.quantizing import QuantizeResult
from anequant.recipe import Calibration, Recipe
from anequant.recipe_files import DEFAULT_RECIPE, load_recipe
from anequant.report.page.conversion_report import convert_and_report
from anequant.request import LowerRequest, Request
from anequant.verification.verify import Verification, verify_folder

LOG = logging.getLogger("anequant")

Tell = Callable[[str, float], None]
"""Called with what is being done, and the share done of the whole, from 0 to 1."""


def tell_nobody(what: str, done: float) -> None:
    """Show nothing."""


def convert(
    model: str | Path | None,
    output: str | Path,
    *,
    recipe: str | Path | Mapping[str, Any] = DEFAULT_RECIPE,
    rotations: str | Path | None = None,
    calib: Word | Sequence[Word] = Calibration.sources,
    calib_samples: int = Calibration.samples,
    calib_length: int = Calibration.length,
    calib_seed: int = Calibration.seed,
    calib_chat: bool = False,
    context: int = LowerOptions.context,
    batch: int = LowerOptions.batch,
    chunks: int | None = None,
    max_chunk_mb: int = LowerOptions.max_chunk_mb,
    argmax: bool = False,
    prefix: str | None = None,
    target: str = "coreml",
    ladder: Sequence[int] = AssetOptions.ladder,
    kv: str = AssetOptions.kv,
    max_memory: int | None = None,
    scheduler: str = "local",
    force: bool = False,
    resume: bool = True,
    progress: Tell = tell_nobody,
    **keys: Any,
) -> ConvertResult:
    """Quantize a model, lower it, verify all of it, and write the report, into folders of `output`.

    The bundled model where `model` is None. `calib` is self, wikitext2, a text file or a .json file of rows,
    or several of them, a weight after each as in a.txt=2; `calib_samples` windows of `calib_length` tokens
    are taken from them together, with `calib_chat` of conversations where there are any. `target` is coreml,
    coreai or both; `ladder` and `kv` (state or functional) are Core AI's. `context` and `batch` are in
    tokens, `chunks` None takes as few packages as `max_chunk_mb` (megabytes) allows, `max_memory` is bytes.
    `scheduler` is local, or dask://host:port for a cluster that shares the folders (docs/cluster.md). With
    `resume` a run that was interrupted is resumed. `progress` is called with what is being done and the share
    that is done.

    Raises UsageError for options that are wrong or an `output` that exists (without `force`), InputError or
    UnsupportedError for a model that cannot be read or handled, ResourceError where disk or memory do not
    suffice, VerificationError when a check fails.
    """
    targets = choose_targets(
        target,
        LowerOptions(context, batch, chunks, max_chunk_mb, argmax, prefix),
        AssetOptions(context, tuple(ladder), kv),
    )
    source, read = _open(None if model is None else str(model), recipe, keys)
    request = Request(
        source,
        read,
        make_calibration(calib, calib_samples, calib_length, calib_seed, chat=calib_chat),
        None if rotations is None else Path(rotations),
        lowering=targets.lowering,
        asset=targets.asset,
    )
    with _steer(progress, scheduler, force=force, resume=resume, max_memory=max_memory) as run:
        result, _ = convert_and_report(request, Path(output), run)
    return result


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | Mapping[str, Any] = DEFAULT_RECIPE,
    rotations: str | Path | None = None,
    calib: Word | Sequence[Word] = Calibration.sources,
    calib_samples: int = Calibration.samples,
    calib_length: int = Calibration.length,
    calib_seed: int = Calibration.seed,
    calib_chat: bool = False,
    max_memory: int | None = None,
    scheduler: str = "local",
    force: bool = False,
    resume: bool = True,
    progress: Tell = tell_nobody,
    **keys: Any,
) -> QuantizeResult:
    """Fold, rotate and quantize a model into the new checkpoint folder `output`.

    Options and errors as of `convert`.
    """
    source, read = _open(str(model), recipe, keys)
    request = Request(
        source,
        read,
        make_calibration(calib, calib_samples, calib_length, calib_seed, chat=calib_chat),
        None if rotations is None else Path(rotations),
    )
    with _steer(progress, scheduler, force=force, resume=resume, max_memory=max_memory) as run:
        return run_quantize(request, Path(output), run)


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
    target: str = "coreml",
    ladder: Sequence[int] = AssetOptions.ladder,
    kv: str = AssetOptions.kv,
    max_memory: int | None = None,
    scheduler: str = "local",
    force: bool = False,
    resume: bool = True,
    progress: Tell = tell_nobody,
) -> LowerResult | AssetResult:
    """Lower a quantized checkpoint folder to packages or an asset, in the new folder `output`.

    Options and errors as of `convert`, but for a target of both; InputError also for a checkpoint that is not
    quantized.
    """
    targets = choose_targets(
        target,
        LowerOptions(context, batch, chunks, max_chunk_mb, argmax, prefix),
        AssetOptions(context, tuple(ladder), kv),
    )
    request = LowerRequest(Path(checkpoint), targets.only)
    with _steer(progress, scheduler, force=force, resume=resume, max_memory=max_memory) as run:
        return run_lower(request, Path(output), run)


def verify(
    folder: str | Path, checkpoint: str | Path | None = None, *, progress: Tell = tell_nobody
) -> Verification:
    """Read back and check what `convert`, `quantize` or `lower` wrote to `folder`.

    Packages alone need the `checkpoint` they were made from. Raises InputError for another kind of folder,
    UsageError for packages without a checkpoint, VerificationError when a check fails.
    """
    made_from = None if checkpoint is None else Path(checkpoint)
    return verify_folder(Path(folder), made_from, progress=_tell(progress))


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    base: str | Path | None = None,
    windows: int = WINDOWS,
    length: int = LENGTH,
    progress: Tell = tell_nobody,
) -> Evaluation:
    """Perplexity of a checkpoint on at most `windows` windows of `length` tokens of a text.

    `text` is a file, or wikitext2 for that dataset's test split. A quantized checkpoint also has its bits per
    weight. With `base`, the float model: also extra NLL and KL in nats, the share of equal top tokens, the
    noise floor, and the error after every layer. Raises InputError for models that cannot be read or do not
    belong together, UsageError for a text that cannot be read or is too short, ResourceError when WikiText-2
    cannot be had.
    """
    against = None if base is None else str(base)
    return evaluate_checkpoint(
        str(model), text, against, windows=windows, length=length, progress=_tell(progress)
    )


def _open(
    model: str | None, recipe: str | Path | Mapping[str, Any], keys: Mapping[str, Any]
) -> tuple[Source, Recipe]:
    """Return the model's folder and its recipe; a wrong recipe is noticed before a model is downloaded."""
    load_recipe(recipe, keys)
    source = resolve_source(model)
    code = find_custom_code(source.folder)
    if code:
        LOG.warning("ignored, no code of a checkpoint is run: %s", ", ".join(code))
    return source, load_recipe_for(source.folder, recipe, keys)


@contextmanager
def _steer(tell: Tell, scheduler: str, **options: Any) -> Iterator[Run]:
    """The run of a job, with the `options` of a Run and the scheduler of that name."""
    with open_scheduler(scheduler, LOG.info) as tasks:
        yield Run(_tell(tell), note=LOG.info, scheduler=tasks, **options)


def _tell(tell: Tell) -> Progress:
    return Progress(lambda parts, done: tell(": ".join(parts), done))
