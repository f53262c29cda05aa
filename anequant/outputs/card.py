"""The model card of an output, README.md: what it was made from, how, what was measured, how to open it.

It holds no date and no folder of this machine, so the same run gives the same bytes. Its front matter has the
hub's keys (Hugging Face Hub documentation, "Model cards").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anequant.checkpoints.license import CARD, copy_license, read_license
from anequant.checkpoints.manifest import read_manifest, read_rotation_keys
from anequant.checkpoints.places import BUNDLE_FOLDER, CHECKPOINT_FOLDER, PACKAGES_FOLDER
from anequant.checkpoints.reader import read_object
from anequant.checkpoints.source import Source
from anequant.evaluation.quality import Quality
from anequant.outputs.card_page import Rows, card_page, code, plain, table
from anequant.outputs.command_line import convert_command, model_word, quantize_command, rotate_command
from anequant.recipe import Recipe
from anequant.request import Request
from anequant.versions import installed_versions

if TYPE_CHECKING:
    from anequant.targets.shared.agreement import PackageCheck
    from anequant.verification.assets import AssetCheck

HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]{1,96}", re.ASCII)
"""What the hub takes as the name of a base model."""

QUANTIZED = {"base_model_relation": "quantized"}


def write_rotated_card(
    folder: Path, request: Request, seen: Mapping[str, Any] | None, equivalence: float
) -> None:
    """README.md of the rotated checkpoint in `folder`, whose config.json is there, and the licence files of
    its source; `seen` as in `calibration_record`, `equivalence` the relative change of the logits."""
    online = _is_online(folder)
    note = "A float model with the function of the original." + (" Part of it runs online." if online else "")
    sections = {
        "How it was made": [
            *code("sh", rotate_command(request.source, request.recipe, request.used_calibration(seen))),
            *table([_model(request), _rotations(request.recipe), *_calibration(seen)]),
        ],
        "What was measured": table([_moved(equivalence)]),
        "How to open it": [note, "", *_opening(online), "`anequant quantize . -o OUT` goes on with it."],
    }
    _write(folder, request.source, "folded and rotated", {}, _library(online), [], sections)


def write_checkpoint_card(folder: Path, request: Request, seen: Mapping[str, Any] | None) -> None:
    """README.md of the quantized checkpoint in `folder`, whose config files are there; as above."""
    online = _is_online(folder)
    if online:
        note = "It rounds and turns activations while it runs, which stock transformers does not do."
    else:
        note = "The weights lie here dequantized in float16, their codebooks and scales beside them."
    source, recipe = request.source, request.recipe
    command = quantize_command(source, recipe, request.used_calibration(seen), rotated=_is_rotated(source))
    sections = {
        "How it was made": [*code("sh", command), *table(_choices(request, seen))],
        "What was measured": table(_errors(folder)),
        "How to open it": [
            note,
            "",
            *_opening(online),
            "`anequant lower . -o PACKAGES` makes packages of it.",
        ],
    }
    _write(folder, source, "quantized", QUANTIZED, _library(online), _recipe_tags(recipe), sections)


@dataclass(frozen=True)
class Checked:
    """What was found of a conversion's packages and of its asset; None for what there is not."""

    packages: PackageCheck | None
    asset: AssetCheck | None


def write_conversion_card(folder: Path, request: Request, checked: Checked, quality: Quality | None) -> None:
    """README.md of the whole conversion in `folder`, whose checkpoint is there; as above."""
    checkpoint = folder / CHECKPOINT_FOLDER
    source, recipe, seen = request.source, request.recipe, read_manifest(checkpoint)["calibration"]
    command = convert_command(
        source, recipe, request.used_calibration(seen), request.targets, rotated=_is_rotated(source)
    )
    agreement = [
        (
            f"{what} the checkpoint's token",
            f"{check.agreement:.1%} of {check.positions} positions, {check.ties} ties within rounding",
        )
        for what, check in (
            ("packages choose", checked.packages),
            ("asset chooses", checked.asset),
        )
        if check is not None
    ]
    note = f"`{CHECKPOINT_FOLDER}` is the quantized checkpoint"
    if request.lowering is not None:
        note += f", `{PACKAGES_FOLDER}` the Core ML packages and `meta.yaml`, for up to"
        note += f" {request.lowering.context} tokens; `--backend coreml` runs them on a Mac"
    if request.asset is not None:
        note += f", `{BUNDLE_FOLDER}` a bundle of Core AI for up to {request.asset.context} tokens"
    note += "."
    sections = {
        "How it was made": [*code("sh", command), *table(_choices(request, seen))],
        "What was measured": table([*_errors(checkpoint), *agreement, *_quality(quality)]),
        "How to open it": [
            *(note, ""),
            *code("sh", "anequant verify .", 'anequant generate . --prompt "Once upon a time"'),
        ],
    }
    _write(
        folder,
        source,
        "quantized",
        QUANTIZED,
        "anequant",
        [*request.targets.names, *_recipe_tags(recipe)],
        sections,
    )


def _write(
    folder: Path,
    source: Source,
    how: str,
    relation: Mapping[str, str],
    library: str,
    tags: Sequence[str],
    sections: Mapping[str, Sequence[str]],
) -> None:
    copy_license(source.folder, folder)
    licence, base, name = read_license(source.folder), _base_model(source), plain(source.name)
    metadata = {
        **({"base_model": base, **relation} if HUB_NAME.fullmatch(base) else {}),
        "library_name": library,
        **licence.metadata,
        "pipeline_tag": "text-generation",
        "tags": ["anequant", "apple-neural-engine", *tags],
    }
    origin = f"{name}, {how} by anequant {installed_versions()['anequant']} for Apple's Neural Engine."
    if _is_rotated(source):
        origin += f" {name} is {plain(base)} after `anequant rotate`; its anequant.json says how."
    said = [origin, f"Licence: {licence.said}"]
    (folder / CARD).write_text(card_page(metadata, name, said, sections), encoding="utf-8")


def _is_rotated(source: Source) -> bool:
    return read_rotation_keys(source.folder) is not None


def _is_online(folder: Path) -> bool:
    """Whether stock transformers does not run the checkpoint in `folder`."""
    return "quantization_config" in read_object(folder / "config.json")


def _library(online: bool) -> str:
    return "anequant" if online else "transformers"


def _base_model(source: Source) -> str:
    """The float model, by the hub's name where there is one; before `anequant rotate`, if that was run."""
    if not _is_rotated(source):
        return source.repo or source.name
    recorded = read_manifest(source.folder).get("source")
    names = recorded if isinstance(recorded, dict) else {}
    return str(names.get("repo") or names.get("name") or source.name)


def _recipe_tags(recipe: Recipe) -> list[str]:
    turned = any(kind != "none" for kind in (recipe.r1, recipe.r2, recipe.r3, recipe.r4))
    width = recipe.target_bits or recipe.bits
    return [*(["quarot"] if turned else []), f"{width:g}-bit"]


def _choices(request: Request, seen: Mapping[str, Any] | None) -> Rows:
    """The recipe in words; every key of it is in anequant.json."""
    recipe = request.recipe
    bits = f"{recipe.target_bits:g} of {recipe.mixed_bits}" if recipe.target_bits else str(recipe.bits)
    rows = [
        _model(request),
        _rotations(recipe),
        ("weights", f"{bits} bits, codebook {recipe.codebook}, scales {recipe.scales}, {recipe.rounding}"),
        ("head and embedding", f"{recipe.head_bits} and {recipe.embedding_bits} bits"),
    ]
    if recipe.quantizes_activations:
        rows.append(("activations", f"{recipe.activation_bits} bits, {recipe.activation_scales}"))
    if recipe.kv_bits < 16:
        rows.append(("KV cache", f"{recipe.kv_bits} bits"))
    if recipe.tunes:
        length = f"{recipe.tune} steps" if recipe.tune else f"{recipe.tune_minutes:g} minutes"
        rows.append(("distillation", length))
    return [*rows, *_calibration(seen)]


def _model(request: Request) -> tuple[str, str]:
    return ("model", model_word(request.source))


def _rotations(recipe: Recipe) -> tuple[str, str]:
    return ("rotations", f"R1 {recipe.r1}, R2 {recipe.r2}, online R3 {recipe.r3}, R4 {recipe.r4}")


def _calibration(seen: Mapping[str, Any] | None) -> Rows:
    if seen is None:
        return []
    tokens = f"{seen['windows']} windows of {seen['length']} tokens, seed {seen['seed']}"
    return [("calibration", f"{seen['source']}, {tokens}")]


def _moved(equivalence: float) -> tuple[str, str]:
    return ("folding and rotation moved logits by", f"{equivalence:.1e}, relative")


def _errors(checkpoint: Path) -> Rows:
    errors: dict[str, float] = read_object(checkpoint / "quantization_config.json")["quality_metrics"]
    return [
        _moved(errors["relative_logit_error_of_rotation"]),
        ("bits per weight, embedding and head included", f"{errors['bits_per_weight']:.2f}"),
        ("relative weight error, mean of tensors", f"{errors['mean_relative_weight_error']:.2%}"),
        ("relative weight error, worst tensor", f"{errors['largest_relative_weight_error']:.2%}"),
    ]


def _quality(quality: Quality | None) -> Rows:
    """On the bundled sample text, against the float model."""
    if quality is None:
        return [("quality", "not measured: the model comes without a tokenizer")]
    return [
        ("perplexity on the bundled sample", f"{quality.perplexity:.3f} ({quality.tokens} tokens)"),
        ("extra NLL against the float model", f"{quality.extra_nll:+.4f}"),
        ("KL from the float model", f"{quality.kl:.4f}"),
        ("same top token as the float model", f"{quality.top1:.1%}"),
    ]


def _opening(online: bool) -> list[str]:
    if online:
        return code("python", "import anequant", "", 'model = anequant.load(".")')
    line = 'model = AutoModelForCausalLM.from_pretrained(".")'
    return code("python", "from transformers import AutoModelForCausalLM", "", line)
