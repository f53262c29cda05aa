"""Seconds of the stages of a conversion, timed from outside: what `bench_pipeline.py` runs in a child."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OTHER = "other"
MAX_CHUNK_MB = 1100
"""The embedding of Llama-3-8B takes 1051 MB in float16, more than a package may by default."""


class Stages:
    """Seconds by stage, of which one runs at a time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {OTHER: 0.0}
        self._running = [OTHER]
        self._since = time.perf_counter()

    def _lap(self) -> None:
        now = time.perf_counter()
        stage = self._running[-1]
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._lap()
        self._running.append(name)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def finished(self) -> dict[str, float]:
        self._lap()
        return {name: seconds for name, seconds in self.seconds.items() if seconds >= 0.01}

    def time(self, owner: Any, function: str, name: str) -> None:
        """Have every call of a function, or every step of a generator, count for a stage."""
        inner = getattr(owner, function)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.stage(name):
                result = inner(*arguments, **options)
            return self._steps(result, name) if isinstance(result, Iterator) else result

        setattr(owner, function, timed)

    def _steps(self, steps: Iterator[Any], name: str) -> Iterator[Any]:
        while True:
            with self.stage(name):
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step


def quantize(model: Path, output: Path, recipe: str, tokens: Path) -> dict[str, float]:
    """With `recipe`, calibrated on all windows of a file of token ids."""
    from anequant.calibration import walkers as statistics
    from anequant.calibration.equivalence import EquivalenceProbe
    from anequant.checkpoints.reader import Checkpoint
    from anequant.checkpoints.source import resolve_source
    from anequant.checkpoints.writer import CheckpointWriter
    from anequant.jobs import journal
    from anequant.pipeline import quantize, rounding_pass
    from anequant.pipeline.steps.checkpoint_files import WriteCheckpointFiles
    from anequant.quantization import calibrated
    from anequant.recipe import Calibration
    from anequant.recipe_files import load_recipe
    from anequant.reference import rotated_model as turned
    from anequant.reference.forward import ReferenceModel
    from anequant.request import Request

    stages = Stages()
    for owner, function, name in (
        (Checkpoint, "read", "read"),
        (turned, "fold_and_rotate_tensor", "fold and rotate"),
        (turned, "fold_and_rotate_linear", "fold and rotate"),
        (turned, "rotate_embedding", "fold and rotate"),
        (EquivalenceProbe, "layer", "probe"),
        (EquivalenceProbe, "head", "probe"),
        (ReferenceModel, "inputs", "forward"),
        (statistics.Walkers, "layer", "forward"),
        (statistics._Sums, "add", "Hessians"),
        (calibrated, "fit_core", "scales and codebooks"),
        (rounding_pass, "round_linear", "rounding"),
        (CheckpointWriter, "write", "write"),
        (CheckpointWriter, "flush", "write"),
        (journal.Journal, "_sync_files", "write"),
        (WriteCheckpointFiles, "run", "hash and card"),
    ):
        stages.time(owner, function, name)
    windows = json.loads(tokens.read_text(encoding="utf-8"))
    calibration = Calibration((str(tokens),), len(windows), len(windows[0]))
    quantize.quantize(Request(resolve_source(str(model)), load_recipe(recipe), calibration), output)
    return stages.finished()


def lower(checkpoint: Path, output: Path) -> dict[str, float]:
    from anequant.lower_options import LowerOptions
    from anequant.pipeline import lower
    from anequant.pipeline.steps import magnitudes
    from anequant.request import LowerRequest
    from anequant.targets.coreml import build as lower_package

    stages = Stages()
    stages.time(magnitudes, "measure_ranges", "ranges")
    for function, name in (("load_layer", "read"), ("load_table", "read"), ("save_package", "save")):
        stages.time(lower_package, function, name)
    for function in ("chunk_program", "embeddings_program", "head_program"):
        stages.time(lower_package, function, "build")
    lower.lower(LowerRequest(checkpoint, LowerOptions(max_chunk_mb=MAX_CHUNK_MB)), output)
    return stages.finished()
