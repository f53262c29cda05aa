"""Several recipes, and other people's rounding, on one model and one text: what each costs and brings.

Calibration tokens are collected once, and the float model is run once.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from anequant.architectures.spec import ModelSpec
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT, Source
from anequant.comparison.peers import FLOAT, PEERS, Peer, projection_bits
from anequant.comparison.trials import PEER, RECIPE, Comparison, StoredBits, Trial, with_front
from anequant.errors import AnequantError, Interrupted, UnsupportedError, UsageError, as_error, torch_memory
from anequant.evaluation.divergence import Reference, evaluate_against, refer, summarise
from anequant.evaluation.evaluate import read_windows
from anequant.inspection.inspect_checkpoint import PROJECTIONS, WHOLE, checkpoint_facts
from anequant.jobs.control import CONTROL, Control, Expected, Progress, Unit, part_of, shares, silent
from anequant.jobs.process import resident_bytes
from anequant.jobs.tasks import Schedulers
from anequant.jobs.work_folder import staged_folder
from anequant.outputs.records import calibration_record
from anequant.pipeline.kept import collect_tokens
from anequant.pipeline.quantize import quantize
from anequant.planning.requirements import calibrates
from anequant.recipe import Calibration, Recipe
from anequant.reference.open_float import open_float

OFF_ANE = "group"
"""The scales that the Neural Engine does not run."""

FLOAT_MODEL, TOKENS = "float model", "calibration tokens"
"""Units of work, before that of each trial."""

TRIALS, BEFORE = 8.0, 1.0
"""Weights of all trials together, and of each unit before them."""

Run = Callable[[Tensor | None, Path, Progress], StoredBits]
"""Writes a checkpoint to a new folder; calibration tokens are None where no recipe needs any."""

Written = Callable[[Path, Progress], StoredBits]
"""The same, with the tokens."""


def compare(
    source: Source,
    recipes: Mapping[str, Recipe],
    calibration: Calibration,
    text: Path | str | None = None,
    *,
    windows: int,
    length: int,
    peers: bool = False,
    output: Path | None = None,
    force: bool = False,
    progress: Progress = silent,
    control: Control = CONTROL,
) -> Comparison:
    """Quantize with each of `recipes` by name, and measure on windows of a text (the bundled one for None).

    With `peers` also by coremltools and the other PEERS, as far as they are installed. The recipes'
    checkpoints are kept in `output`, each called as its recipe, or thrown away. `control` is told what is
    planned and what is finished, and asked for its scheduler alone.

    What fails is a Trial that says why; raises what goes wrong before the first: InputError and
    UnsupportedError for the model, UsageError for the text, the calibration source, the output, or a model
    that peers cannot take.
    """
    base = open_float(source)
    if peers and base.online.active:
        raise UsageError(
            "the model rotates while it runs, and peers do not",
            remedy="compare with peers on the float model",
        )
    text = SAMPLE_TEXT if text is None else text
    tokens = read_windows(base, text, windows, length)
    calibrated = any(calibrates(source, recipe) for recipe in recipes.values())
    runs = _runs(source, recipes, calibration, control.scheduler, peers=peers)
    expected = _expected([trial for trial, _ in runs], recipes, calibrated=calibrated)
    control.planned(expected)
    ends = shares(expected)

    def step(name: str) -> Progress:
        return part_of(progress, name, *ends[name])

    def finished(name: str, seconds: float, *told: str) -> None:
        control.finished(Unit(name, told, seconds, resident_bytes(), ends[name][1], replayed=False))

    collected, trials = None, []
    with _kept(output, force=force, source=source) as place, tempfile.TemporaryDirectory() as scratch:
        begun = time.monotonic()
        reference = refer(base, tokens, progress=step(FLOAT_MODEL))
        quality = summarise(tokens, reference.logits(), None)
        finished(FLOAT_MODEL, time.monotonic() - begun, f"perplexity {quality.perplexity:.3f}")
        if calibrated:
            begun = time.monotonic()
            collected = collect_tokens(calibration, base, step(TOKENS))
            finished(TOKENS, time.monotonic() - begun, f"{len(collected)} windows of {collected.shape[1]}")
        for trial, run in runs:
            home = Path(scratch) if place is None or trial.kind == PEER else place
            begun = time.monotonic()
            write, folder = partial(run, collected), home / trial.name
            done = _try(trial, write, folder, tokens, reference, step(trial.name))
            finished(trial.name, done.seconds or time.monotonic() - begun, *done.told)
            trials.append(done)
            if home != place:
                shutil.rmtree(folder, ignore_errors=True)
    return Comparison(
        source.name,
        Path(text).name,
        length,
        quality,
        calibration_record(calibration, collected),
        with_front(trials),
    )


def _runs(
    source: Source,
    recipes: Mapping[str, Recipe],
    calibration: Calibration,
    scheduler: Schedulers,
    *,
    peers: bool,
) -> list[tuple[Trial, Run]]:
    """What is to be tried, in this order, and how."""
    runs: list[tuple[Trial, Run]] = []
    for name, recipe in recipes.items():
        trial = Trial(name, RECIPE, recipe.scales != OFF_ANE)
        runs.append((trial, partial(_recipe, source, recipe, calibration, scheduler)))
    for peer in PEERS if peers else ():
        trial = Trial(peer.name, PEER, peer.on_ane, failed=peer.missing)
        runs.append((trial, partial(_peer, peer, source)))
    return runs


def _expected(trials: Sequence[Trial], recipes: Mapping[str, Recipe], *, calibrated: bool) -> list[Expected]:
    """Recipes that round in the same way take about the same time; what cannot be run takes none."""
    names = (FLOAT_MODEL, TOKENS) if calibrated else (FLOAT_MODEL,)
    expected = [Expected(name, name, BEFORE) for name in names]
    for trial in trials:
        kind = recipes[trial.name].rounding if trial.kind == RECIPE else trial.name
        weight = TRIALS / len(trials) if trial.failed is None else 0.0
        expected.append(Expected(trial.name, kind, weight))
    return expected


@contextmanager
def _kept(output: Path | None, *, force: bool, source: Source) -> Iterator[Path | None]:
    """The folder that takes the name `output` in the end."""
    if output is None:
        yield None
    else:
        with staged_folder(output, force=force, source=source.folder) as staged:
            yield staged


def _try(
    trial: Trial, run: Written, folder: Path, tokens: Tensor, reference: Reference, progress: Progress
) -> Trial:
    """The trial with what `run` and measuring it gave, or with why they did not; as it is if it cannot be."""
    if trial.failed is not None:
        return trial
    try:
        begun = time.monotonic()
        with torch_memory():
            bits = run(folder, part_of(progress, "quantize", 0.0, 0.7))
            seconds = time.monotonic() - begun
            measuring = part_of(progress, "measure", 0.7, 1.0)
            quality = evaluate_against(open_checkpoint(folder), tokens, reference, progress=measuring)
    except (AnequantError, MemoryError, OSError) as failure:
        error = as_error(failure)
        return replace(trial, failed=error.what, exit_code=error.exit_code)
    return replace(trial, bits=bits, quality=quality, seconds=seconds)


def _recipe(
    source: Source,
    recipe: Recipe,
    calibration: Calibration,
    scheduler: Schedulers,
    collected: Tensor | None,
    folder: Path,
    progress: Progress,
) -> StoredBits:
    try:
        control = Control(scheduler=scheduler)
        quantize(source, folder, recipe, calibration, progress=progress, control=control, collected=collected)
    except Interrupted as stop:
        raise KeyboardInterrupt from stop
    return stored_bits(folder)


def stored_bits(folder: Path) -> StoredBits:
    """Those of a quantized checkpoint."""
    bits = checkpoint_facts(open_checkpoint(folder)).bits
    whole, projections = bits[WHOLE], bits[PROJECTIONS]
    assert whole.stored_bits is not None and projections.stored_bits is not None
    return StoredBits(
        whole.stored_bits, projections.stored_bits, math.ceil(whole.stored_bits * whole.weights / 8)
    )


def _peer(
    peer: Peer, source: Source, collected: Tensor | None, folder: Path, progress: Progress
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
    projections, tables = _weights(spec)
    bits = projection_bits(peer, spec)
    whole = bits + FLOAT * tables
    return StoredBits(whole / (projections + tables), bits / projections, math.ceil(whole / 8))


def _weights(spec: ModelSpec) -> tuple[int, int]:
    """Those of all projections; those of embedding and head, which packages always hold both."""
    return spec.num_layers * spec.layer_weights, 2 * spec.vocab_size * spec.hidden_size
