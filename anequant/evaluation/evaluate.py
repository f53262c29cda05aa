"""Quality of a checkpoint on a text, and on the tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from anequant.calibration.tokens import WIKITEXT2, read_wikitext2
from anequant.checkpoints.manifest import (
    CHECKPOINT,
    MANIFEST,
    ROTATED,
    read_kind,
    read_manifest,
    read_rotation_keys,
)
from anequant.checkpoints.reader import Checkpoint, open_checkpoint, read_json
from anequant.checkpoints.rotation_files import read_written_rotations
from anequant.checkpoints.source import resolve_source
from anequant.checkpoints.stored_bits import StoredBits, measure_stored_bits
from anequant.errors import InputError, UsageError
from anequant.evaluation.divergence import (
    LayerError,
    NoiseFloor,
    measure_embedding_error,
    measure_layer_errors,
    measure_noise_floor,
    measure_quality,
    measure_quality_against,
    record_reference,
)
from anequant.evaluation.quality import Quality
from anequant.evaluation.task_scores import TaskScores, run_tasks
from anequant.jobs.control import Progress, silent
from anequant.recipe import Recipe
from anequant.recipe_files import recipe_from_dict
from anequant.reference.windows import find_start_token, read_text_windows
from anequant.targets.coreml.meta import META

LAYER_WINDOWS = 8
LARGEST_EMBEDDING_ERROR = 0.5
"""Four bits cost a tenth; unrelated embeddings are 1.4 apart."""


@dataclass(frozen=True)
class Evaluation:
    """Quality on a text, and the bits of a quantized checkpoint whose files tell them.

    `noise` is how far float16 moves the base, None without one; `layers` are None without a base, or for the
    reason in `layers_missing`.
    """

    text: str
    quality: Quality
    bits: StoredBits | None
    noise: NoiseFloor | None = None
    layers: tuple[LayerError, ...] | None = None
    layers_missing: str | None = None

    def to_dict(self) -> dict[str, Any]:
        layers = None if self.layers is None else [asdict(error) for error in self.layers]
        return {
            "text": self.text,
            **self.quality.to_dict(),
            "bits": None if self.bits is None else asdict(self.bits),
            "noise_floor": None if self.noise is None else self.noise.to_dict(),
            "layers": layers,
            "layers_missing": self.layers_missing,
        }


def evaluate_text(
    model: str,
    text: Path | str,
    base: str | None,
    *,
    windows: int,
    length: int,
    progress: Progress = silent,
) -> Quality:
    """Measure `model` on evenly spaced windows of a text, against `base` when there is one.

    Both name a folder or a hub id; the tokenizer is the model's; `text` is a file, or wikitext2 for that
    dataset's test split. Raises InputError, UsageError and ResourceError.
    """
    checkpoint, original = _open(model, base)
    tokens = read_windows(checkpoint, text, windows, length)
    return measure_quality(checkpoint, tokens, original, progress=progress)


def evaluate_checkpoint(
    model: str,
    text: Path | str,
    base: str | None,
    *,
    windows: int,
    length: int,
    progress: Progress = silent,
) -> Evaluation:
    """Measure as `evaluate_text`, and the bits of the checkpoint; with a base also how far float16 moves that
    and the error after every layer, both on the first windows."""
    checkpoint, original = _open(model, base)
    tokens = read_windows(checkpoint, text, windows, length)
    name, bits = Path(text).name, measure_stored_bits(checkpoint)
    if original is None:
        return Evaluation(name, measure_quality(checkpoint, tokens, progress=progress), bits)
    reference = record_reference(original, tokens, progress=progress.part("base", 0.0, 0.35))
    quality = measure_quality_against(
        checkpoint, tokens, reference, progress=progress.part("model", 0.35, 0.7)
    )
    noise = measure_noise_floor(
        original, tokens, reference, progress=progress.part("base in float16", 0.7, 0.8)
    )
    found = Evaluation(name, quality, bits, noise)
    missing = _why_layers_differ(checkpoint, original)
    if missing is not None:
        return replace(found, layers_missing=missing)
    progress("layers", 0.8)
    tokens, rotation = tokens[:LAYER_WINDOWS], _rotation(checkpoint)
    off = measure_embedding_error(checkpoint, original, tokens, rotation)
    if off > LARGEST_EMBEDDING_ERROR:
        missing = f"the embedding is {off:.0%} off the base's, as of another model or another rotation"
        return replace(found, layers_missing=missing)
    return replace(found, layers=measure_layer_errors(checkpoint, original, tokens, rotation))


def _why_layers_differ(checkpoint: Checkpoint, original: Checkpoint) -> str | None:
    """Return why the residual streams of two models cannot be compared; None when they can."""
    ours, theirs = checkpoint.spec, original.spec
    if (ours.num_layers, ours.hidden_size) != (theirs.num_layers, theirs.hidden_size):
        return (
            f"the base has {theirs.num_layers} layers of width {theirs.hidden_size}, "
            f"the checkpoint {ours.num_layers} of {ours.hidden_size}"
        )
    if original.is_quantized:
        return "the base is quantized itself"
    if original.online.active or read_rotation_keys(original.folder) is not None:
        return "the base is rotated itself"
    if checkpoint.is_quantized and _recipe(checkpoint) is None:
        return f"the checkpoint has no {MANIFEST} that tells its rotation"
    return None


def _recipe(checkpoint: Checkpoint) -> Recipe | None:
    """Return the recipe of a checkpoint that anequant wrote; None for one made elsewhere."""
    if read_kind(checkpoint.folder) not in (CHECKPOINT, ROTATED):
        return None
    values = read_manifest(checkpoint.folder).get("recipe")
    return recipe_from_dict(values) if isinstance(values, dict) else None


def _rotation(checkpoint: Checkpoint) -> Callable[[Tensor], Tensor]:
    """Return the R1 of a checkpoint that anequant wrote, read from its file or drawn again from its recipe;
    another one's changes nothing."""
    recipe = _recipe(checkpoint)
    if recipe is None or recipe.r1 == "none":
        return lambda hidden: hidden
    r1 = read_written_rotations(checkpoint, recipe).r1
    assert r1 is not None
    return r1.apply


def evaluate_tasks(
    model: str, tasks: str, backend: str, *, apply_chat_template: bool = False, progress: Progress = silent
) -> TaskScores:
    """Run tasks of lm-evaluation-harness on a folder or hub id.

    Raises UsageError for packages with the backend transformers, and what `resolve_source`,
    `open_text_model` and `run_tasks` do.
    """
    folder = resolve_source(model).folder
    if backend == "transformers" and (folder / META).is_file():
        raise UsageError(
            f"'{model}' holds packages, which transformers does not run", remedy="add --backend interpreter"
        )
    from anequant.runtime.continue_text import open_text_model  # imports coremltools

    opened = open_text_model(folder, backend)
    first = find_start_token(opened.tokenizer, read_json(opened.folder / "config.json"))
    return run_tasks(opened, first, tasks, apply_chat_template=apply_chat_template, progress=progress)


def _open(model: str, base: str | None) -> tuple[Checkpoint, Checkpoint | None]:
    checkpoint = open_checkpoint(resolve_source(model).folder)
    original = None if base is None else open_checkpoint(resolve_source(base).folder)
    if original is not None and original.spec.vocab_size != checkpoint.spec.vocab_size:
        raise InputError(
            f"base '{base}' has a vocabulary of {original.spec.vocab_size}, "
            f"'{model}' one of {checkpoint.spec.vocab_size}",
            remedy="compare a checkpoint with the float model it was made from",
        )
    return checkpoint, original


def read_windows(checkpoint: Checkpoint, text: Path | str, windows: int, length: int) -> Tensor:
    """Read token windows [at most `windows`, length] of a text file, or of the test split of wikitext2."""
    content = read_wikitext2("test") if str(text) == WIKITEXT2 else Path(text)
    config = checkpoint.spec.config
    return read_text_windows(checkpoint.folder, config, content, count=windows, length=length)
