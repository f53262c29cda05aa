"""The Python API: the same as the command line, light to import, and the example that shows it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import re
import runpy
import shutil
import sys
from importlib import resources
from pathlib import Path

import click
import pytest
from conftest import REPOSITORY
from running import execute_python, succeed

import anequant
from anequant.checkpoints.source import BUNDLED_MODEL, SAMPLE_TEXT
from anequant.cli import main
from anequant.errors import UsageError
from anequant.jobs.output_folder import hash_files
from anequant.pipeline.lowering import LowerResult
from anequant.recipe import Recipe
from anequant.recipe_files import DEFAULT_RECIPE

EXAMPLE = REPOSITORY / "examples" / "quantize_and_verify.py"
FUNCTIONS = {
    "convert": "convert",
    "quantize": "quantize",
    "lower": "lower",
    "verify": "verify",
    "evaluate": "eval",
}
OF_TERMINAL = {"as_json", "quiet", "debug", "lm_eval", "apply_chat_template", "backend"}
"""Options about printing; and of tasks, which lm-evaluation-harness has an API of its own for."""


def test_importing_is_light_and_every_name_is_there() -> None:
    script = "import sys, anequant; print({'torch', 'transformers', 'coremltools'} & set(sys.modules))"
    ran = execute_python(script)
    assert ran.stdout == "set()\n", ran.stderr
    assert {*FUNCTIONS, "load"} < set(anequant.__all__)
    assert all(callable(getattr(anequant, name)) for name in anequant.__all__)


def test_it_is_typed() -> None:
    assert (resources.files("anequant") / "py.typed").is_file()
    for name in FUNCTIONS:
        for parameter in inspect.signature(getattr(anequant, name)).parameters.values():
            assert parameter.annotation is not parameter.empty, (name, parameter)


@pytest.mark.parametrize(("function", "command"), FUNCTIONS.items())
def test_options_and_defaults_are_those_of_the_command_line(function: str, command: str) -> None:
    """Keys of the recipe are options there and `keys` here."""
    ours = dict(inspect.signature(getattr(anequant, function)).parameters)
    has_keys = ours.pop("keys", None) is not None
    del ours["progress"]
    left_out = OF_TERMINAL | {field.name for field in dataclasses.fields(Recipe)}
    options = {str(option.name): option for option in main.commands[command].params}
    assert has_keys == ("bits" in options)
    if function == "evaluate":
        options["model"] = options.pop("checkpoint")
    options = {name: option for name, option in options.items() if name not in left_out}
    assert set(ours) == set(options)
    for name, parameter in ours.items():
        default = options[name].get_default(click.Context(main))
        named = default if isinstance(default, str | int | tuple) and default != "auto" else None
        named = DEFAULT_RECIPE if name == "recipe" else named
        assert parameter.default in (named, parameter.empty), name
        assert parameter.default is not parameter.empty or not isinstance(options[name].default, str | int)


def test_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(output)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    bits, quality, worst, packages, sentence = capsys.readouterr().out.splitlines()
    measured = json.loads((output / "anequant.json").read_text())["measured"]
    told = measured["quality"]
    assert quality == f"perplexity {told['perplexity']:.2f}, KL {told['kl']:.4f} from the float model"
    assert 5 < float(bits.split()[0]) < 12 and re.search(r"layers\.\d\.\S+, off by \d", worst)
    assert int(packages.split()[0]) == measured["verified"]["packages"]["weights"] > 28
    assert sentence.startswith("In the morning they went down to the ") and len(sentence.split()) > 15
    assert (output / "report.html").is_file() and "peak_memory_bytes" in (output / "report.json").read_text()


def test_a_mapping_and_keys_are_a_recipe_file_and_options(tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text('rounding = "nearest"\nbits = 8\n')
    result = anequant.quantize(
        BUNDLED_MODEL, tmp_path / "api", recipe={"rounding": "nearest", "bits": 8}, bits=4
    )
    told = json.loads(
        succeed(
            "quantize", BUNDLED_MODEL, "-o", tmp_path / "cli", "--recipe", recipe, "--bits", 4, "--json"
        ).stdout
    )
    assert {tensor.bits for tensor in result.rounding.tensors} == {4}
    assert json.loads(json.dumps(result.to_dict())) == {key: told[key] for key in result.to_dict()}
    assert hash_files(tmp_path / "api") == hash_files(tmp_path / "cli")
    checked = anequant.verify(str(tmp_path / "api"))
    assert checked.packages is None and checked.checkpoint is not None and checked.checkpoint.tensors == 28

    measured = anequant.evaluate(tmp_path / "api", SAMPLE_TEXT, base=BUNDLED_MODEL, windows=2, length=32)
    words = ("--text", SAMPLE_TEXT, "--base", BUNDLED_MODEL, "--windows", 2, "--length", 32, "--json")
    shown = succeed("eval", tmp_path / "api", *words).printed
    del shown["checkpoint"]
    assert json.loads(json.dumps(measured.to_dict())) == shown and measured.quality.kl is not None

    lowered = anequant.lower(tmp_path / "api", tmp_path / "packages", context=32, batch=8, chunks=2)
    assert isinstance(lowered, LowerResult) and len(lowered.packages) == 4
    with pytest.raises(UsageError, match="exists"):
        anequant.quantize(BUNDLED_MODEL, tmp_path / "api", recipe="w4-nearest")


def test_a_wrong_recipe_is_noticed_before_the_model_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown recipe key 'bitz'"):
        anequant.quantize("no/such", tmp_path / "out", recipe="w4-nearest", bitz=4)
    with pytest.raises(UsageError, match="unknown recipe 'w4-nearst'"):
        anequant.convert("no/such", tmp_path / "out", recipe="w4-nearst")
    assert not any(tmp_path.iterdir())


def test_what_is_ignored_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, model)
    (model / "modeling_own.py").write_text("raise SystemExit")
    with caplog.at_level(logging.WARNING, "anequant"), pytest.raises(UsageError, match="exists"):
        anequant.quantize(model, tmp_path, recipe="w8-nearest")
    assert "modeling_own.py" in caplog.text
