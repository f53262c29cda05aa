"""The layers of a report: every projection's outliers, errors and codes, and the residual stream."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import layer_prefix
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT, Source, has_tokenizer
from anequant.errors import UsageError
from anequant.inspection.measure_projections import (
    LayerMeasurement,
    Side,
    StoredProjection,
    load_projection,
    measure_projections,
    summarise_projection,
)
from anequant.jobs.control import Progress
from anequant.recipe_files import recipe_from_dict
from anequant.reference.windows import read_text_windows

WINDOWS, LENGTH = 2, 128
SEED = 7
WORST = 10
KEYS = ("measured_on", "embedded", "layers", "worst")
ERRORS = ("weight_error", "output_error")


@dataclass(frozen=True)
class Origin:
    """The float model that a checkpoint was made from; without one, `missing` says why."""

    source: Source | None
    missing: str = ""


@dataclass(frozen=True)
class Known:
    """What a report draws on beside the output.

    text    what layers are measured on, None for the bundled text
    run     what a Stopwatch saw of the run that made the output, None for another run
    former  the report that was there, None without one
    """

    origin: Origin
    text: Path | None = None
    run: dict[str, Any] | None = None
    former: dict[str, Any] | None = None


def collect_layers(
    checkpoint: Checkpoint, made: dict[str, Any], known: Known, progress: Progress
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of KEYS, and why some of them are missing; `made` is the checkpoint's manifest.

    Without the float model the values are those of the former report, or what the checkpoint alone tells.
    """
    count = checkpoint.spec.num_layers
    origin, former = known.origin, known.former
    if origin.source is None and former is not None and former["measured_on"] is not None:
        return {key: former[key] for key in KEYS}, {}
    errors = {item["name"]: item for item in made["measured"]["tensors"]}
    if origin.source is None:
        layers = []
        for number in range(count):
            progress(f"layer {number + 1} of {count}", number / count)
            names = [linear.name for linear in checkpoint.spec.architecture.linears]
            stored = [summarise_projection(name, load_projection(checkpoint, number, name)) for name in names]
            layers.append(_layer(number, None, stored, errors))
        missing = {"measured": origin.missing}
        return {"measured_on": None, "embedded": None, "layers": layers, "worst": []}, missing
    tokens, name = _tokens(checkpoint, known.text)
    recipe = recipe_from_dict(made["recipe"])
    result = measure_projections(checkpoint, open_checkpoint(origin.source.folder), recipe, tokens, progress)
    rotated = {"before": "the model came rotated, so what it was before is not here"}
    layers = [
        _layer(layer.layer, layer, [projection.stored for projection in layer.projections], errors)
        for layer in result.layers
    ]
    ranked = [
        {"layer": layer["layer"], "name": item["name"], "output_error": item["output_error"]["written"]}
        for layer in layers
        for item in layer["projections"]
        if item["bits"] < 16
    ]
    values = {
        "measured_on": {"text": name, "windows": len(tokens), "length": tokens.shape[1]},
        "embedded": {"before": result.embedded_before, "after": result.embedded_after},
        "layers": layers,
        "worst": sorted(ranked, key=lambda item: -float(str(item["output_error"])))[:WORST],
    }
    return values, rotated if result.embedded_before is None else {}


def _layer(
    number: int, measured: LayerMeasurement | None, stored: list[StoredProjection], errors: dict[str, Any]
) -> dict[str, Any]:
    """Return one entry of `layers`; without measurements, the weight error is the one that quantize
    recorded."""
    projections = []
    for place, kept in enumerate(stored):
        recorded = errors.get(layer_prefix(number) + kept.name)
        found = None if measured is None else measured.projections[place]
        sides: dict[str, Side | None] = {"before": None, "after": None}
        written = {"weight_error": recorded and recorded["relative_error"], "output_error": None}
        if found is not None:
            sides = {"before": found.before, "after": found.after}
            written = {key: getattr(found, key) for key in ERRORS}
        projections.append(
            {
                **asdict(kept),
                "rounding": recorded and ("nearest" if recorded["damping"] is None else "gptq"),
                "weight": {side: _outliers(of, "weight") for side, of in sides.items()},
                "inputs": {side: _outliers(of, "inputs") for side, of in sides.items()},
                **{key: {**_of_sides(sides, key), "written": written[key]} for key in ERRORS},
            }
        )
    residual = None
    if measured is not None:
        residual = {"before": measured.residual_before, "after": measured.residual_after}
    return {"layer": number, "residual": residual, "projections": projections}


def _outliers(side: Side | None, kind: str) -> dict[str, Any] | None:
    return None if side is None else asdict(getattr(side, kind))


def _of_sides(sides: dict[str, Side | None], key: str) -> dict[str, float | None]:
    return {side: None if of is None else getattr(of, key) for side, of in sides.items()}


def _tokens(checkpoint: Checkpoint, text: Path | None) -> tuple[Tensor, str]:
    """Return a few short windows of a text [n, length], and what they are called."""
    if not has_tokenizer(checkpoint.folder):
        if text is not None:
            raise UsageError("--text needs a tokenizer, and the checkpoint has none")
        generator = torch.Generator().manual_seed(SEED)
        shape = (WINDOWS, LENGTH)
        return torch.randint(checkpoint.spec.vocab_size, shape, generator=generator), "random tokens"
    windows = read_text_windows(
        checkpoint.folder, checkpoint.spec.config, text or SAMPLE_TEXT, count=WINDOWS, length=LENGTH
    )
    return windows, "the bundled sample text" if text is None else text.name
