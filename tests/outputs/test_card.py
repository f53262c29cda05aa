"""README.md of an output: the hub reads its front matter, its command makes the output again, it names no
machine and no day."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from huggingface_hub import ModelCard

from anequant.checkpoints.license import read_license
from anequant.checkpoints.source import BUNDLED_MODEL, Source
from anequant.cli import main
from anequant.cli.options import read_calibration, read_recipe
from anequant.cli.target_options import read_lowering
from anequant.errors import UsageError
from anequant.lower_options import AssetOptions, LowerOptions, Targets
from anequant.outputs.command_line import convert_command, quantize_command
from anequant.pipeline.quantize import quantize
from anequant.pipeline.rotate import rotate
from anequant.recipe import Calibration, Recipe
from anequant.recipe_files import load_recipe, named_recipes
from anequant.request import Request
from anequant.verification.verify import verify_checkpoint

NEAREST = load_recipe("w4-nearest")
HUB = Source(BUNDLED_MODEL, "some-model", "c0ffee", "org/some-model")


def front_matter(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    metadata: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    assert ModelCard(text).data.to_dict() == metadata  # huggingface_hub reads the same
    return metadata


def options_of(command: str) -> tuple[str, dict[str, Any]]:
    """The verb of a printed command, and its options as click reads them."""
    program, verb, *words = shlex.split(command)
    assert program == "anequant"
    context = click.Context(main)
    with main.commands[verb].make_context(verb, words, context) as inner:
        return verb, inner.params


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "out"
    quantize(Request(HUB, NEAREST), folder)
    return folder


def test_front_matter(written: Path) -> None:
    assert front_matter(written) == {
        "base_model": "org/some-model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["anequant", "apple-neural-engine", "quarot", "4-bit"],
    }


def test_the_card_has_what_was_measured_and_is_hashed(written: Path) -> None:
    text = (written / "README.md").read_text(encoding="utf-8")
    manifest = json.loads((written / "anequant.json").read_text(encoding="utf-8"))
    assert "README.md" in manifest["files"]
    assert f"| {manifest['measured']['bits_per_weight']:.2f} |" in text
    errors = [tensor["relative_error"] for tensor in manifest["measured"]["tensors"]]
    assert f"| {max(errors):.2%} |" in text and f"| {sum(errors) / len(errors):.2%} |" in text
    assert "anequant quantize org/some-model@c0ffee -o OUT --recipe w4-nearest\n" in text
    verify_checkpoint(written)


def test_the_card_names_no_machine_and_no_day(written: Path, tmp_path: Path) -> None:
    text = (written / "README.md").read_text(encoding="utf-8")
    assert str(BUNDLED_MODEL) not in text and str(written.parent) not in text
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b|(?<![\w`.])/\w+/", text.split("---\n", 2)[2])
    quantize(Request(HUB, NEAREST), tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8") == text


def test_the_python_of_the_card_opens_the_model(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (written / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(written)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["model"].num_parameters() > 1e6


def test_a_model_with_more_than_weights_is_opened_by_anequant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(Request(HUB, load_recipe("w4-nearest", {"activation_bits": 8, "kv_bits": 8})), tmp_path / "out")
    metadata = front_matter(tmp_path / "out")
    assert metadata["library_name"] == "anequant"
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| activations | 8 bits, dynamic |" in text and "| KV cache | 8 bits |" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    exec(code, {})


def test_a_folder_whose_name_the_hub_would_refuse_is_no_base_model(tmp_path: Path) -> None:
    quantize(Request(Source(BUNDLED_MODEL, "my model | (old)"), NEAREST), tmp_path / "out")
    assert "base_model" not in front_matter(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "# my model \\| (old)\n" in text


def test_what_rotate_writes_hands_base_and_licence_on(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", "llama", True)
    (model / "README.md").write_text("---\nlicense: llama3.2\n---\n", encoding="utf-8")
    (model / "NOTICE").write_text("Theirs.", encoding="utf-8")
    recipe = load_recipe("w4-nearest", {"r1": "hadamard", "r3": "hadamard"})
    rotate(Request(Source(model, "some-model", "c0ffee", "org/some-model"), recipe), tmp_path / "turned")
    quantize(Request(Source(tmp_path / "turned", "turned"), recipe), tmp_path / "out")
    turned, out = front_matter(tmp_path / "turned"), front_matter(tmp_path / "out")
    assert turned["base_model"] == out["base_model"] == "org/some-model"
    assert turned["license"] == out["license"] == "llama3.2"
    assert "base_model_relation" not in turned and out["base_model_relation"] == "quantized"
    assert (tmp_path / "out" / "NOTICE").read_text(encoding="utf-8") == "Theirs."
    text = (tmp_path / "turned" / "README.md").read_text(encoding="utf-8")
    verb, options = options_of(re.findall(r"^anequant rotate .*$", text, re.MULTILINE)[0])
    assert (verb, read_recipe(options)) == ("rotate", recipe)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "anequant quantize turned -o OUT --recipe w4-nearest --r1 hadamard --r3 hadamard\n" in text
    assert "turned is org/some-model after `anequant rotate`" in text


# The command


CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"bits": 6, "seed": 7},
    {"fold_input_scales": True, "tune": 3},
    {"activation_bits": 8, "activation_symmetric": False, "activation_overrides": "down_proj=16"},
    {"target_bits": 4.25, "mixed_bits": "4,6,8", "correction": 0.25},
    {"r1": "none", "r2": "none", "scales": "output", "head_bits": 6},
)


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "plain")
@pytest.mark.parametrize("name", ["w4-ane", "w4-nearest", "w8a8-ane"])
@pytest.mark.parametrize("target", ["coreml", "coreai", "both"])
def test_the_command_is_the_recipe(name: str, changes: dict[str, Any], target: str) -> None:
    try:
        recipe = load_recipe(name, changes)
    except UsageError as error:
        pytest.skip(f"no recipe: {error.what}")
    calibration = Calibration(("/somewhere/text.txt",), 8, 128, 3)
    options_of_target = {
        "coreml": Targets(LowerOptions(context=256, chunks=2, argmax=True, prefix="mine")),
        "coreai": Targets(asset=AssetOptions(context=1024, ladder=(1, 8), kv="functional")),
        "both": Targets(LowerOptions(context=1024, batch=16), AssetOptions(context=1024)),
    }
    targets = options_of_target[target]
    command = convert_command(HUB, recipe, calibration, targets, rotated=False)
    assert "/somewhere" not in command
    _, options = options_of(command)
    assert read_recipe(options) == recipe
    assert read_calibration(options) == Calibration(("text.txt",), 8, 128, 3)
    assert read_lowering(options) == targets


@pytest.mark.parametrize("name", sorted(named_recipes()))
def test_a_named_recipe_is_called_by_its_name(name: str) -> None:
    command = quantize_command(HUB, load_recipe(name), Calibration(), rotated=False)
    named = "" if name == "w4-ane" else f" --recipe {name}"
    assert command == f"anequant quantize org/some-model@c0ffee -o OUT{named}"


def test_rotations_from_a_file_are_named_as_the_output_keeps_them() -> None:
    recipe = Recipe(r1="file")
    assert "--rotations rotations.safetensors" in quantize_command(HUB, recipe, Calibration(), rotated=False)
    assert "--rotations" not in quantize_command(HUB, recipe, Calibration(), rotated=True)


# The licence


@pytest.mark.parametrize(
    ("files", "metadata", "said"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\n# x"}, {"license": "apache-2.0"}, "apache-2.0"),
        (
            {"README.md": "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"},
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
            "card says",
        ),
        (
            {"README.md": "---\ntags: [a]\n---\n", "LICENSE.txt": "Do what you like."},
            {"license": "other", "license_name": "as-the-base-model", "license_link": "LICENSE.txt"},
            "`LICENSE.txt`",
        ),
        ({"README.md": "no front matter"}, {}, "names none"),
        ({"README.md": "---\nlicense: !!python/name:os.system\n---\n"}, {}, "cannot be read"),
        ({"README.md": "---\nlicense: &a [*a]\n---\n"}, {}, "cannot be read"),
        ({"README.md": "---\nlicense: [mit, other]\n---\n"}, {}, "names none"),
        ({"README.md": f"---\nlicense: {'x' * 400}\n---\n"}, {}, "names none"),
        ({"README.md": "---\nlicense: 'a\\x1b'\n"}, {}, "names none"),
        ({}, {}, "it has no README.md"),
    ],
)
def test_the_licence_is_the_sources(
    tmp_path: Path, files: dict[str, str], metadata: dict[str, str], said: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = read_license(tmp_path)
    assert found.metadata == metadata
    assert said in found.said


def test_licence_files_come_along(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", True)
    (model / "LICENSE").write_text("Terms.", encoding="utf-8")
    (model / "README.md").write_text("---\nlicense: llama3.2\n---\n# Theirs\n", encoding="utf-8")
    quantize(Request(Source(model, "model"), NEAREST), tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "Terms."
    assert front_matter(tmp_path / "out")["license"] == "llama3.2"
    assert "Theirs" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    manifest = json.loads((tmp_path / "out" / "anequant.json").read_text(encoding="utf-8"))
    assert {"LICENSE", "README.md"} <= set(manifest["files"])
