"""Quality of a checkpoint on a text, and on the tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anequant.calibration.text import load_tokenizer, read_text, start_token, text_windows
from anequant.calibration.tokens import WIKITEXT2, wikitext2
from anequant.checkpoints.manifest import MANIFEST, read_manifest
from anequant.checkpoints.reader import Checkpoint, open_checkpoint, read_json
from anequant.checkpoints.source import resolve_source
from anequant.errors import InputError
from anequant.evaluation.divergence import Quality, evaluate
from anequant.evaluation.harness import Results, run_tasks
from anequant.evaluation.layers import LayerError, layer_errors
from anequant.pipeline.generate import open_text_model
from anequant.progress import Progress, part_of, silent
from anequant.recipe import recipe_from_dict
from anequant.rotation.plan import plan_rotations

LAYER_WINDOWS = 8


@dataclass(frozen=True)
class Evaluation:
    """Quality on a text; `layers` are None without a base, or for the reason in `layers_missing`."""

    text: str
    quality: Quality
    layers: tuple[LayerError, ...] | None
    layers_missing: str | None

    def to_dict(self) -> dict[str, Any]:
        layers = None if self.layers is None else [asdict(error) for error in self.layers]
        return {
            "text": self.text,
            **self.quality.to_dict(),
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
    """Quality of `model` on evenly spaced windows of a text, against `base` when there is one.

    Both name a folder or a hub id; the tokenizer is the model's; `text` is a file, or wikitext2 for that
    dataset's test split. Raises InputError, UsageError and ResourceError.
    """
    checkpoint, original = _open(model, base)
    tokens = _windows(checkpoint, text, windows, length)
    return evaluate(checkpoint, tokens, original, progress=progress)


def evaluate_checkpoint(
    model: str,
    text: Path | str,
    base: str | None,
    *,
    windows: int,
    length: int,
    progress: Progress = silent,
) -> Evaluation:
    """As `evaluate_text`, and with a base also the error after every layer, on the first windows."""
    checkpoint, original = _open(model, base)
    tokens = _windows(checkpoint, text, windows, length)
    quality = evaluate(checkpoint, tokens, original, progress=part_of(progress, "text", 0.0, 0.8))
    name = Path(text).name
    if original is None:
        return Evaluation(name, quality, None, None)
    if checkpoint.is_quantized and not (checkpoint.folder / MANIFEST).is_file():
        return Evaluation(name, quality, None, f"the checkpoint has no {MANIFEST} that tells its rotation")
    progress("layers", 0.8)
    layers = layer_errors(checkpoint, original, tokens[:LAYER_WINDOWS], _rotation(checkpoint))
    return Evaluation(name, quality, layers, None)


def _rotation(checkpoint: Checkpoint) -> Callable[[Tensor], Tensor]:
    """R1 of a checkpoint that anequant wrote, drawn again from its recipe; nothing for a float model."""
    if checkpoint.is_quantized:
        recipe = recipe_from_dict(read_manifest(checkpoint.folder)["recipe"])
        r1 = plan_rotations(checkpoint.spec, recipe).r1
        if r1 is not None:
            return r1.apply
    return lambda hidden: hidden


def evaluate_tasks(folder: Path, tasks: str, backend: str) -> Results:
    """Run tasks of lm-evaluation-harness on what `folder` holds; raises as `run_tasks` does."""
    model = open_text_model(folder, backend)
    first = start_token(model.tokenizer, read_json(model.folder / "config.json"))
    return run_tasks(model.decoder, model.tokenizer, first, model.stop, tasks)


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


def _windows(checkpoint: Checkpoint, text: Path | str, windows: int, length: int) -> Tensor:
    content = wikitext2("test") if str(text) == WIKITEXT2 else read_text(Path(text))
    tokenizer = load_tokenizer(checkpoint.folder)
    first = start_token(tokenizer, checkpoint.spec.config)
    return text_windows(content, tokenizer, first, count=windows, length=length)
