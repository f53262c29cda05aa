"""Several recipes, and other people's rounding, on one model and one text: what each costs and brings.

Calibration tokens are collected once, and the float model is run once, beside a few windows in float16. Every
trial is compared with the first one, window by window.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor

from anequant.architectures.spec import ModelSpec
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT, Source
from anequant.checkpoints.stored_bits import StoredBits, measure_stored_bits
from anequant.comparison.peers import FLOAT, PEERS, Peer, projection_bits
from anequant.comparison.trials import PEER, RECIPE, Comparison, Trial, mark_differences, mark_front
from anequant.errors import AnequantError, Interrupted, UnsupportedError, UsageError, as_error, torch_memory
from anequant.evaluation.divergence import (
    Reference,
    measure_noise_floor,
    measure_quality_against,
    record_reference,
)
from anequant.evaluation.evaluate import read_windows
from anequant.evaluation.quality import summarise
from anequant.jobs.control import (
    UNWATCHED,
    Expected,
    Progress,
    Run,
    Unit,
    measure_shares,
)
from anequant.jobs.process import resident_bytes
from anequant.jobs.tasks import Schedulers
from anequant.jobs.work_folder import staged_folder
from anequant.outputs.records import calibration_record
from anequant.pipeline.quantize import quantize
from anequant.pipeline.steps.collect_tokens import collect_tokens
from anequant.recipe import Calibration, Recipe
from anequant.reference.open_float import open_float
from anequant.request import Request

OFF_ANE = "group"
"""The scales that the Neural Engine does not run."""

FLOAT_MODEL, TOKENS = "float model", "calibration tokens"
"""Units of work, before that of each trial."""

TRIALS, BEFORE = 8.0, 1.0
"""Weights of all trials together, and of each unit before them."""

Write = Callable[[Tensor | None, Schedulers, Path, Progress], StoredBits]
"""Writes a checkpoint to a new folder; calibration tokens are None where no recipe needs any."""


@dataclass(frozen=True, eq=False)
class ComparisonRequest:
    """A model, the recipes by name that it is to be quantized with, and what that is measured on.

    The text is a file, wikitext2, or None for the bundled one, of which `windows` of `length` tokens are
    taken. With `peers` also by coremltools and the other PEERS, as far as they are installed.
    """

    source: Source
    recipes: Mapping[str, Recipe]
    calibration: Calibration
    windows: int
    length: int
    text: Path | str | None = None
    peers: bool = False

    @cached_property
    def each(self) -> Mapping[str, Request]:
        """What is asked for of every recipe, by its name."""
        return {name: Request(self.source, recipe, self.calibration) for name, recipe in self.recipes.items()}

    @property
    def calibrates(self) -> bool:
        """Whether any recipe needs calibration tokens."""
        return any(request.calibrates for request in self.each.values())


def compare(request: ComparisonRequest, output: Path | None = None, run: Run = UNWATCHED) -> Comparison:
    """Quantize with each of the recipes, and measure on windows of a text.

    The recipes' checkpoints are kept in `output`, each called as its recipe, or thrown away. The run is told
    what is planned and what is finished, and asked for its scheduler alone.

    What fails is a Trial that says why; raises what goes wrong before the first: InputError and
    UnsupportedError for the model, UsageError for the text, the calibration source, the output, or a model
    that peers cannot take.
    """
    base = open_float(request.source)
    if request.peers and base.online.active:
        raise UsageError(
            "the model rotates while it runs, and peers do not",
            remedy="compare with peers on the float model",
        )
    text = SAMPLE_TEXT if request.text is None else request.text
    tokens = read_windows(base, text, request.windows, request.length)
    trials = _list_trials(request)
    expected = _expect([trial for trial, _ in trials], request)
    run.planned(expected)
    ends = measure_shares(expected)

    def step(name: str) -> Progress:
        return run.progress.part(name, *ends[name])

    def finished(name: str, seconds: float, *told: str) -> None:
        unit = Unit(name, "compare", told, seconds, resident_bytes(), ends[name][1], replayed=False)
        run.finished(unit)

    collected, done = None, []
    with (
        _keep(output, force=run.force, source=request.source) as place,
        tempfile.TemporaryDirectory() as scratch,
    ):
        begun = time.monotonic()
        running = step(FLOAT_MODEL)
        reference = record_reference(base, tokens, progress=running.part("float32", 0.0, 0.7))
        quality = summarise(tokens, reference.logits(), None)
        noise = measure_noise_floor(base, tokens, reference, progress=running.part("float16", 0.7, 1.0))
        finished(FLOAT_MODEL, time.monotonic() - begun, f"perplexity {quality.perplexity:.3f}")
        if request.calibrates:
            begun = time.monotonic()
            collected = collect_tokens(request.calibration, base, step(TOKENS))
            told = f"{len(collected)} windows of {collected.shape[1]}"
            finished(TOKENS, time.monotonic() - begun, told)
        for trial, write in trials:
            home = Path(scratch) if place is None or trial.kind == PEER else place
            begun = time.monotonic()
            folder, progress = home / trial.name, step(trial.name)
            writing = partial(write, collected, run.scheduler, folder)
            tried = _try(trial, writing, folder, tokens, reference, progress)
            finished(trial.name, tried.seconds or time.monotonic() - begun, *tried.told)
            done.append(tried)
            if home != place:
                shutil.rmtree(folder, ignore_errors=True)
    return Comparison(
        request.source.name,
        Path(text).name,
        request.length,
        quality,
        noise,
        calibration_record(request.calibration, collected),
        mark_differences(mark_front(done)),
    )


def _list_trials(request: ComparisonRequest) -> list[tuple[Trial, Write]]:
    """List what is to be tried, in this order, and how."""
    trials: list[tuple[Trial, Write]] = []
    for name, one in request.each.items():
        trials.append((Trial(name, RECIPE, one.recipe.scales != OFF_ANE), partial(_quantize, one)))
    for peer in PEERS if request.peers else ():
        trial = Trial(peer.name, PEER, peer.on_ane, failed=peer.missing)
        trials.append((trial, partial(_run_peer, peer, request.source)))
    return trials


def _expect(trials: Sequence[Trial], request: ComparisonRequest) -> list[Expected]:
    """Recipes that round in the same way take about the same time; what cannot be run takes none."""
    names = (FLOAT_MODEL, TOKENS) if request.calibrates else (FLOAT_MODEL,)
    expected = [Expected(name, name, BEFORE) for name in names]
    for trial in trials:
        kind = request.recipes[trial.name].rounding if trial.kind == RECIPE else trial.name
        weight = TRIALS / len(trials) if trial.failed is None else 0.0
        expected.append(Expected(trial.name, kind, weight))
    return expected


@contextmanager
def _keep(output: Path | None, *, force: bool, source: Source) -> Iterator[Path | None]:
    """The folder that takes the name `output` in the end."""
    if output is None:
        yield None
    else:
        with staged_folder(output, force=force, source=source.folder) as staged:
            yield staged


def _try(
    trial: Trial,
    write: Callable[[Progress], StoredBits],
    folder: Path,
    tokens: Tensor,
    reference: Reference,
    progress: Progress,
) -> Trial:
    """Return the trial with what writing and measuring it gave, or with why they did not; as it is if it
    cannot be."""
    if trial.failed is not None:
        return trial
    try:
        begun = time.monotonic()
        with torch_memory():
            bits = write(progress.part("quantize", 0.0, 0.7))
            seconds = time.monotonic() - begun
            measuring = progress.part("measure", 0.7, 1.0)
            quality = measure_quality_against(open_checkpoint(folder), tokens, reference, progress=measuring)
    except (AnequantError, MemoryError, OSError) as failure:
        error = as_error(failure)
        return replace(trial, failed=error.what, exit_code=error.exit_code)
    return replace(trial, bits=bits, quality=quality, seconds=seconds)


def _quantize(
    request: Request, collected: Tensor | None, scheduler: Schedulers, folder: Path, progress: Progress
) -> StoredBits:
    try:
        quantize(replace(request, tokens=collected), folder, Run(progress, scheduler=scheduler))
    except Interrupted as stop:
        raise KeyboardInterrupt from stop
    bits = measure_stored_bits(open_checkpoint(folder))
    assert bits is not None, "what quantize writes has codebooks"
    return bits


def _run_peer(
    peer: Peer,
    source: Source,
    collected: Tensor | None,
    scheduler: Schedulers,
    folder: Path,
    progress: Progress,
) -> StoredBits:
    """Raises UnsupportedError for whatever goes wrong in the peer's own code."""
    progress("whole model", 0.0)
    try:
        peer.run(source.folder, folder)
    except (AnequantError, MemoryError, OSError):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UnsupportedError(f"{type(error).__name__} in '{peer.name}': {reason}") from error
    spec = open_checkpoint(source.folder).spec
    projections, tables = _count_weights(spec)
    bits = projection_bits(peer, spec)
    whole = bits + FLOAT * tables
    return StoredBits(whole / (projections + tables), bits / projections, math.ceil(whole / 8))


def _count_weights(spec: ModelSpec) -> tuple[int, int]:
    """Count the weights of all projections, and those of embedding and head, which packages always hold."""
    return spec.num_layers * spec.layer_weights, 2 * spec.vocab_size * spec.hidden_size
