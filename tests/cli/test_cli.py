"""The command line as a user meets it: what it writes, says and refuses, and with which exit code."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from files import edit_json
from hub import HTTP
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from running import SCRIPT, Ran, execute, invoke

from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.cli import console
from anequant.errors import InputError
from anequant.pipeline import rounder
from anequant.quantization.calibrated import quantize_calibrated
from anequant.recipe import Recipe
from anequant.recipe_files import DEFAULT_RECIPE, load_recipe
from anequant.targets.coreml import build as lower_package
from anequant.targets.coreml.interpreter.interpreter import Package
from anequant.targets.coreml.program.package import save_package

SUCCESS, USAGE, INPUT, UNSUPPORTED, RESOURCE, VERIFICATION, INTERRUPTED = 0, 2, 3, 4, 5, 6, 130
pytestmark = pytest.mark.usefixtures("no_progress")

LINEARS = 4 * 7
"""Quantized projections of the bundled model."""

CONTEXT, BATCH, CHUNKS = 32, 8, 2
FEW_TOKENS = ("--calib-samples", 6, "--calib-length", 64)
SIZES = ("--context", CONTEXT, "--batch", BATCH, "--chunks", CHUNKS)
EVAL = ("--text", SAMPLE_TEXT, "--windows", 2, "--length", 32)
TENSOR_FIELDS = {"name", "bits", "weights", "relative_error", "damping", "dead_inputs"}
PACKAGE_FIELDS = {"name", "weight_bytes", "constant_bytes", "graph_bytes"}
CHECK_FIELDS = {
    *("weights", "prefill_tokens", "positions", "agreement", "ties", "relative_error", "rounding"),
}
QUALITY_FIELDS = {
    *("windows", "tokens", "perplexity", "base_perplexity", "kl_percentiles", "by_window"),
    *(f"{name}{part}" for name in ("nll", "extra_nll", "kl", "top1") for part in ("", "_error", "_interval")),
}
EVAL_FIELDS = {"checkpoint", "text", "bits", "noise_floor", "layers", "layers_missing"} | QUALITY_FIELDS
WEIGHT_BIN = "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture
def all_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SHOW_AFTER", 0.0)
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)


def run(*args: object) -> Ran:
    """The command in this process; SystemExit becomes an exit code, any other exception fails a test.

    What calibrates sees a few short windows, unless a test says which.
    """
    words = [str(arg) for arg in args]
    if words[:1] in (["quantize"], ["convert"]) and "--calib-samples" not in words:
        words += ["--calib-samples", "3", "--calib-length", "32"]
    return invoke(*words)


def run_installed(*args: object, folder: Path) -> Ran:
    """The installed command in a process of its own."""
    return execute(SCRIPT, *args, folder=folder, env={"OMP_NUM_THREADS": "1"})


def succeed(*args: object) -> Ran:
    """The command in this process, which says nothing on stderr."""
    result = run(*args)
    assert (result.exit_code, result.stderr) == (SUCCESS, "")
    return result


def report(*args: object) -> dict[str, Any]:
    """The one JSON object that a successful `--json` run prints."""
    return succeed(*args, "--json").printed


def snapshot(*roots: Path) -> dict[str, str]:
    """Everything below the roots, hidden files included: files by hash, links by target, folders by name."""

    def state(path: Path) -> str:
        if path.is_symlink():
            return f"-> {os.readlink(path)}"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"

    return {str(path): state(path) for root in roots for path in [root, *sorted(root.rglob("*"))]}


def refused(result: Ran, code: int, *words: str) -> list[str]:
    """Check how a command failed: its exit code, and a first line that names the thing; the lines."""
    lines = result.stderr.splitlines()
    assert result.exit_code == code, result
    assert lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
    assert "Traceback" not in result.stderr
    return lines


def assert_refused(root: Path, args: tuple[object, ...], code: int, *words: str) -> list[str]:
    """Run, check how it failed, and that nothing below `root` was added, changed or removed."""
    before = snapshot(root)
    lines = refused(run(*args), code, *words)
    assert snapshot(root) == before
    return lines


def read(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def recipe_of(checkpoint: Path) -> dict[str, Any]:
    recipe = read(checkpoint / "anequant.json")["recipe"]
    assert isinstance(recipe, dict)
    return recipe


def flip(path: Path, offset: int, mask: int = 0xFF) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


@dataclass(frozen=True)
class Made:
    """A folder that a command wrote, and the JSON it printed about it."""

    folder: Path
    report: dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("quantized") / "checkpoint"
    return Made(folder, report("quantize", tiny_qwen2, "-o", folder))


@pytest.fixture(scope="module")
def packages(checkpoint: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("lowered") / "packages"
    return Made(folder, report("lower", checkpoint.folder, "-o", folder, *SIZES))


@pytest.fixture(scope="module")
def random_model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Width 128, three layers, several shards, no tokenizer."""
    folder = make_model(tmp_path_factory.mktemp("random") / "model", "llama", False, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def model(random_model: Path, tmp_path: Path) -> Path:
    """A copy of `random_model` in the test's own folder, to damage."""
    return shutil.copytree(random_model, tmp_path / "model")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A path two folders below any that exists."""
    return tmp_path / "new" / "folder" / "out"


# The installed command


def test_help_and_version(tmp_path: Path) -> None:
    shown = run_installed("--help", folder=tmp_path)
    assert (shown.exit_code, shown.stderr) == (SUCCESS, "")
    for word in ("quantize", "lower", "convert", "verify", "eval", "generate", "6    verification failed"):
        assert word in shown.stdout
    version = run_installed("--version", folder=tmp_path)
    assert (version.exit_code, version.stderr) == (SUCCESS, "")
    assert importlib.metadata.version("anequant") in version.stdout


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    home = tmp_path_factory.mktemp("converted")
    return home / "out", run_installed(
        *("convert", "-o", "out", "--context", 32, "--batch", 16, *FEW_TOKENS),
        folder=home,
    )


def test_convert_without_a_model_converts_the_bundled_one(
    converted: tuple[Path, Ran],
) -> None:
    folder, ran = converted
    assert ran.exit_code == SUCCESS, ran.stderr
    note, *progress = ran.stderr.splitlines()
    assert note == "no model named: converting the bundled tiny-qwen2"
    assert [line for line in progress if not line.startswith("convert: ")] == []
    for word in ("checkpoint", "packages", "verified", "note", "perplexity", "base"):
        assert any(line.startswith(word) for line in ran.stdout.splitlines()), word
    assert "convert: " not in ran.stdout and "bundled" not in ran.stdout
    assert {path.name for path in folder.parent.iterdir()} == {"out"}
    files = {"README.md", "anequant.json", "report.html", "report.json"}
    assert {path.name for path in folder.iterdir()} == {*files, "checkpoint", "packages"}


def test_what_convert_wrote_verifies(converted: tuple[Path, Ran]) -> None:
    checked = report("verify", converted[0])
    assert checked["folder"] == str(converted[0])
    assert checked["checkpoint"] == {"tensors": LINEARS}
    assert checked["packages"].keys() == CHECK_FIELDS
    assert checked["packages"]["weights"] == LINEARS
    assert checked["packages"]["agreement"] >= 0.99


def test_convert_reports_all_steps_as_json(tiny_qwen2: Path, output: Path) -> None:
    values = report("convert", tiny_qwen2, "-o", output, "--context", 32, "--batch", 16, *FEW_TOKENS)
    assert values.keys() == {
        *("model", "output", "quantized", "lowered", "lowered_asset", "verified", "lint", "quality"),
    }
    assert (values["model"], values["output"]) == ("tiny-qwen2", str(output))
    assert values["verified"].keys() == {"checkpoint", "packages", "asset"}
    assert values["lowered_asset"] is values["verified"]["asset"] is None
    assert values["quality"].keys() == QUALITY_FIELDS
    assert 0 < values["quality"]["kl"] < 0.2
    measured = read(output / "anequant.json")["measured"]
    assert len(measured) == 6
    assert_close(measured, {key: values[key] for key in measured})


def assert_close(kept: Any, printed: Any) -> None:
    """The manifest keeps six digits of what the command prints in full."""
    if isinstance(kept, dict):
        assert kept.keys() == printed.keys()
        for key, value in kept.items():
            assert_close(value, printed[key])
    elif isinstance(kept, list):
        for value, other in zip(kept, printed, strict=True):
            assert_close(value, other)
    else:
        assert kept == (pytest.approx(printed, rel=1e-5) if isinstance(printed, float) else printed)


def test_an_error_in_a_process_of_its_own(tmp_path: Path) -> None:
    ran = run_installed("quantize", "nowhere", "-o", "a/b/out", folder=tmp_path)
    refused(ran, INPUT, "'nowhere' does not exist")
    assert ran.stdout == ""
    assert list(tmp_path.iterdir()) == []


# quantize, lower, verify, eval, generate


def test_quantize_reports_every_tensor(checkpoint: Made) -> None:
    values = checkpoint.report
    assert values.keys() == {
        "output",
        "equivalence",
        "bits_per_weight",
        "tensors",
        "static_scales",
        "tuning",
        "rotations",
        "rotated_before",
    }
    assert values["rotations"] is None and values["rotated_before"] is False
    assert values["output"] == str(checkpoint.folder)
    assert 0 <= values["equivalence"] < 1e-5
    assert 4 < values["bits_per_weight"] < 16
    assert len(values["tensors"]) == LINEARS
    for tensor in values["tensors"]:
        assert tensor.keys() == TENSOR_FIELDS
        assert tensor["bits"] == 4 and 0.01 < tensor["relative_error"] < 0.2


def test_lower_reports_every_package(packages: Made) -> None:
    assert packages.report.keys() == {"output", "packages", "headroom"}
    assert packages.report["output"] == str(packages.folder)
    sizes = packages.report["packages"]
    written = {path.stem: path for path in packages.folder.glob("*.mlpackage")}
    assert [size["name"] for size in sizes] == [*sorted(written, key=_running_order)]
    assert len(sizes) == CHUNKS + 2
    for size in sizes:
        assert size.keys() == PACKAGE_FIELDS
        assert size["weight_bytes"] == (written[size["name"]] / WEIGHT_BIN).stat().st_size


def _running_order(name: str) -> tuple[int, str]:
    return (0 if "embeddings" in name else 2 if "lm_head" in name else 1), name


def test_verify_reports_packages_against_their_checkpoint(checkpoint: Made, packages: Made) -> None:
    values = report("verify", packages.folder, "--checkpoint", checkpoint.folder)
    assert values.keys() == {"folder", "checkpoint", "packages", "asset"}
    assert (values["folder"], values["checkpoint"]) == (str(packages.folder), None)
    assert values["packages"].keys() == CHECK_FIELDS
    assert values["packages"]["weights"] == LINEARS


def test_verify_reports_a_checkpoint(checkpoint: Made) -> None:
    assert report("verify", checkpoint.folder) == {
        "folder": str(checkpoint.folder),
        "checkpoint": {"tensors": LINEARS},
        "packages": None,
        "asset": None,
    }


def test_eval_reports_the_quality(checkpoint: Made, tiny_qwen2: Path) -> None:
    values = report("eval", checkpoint.folder, *EVAL, "--base", tiny_qwen2)
    assert values.keys() == EVAL_FIELDS
    assert values["checkpoint"] == str(checkpoint.folder)
    assert (values["windows"], values["tokens"]) == (2, 2 * 31)
    assert 10 < values["base_perplexity"] < 200 and 0 < values["kl"] < 1 and 0.5 < values["top1"] <= 1


def test_eval_without_a_base_leaves_the_comparison_out(tiny_qwen2: Path) -> None:
    values = report("eval", tiny_qwen2, *EVAL)
    assert values.keys() == EVAL_FIELDS
    missing = ("base_perplexity", "extra_nll", "kl", "kl_interval", "top1", "noise_floor", "bits")
    assert all(values[key] is None for key in missing)
    assert values["perplexity"] > 1


def test_eval_of_one_window_is_still_json(tiny_qwen2: Path) -> None:
    """The standard error over one window is not a number."""
    values = report("eval", tiny_qwen2, "--text", SAMPLE_TEXT, "--windows", 1, "--length", 32)
    assert values["windows"] == 1


def test_eval_agrees_with_stock_transformers(
    checkpoint: Made, tiny_qwen2: Path, shared: Path, eval_text: Path, tmp_path: Path
) -> None:
    judge = shared / "tools" / "hf_quality.py"
    if not judge.is_file():
        pytest.skip(f"needs '{judge}'")
    text = tmp_path / "text.txt"
    text.write_text(eval_text.read_text(encoding="utf-8")[:100_000], encoding="utf-8")
    windows = ("--windows", "4", "--length", "128")
    words = (sys.executable, judge, tiny_qwen2, checkpoint.folder, text, *windows)
    judged = execute(*words, env={"OMP_NUM_THREADS": "1"})
    assert judged.exit_code == 0, judged.stderr
    expected = json.loads(judged.stdout.splitlines()[-1])
    ours = report("eval", checkpoint.folder, "--base", tiny_qwen2, "--text", text, *windows)
    assert ours["perplexity"] == pytest.approx(expected["ppl"], rel=1e-3)
    assert ours["base_perplexity"] == pytest.approx(expected["base_ppl"], rel=1e-3)
    assert ours["extra_nll"] == pytest.approx(expected["dnll"], abs=1e-3)
    assert ours["kl"] == pytest.approx(expected["kl"], abs=1e-3)
    assert expected["kl"] > 0.01


def test_generate_continues_the_prompt(packages: Made) -> None:
    shown = succeed("generate", packages.folder, "--prompt", "The old house stood", "--max-tokens", 4).stdout
    assert shown.startswith("The old house stood") and len(shown.rstrip("\n")) > len("The old house stood")
    values = report("generate", packages.folder, "--prompt", "The old house stood", "--max-tokens", 4)
    assert values == {"text": shown.removesuffix("\n")}


def test_quiet_says_nothing(tiny_qwen2: Path, tmp_path: Path, all_progress: None) -> None:
    quantized, lowered = tmp_path / "quantized", tmp_path / "lowered"
    for args in (
        ("quantize", tiny_qwen2, "-o", quantized, *FEW_TOKENS),
        ("lower", quantized, "-o", lowered, *SIZES),
        ("verify", lowered, "--checkpoint", quantized),
        ("verify", quantized),
        ("eval", quantized, *EVAL, "--base", tiny_qwen2),
        ("convert", "-o", tmp_path / "converted", "--context", 16, "--batch", 8, *FEW_TOKENS),
    ):
        result = run(*args, "--quiet")
        assert (result.exit_code, result.stdout, result.stderr) == (SUCCESS, "", ""), (args, result.stderr)
    assert (quantized / "model.safetensors").is_file() and (lowered / "meta.yaml").is_file()


def test_quiet_generate_says_nothing(packages: Made) -> None:
    """--quiet: "Print errors only.\""""
    result = succeed("generate", packages.folder, "--prompt", "The", "--max-tokens", 1, "--quiet")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("words", "head", "embedding", "projections"),
    [
        (("--lut-head", "6", "--lut-ffn", "8", "--lut-embeddings", "none"), 6, 16, 8),
        (("--head-bits", "none", "--bits", "4", "--embedding-bits", "8"), 16, 8, 4),
    ],
)
def test_widths_by_anemlls_words(
    random_model: Path, output: Path, words: tuple[str, ...], head: int, embedding: int, projections: int
) -> None:
    succeed("quantize", random_model, "-o", output, "--recipe", "w4-nearest", *words)
    recipe = recipe_of(output)
    assert (recipe["head_bits"], recipe["embedding_bits"], recipe["bits"]) == (head, embedding, projections)


@pytest.mark.parametrize(
    ("word", "steps", "minutes"), [("7", 7, 0.0), ("30min", 0, 30.0), ("0.5min", 0, 0.5)]
)
def test_tuning_takes_steps_or_minutes(word: str, steps: int, minutes: float) -> None:
    recipe = json.loads(succeed("plan", "--tune", word, "--json").stdout)["recipe"]
    assert (recipe["tune"], recipe["tune_minutes"]) == (steps, minutes)


@pytest.mark.parametrize("word", ["min", "1.5", "30s", "half a min", ""])
def test_what_is_neither_steps_nor_minutes_is_refused(random_model: Path, output: Path, word: str) -> None:
    result = run("quantize", random_model, "-o", output, "--tune", word)
    assert result.exit_code == 2 and not output.exists()
    assert f"'{word}' is neither a number of steps nor of minutes, as in 30min" in " ".join(
        result.stderr.split()
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_progress_goes_to_stderr(random_model: Path, output: Path, all_progress: None, as_json: bool) -> None:
    result = run("quantize", random_model, "-o", output, *(["--json"] if as_json else []))
    assert result.exit_code == SUCCESS
    lines = result.stderr.splitlines()
    assert any("layer 2 of 3" in line for line in lines)
    assert all(line.startswith("quantize: ") and "%" in line for line in lines)
    assert "layer 2 of 3" not in result.stdout and "quantize: " not in result.stdout
    if as_json:
        assert result.printed["output"] == str(output)
    else:
        assert result.stdout.startswith(f"checkpoint    {output}\n")


# Recipes


def test_the_default_recipe_is_recorded(random_model: Path, output: Path) -> None:
    succeed("quantize", random_model, "-o", output)
    assert recipe_of(output) == load_recipe(DEFAULT_RECIPE).to_dict()


def test_a_named_recipe_and_options_that_override_it(random_model: Path, output: Path) -> None:
    overrides = ("--bits", "8", "--r1", "random", "--seed", "5", "--head-bits", "8")
    succeed("quantize", random_model, "-o", output, "--recipe", "w_int4_per_tensor", *overrides)
    named = load_recipe("w_int4_per_tensor").to_dict()
    assert recipe_of(output) == {**named, "bits": 8, "r1": "random", "seed": 5, "head_bits": 8}
    assert recipe_of(output)["scales"] == "tensor"
    assert read(output / "quantization_config.json")["weight_bits"] == 8


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.toml", 'scales = "output"\nbits = 8\nr1_block = 32\n'),
        ("own.json", '{"scales": "output", "bits": 8, "r1_block": 32}'),
        ("own.yaml", "scales: output\nbits: 8\nr1_block: 32\n"),
    ],
)
def test_a_recipe_file_and_an_option_that_overrides_it(
    random_model: Path, tmp_path: Path, output: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    succeed("quantize", random_model, "-o", output, "--recipe", tmp_path / name, "--r1-block", 16)
    assert recipe_of(output) == {**Recipe().to_dict(), "scales": "output", "bits": 8, "r1_block": 16}


def test_an_unknown_recipe_key_gets_a_suggestion(model: Path, tmp_path: Path, output: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('roundin = "nearest"\n', encoding="utf-8")
    args = ("quantize", model, "-o", output, "--recipe", path)
    lines = assert_refused(tmp_path, args, USAGE, "unknown recipe key 'roundin'")
    assert lines[-1].endswith("did you mean 'rounding'?")


def test_an_unknown_recipe_gets_a_suggestion(model: Path, tmp_path: Path, output: Path) -> None:
    args = ("quantize", model, "-o", output, "--recipe", "w4-neerest")
    lines = assert_refused(tmp_path, args, USAGE, "unknown recipe 'w4-neerest'")
    assert lines[-1].endswith("did you mean 'w4-nearest'?")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gone.toml", None, ("gone.toml' does not exist",)),
        ("broken.toml", "bits = ", ("broken.toml' cannot be read",)),
        ("list.json", "[4]", ("list.json' holds no table",)),
        ("word.yaml", "bits: four\n", ("'bits' must be a whole number", "'four'")),
        ("flag.json", '{"bits": true}', ("'bits' must be a whole number", "True")),
    ],
)
def test_a_wrong_recipe_file(
    model: Path, tmp_path: Path, output: Path, name: str, text: str | None, words: tuple[str, ...]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    args = ("quantize", model, "-o", output, "--recipe", tmp_path / name)
    assert_refused(tmp_path, args, USAGE, *words)


# Bad models


def no_folder(model: Path) -> Path:
    shutil.rmtree(model)
    return model


def a_file(model: Path) -> Path:
    return model / "config.json"


def unknown_architecture(model: Path) -> Path:
    edit_json(model / "config.json", model_type="gpt_neox")
    return model


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def truncated_shard(model: Path) -> Path:
    os.truncate(shards(model)[1], shards(model)[1].stat().st_size - 100)
    return model


def missing_shard(model: Path) -> Path:
    shards(model)[-1].unlink()
    return model


def no_config(model: Path) -> Path:
    (model / "config.json").unlink()
    return model


def quantized_elsewhere(model: Path) -> Path:
    edit_json(model / "config.json", quantization_config={"quant_method": "gptq"})
    return model


@pytest.mark.parametrize("command", ["quantize", "convert"])
@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (no_folder, INPUT, ("/model' does not exist",)),
        (a_file, INPUT, ("config.json' is a file",)),
        (no_config, INPUT, ("'config.json' is missing",)),
        (unknown_architecture, UNSUPPORTED, ("unknown architecture", "gpt_neox")),
        (truncated_shard, INPUT, ("model-00002-of-", "truncated")),
        (missing_shard, INPUT, ("shard 'model-", "is missing")),
        (quantized_elsewhere, INPUT, ("/model' is already quantized", "gptq")),
    ],
)
def test_a_bad_model(
    model: Path,
    tmp_path: Path,
    output: Path,
    command: str,
    damage: Callable[[Path], Path],
    code: int,
    words: tuple[str, ...],
) -> None:
    lines = assert_refused(tmp_path, (command, damage(model), "-o", output), code, *words)
    if damage is unknown_architecture:
        assert all(name in lines[-1] for name in ("llama", "mistral", "qwen2", "qwen3"))


def test_our_own_output_is_no_model_to_quantize(checkpoint: Made, tmp_path: Path, output: Path) -> None:
    before = snapshot(checkpoint.folder)
    args = ("quantize", checkpoint.folder, "-o", output)
    assert_refused(tmp_path, args, INPUT, "checkpoint' is already quantized")
    assert snapshot(checkpoint.folder) == before


def test_an_error_as_json(model: Path, tmp_path: Path, output: Path) -> None:
    before = snapshot(tmp_path)
    result = run("quantize", unknown_architecture(model), "-o", output, "--json")
    error = result.printed["error"]
    lines = refused(result, UNSUPPORTED, error["what"])
    assert error.keys() == {"what", "where", "remedy", "exit_code"}
    assert error["exit_code"] == UNSUPPORTED and "gpt_neox" in error["what"]
    assert error["where"] in lines[1] and error["remedy"] in lines[2]
    assert snapshot(tmp_path).keys() == before.keys()


# Wrong options


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--bits", 5), USAGE, ("'bits' cannot be 5",)),
        (("--r1", "spiral"), USAGE, ("'r1' cannot be 'spiral'",)),
        (("--seed", -1), USAGE, ("'seed' is -1",)),
        (("--r1-block", 48), USAGE, ("'r1_block' is 48",)),
        (("--r1-block", 256), USAGE, ("block of 256", "width of 128")),
    ],
)
def test_a_wrong_recipe_option(
    model: Path, tmp_path: Path, output: Path, options: tuple[object, ...], code: int, words: tuple[str, ...]
) -> None:
    assert_refused(tmp_path, ("quantize", model, "-o", output, *options), code, *words)


def test_a_seed_too_large_for_the_generator(model: Path, tmp_path: Path, output: Path) -> None:
    assert_refused(tmp_path, ("quantize", model, "-o", output, "--seed", 2**64), USAGE, "seed")


@pytest.mark.parametrize("option", [("--bits", "four"), ("--bitz", "4")])
def test_click_names_an_option_that_it_refuses(model: Path, output: Path, option: tuple[str, str]) -> None:
    result = run("quantize", model, "-o", output, *option)
    assert result.exit_code == USAGE
    assert f"'{option[0]}'" in result.stderr or f"{option[0]}" in result.stderr.splitlines()[-1]
    assert not output.exists()


def test_a_width_without_a_hadamard_matrix(
    make_model: Callable[..., Path], tmp_path: Path, output: Path
) -> None:
    model = make_model(tmp_path / "model", "llama", True, hidden_size=92)
    args = ("quantize", model, "-o", output, "--r1", "hadamard")
    assert_refused(tmp_path, args, UNSUPPORTED, "no Hadamard matrix of order 92")
    succeed("quantize", model, "-o", output, "--r1", "block-hadamard", "--r1-block", 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--context", 50, "--batch", 8), ("50", "8")),
        (("--context", 8, "--batch", 16), ("--batch is 16",)),
        (("--context", 32, "--batch", 8, "--chunks", 5), ("--chunks is 5", "4")),
        (("--context", 32, "--batch", 1), ("--batch is 1",)),
    ],
)
def test_impossible_sizes(
    checkpoint: Made, tmp_path: Path, output: Path, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    before = snapshot(checkpoint.folder)
    assert_refused(tmp_path, ("lower", checkpoint.folder, "-o", output, *options), USAGE, *words)
    assert snapshot(checkpoint.folder) == before


def test_lower_needs_a_quantized_checkpoint(model: Path, tmp_path: Path, output: Path) -> None:
    lines = assert_refused(tmp_path, ("lower", model, "-o", output), INPUT, "/model' is not quantized")
    assert "anequant quantize" in lines[-1]


def test_lower_of_a_checkpoint_without_a_manifest(checkpoint: Made, tmp_path: Path, output: Path) -> None:
    """As ANEMLL's own are. Lowering and refusing it are both fine; a traceback is not."""
    copy = shutil.copytree(checkpoint.folder, tmp_path / "copy")
    (copy / "anequant.json").unlink()
    before = snapshot(copy)
    result = run("lower", copy, "-o", output, *SIZES)
    if result.exit_code != SUCCESS:
        refused(result, INPUT, "anequant.json")
    assert output.is_dir() == (result.exit_code == SUCCESS)
    assert snapshot(copy) == before


def test_eval_needs_a_base_with_the_same_tokens(checkpoint: Made, model: Path, tmp_path: Path) -> None:
    args = ("eval", checkpoint.folder, *EVAL, "--base", model)
    assert_refused(tmp_path, args, INPUT)


@pytest.mark.parametrize("text", [None, "A few words."])
def test_eval_needs_a_text(tiny_qwen2: Path, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    words = "text.txt' cannot be read" if text is None else "one window needs 511"
    assert_refused(tmp_path, ("eval", tiny_qwen2, "--text", path), USAGE, words)


def test_a_prompt_longer_than_the_context(packages: Made) -> None:
    before = snapshot(packages.folder)
    result = run("generate", packages.folder, "--prompt", "hello " * CONTEXT)
    lines = refused(result, USAGE, f"the model holds 1 to {CONTEXT}")
    assert "--context" in lines[-1]
    assert snapshot(packages.folder) == before
    assert result.stdout == ""


# Outputs that exist


def test_an_existing_output_stays_as_it_is(model: Path, tmp_path: Path) -> None:
    existing = tmp_path / "out"
    existing.mkdir()
    (existing / "diary.txt").write_text("mine", encoding="utf-8")
    args = ("quantize", model, "-o", existing)
    lines = assert_refused(tmp_path, args, USAGE, "out' exists")
    assert "--force" in lines[-1]


def test_force_replaces_an_existing_output(model: Path, tmp_path: Path) -> None:
    existing = tmp_path / "out"
    existing.mkdir()
    (existing / "diary.txt").write_text("mine", encoding="utf-8")
    before = snapshot(model)
    succeed("quantize", model, "-o", existing, "--force")
    assert not (existing / "diary.txt").exists()
    assert report("verify", existing)["checkpoint"] == {"tensors": 3 * 7}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    assert snapshot(model) == before


def test_force_keeps_the_old_output_when_the_command_fails(model: Path, tmp_path: Path) -> None:
    existing = tmp_path / "out"
    existing.mkdir()
    (existing / "diary.txt").write_text("mine", encoding="utf-8")
    assert_refused(tmp_path, ("quantize", truncated_shard(model), "-o", existing, "--force"), INPUT)


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_an_output_that_is_a_file(model: Path, tmp_path: Path, command: str, force: tuple[str, ...]) -> None:
    existing = tmp_path / "out"
    existing.write_text("mine", encoding="utf-8")
    assert_refused(tmp_path, (command, model, "-o", existing, *force), USAGE, "out'")


def test_an_output_below_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert_refused(tmp_path, ("quantize", model, "-o", tmp_path / "file" / "out"), USAGE, "file")


def test_an_output_with_too_long_a_name(model: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path, ("quantize", model, "-o", tmp_path / ("x" * 300)), USAGE, "xxx")


def test_force_on_a_link_leaves_no_half_done_exchange(model: Path, tmp_path: Path) -> None:
    """Replacing the link, or the folder behind it, or refusing are all fine; a traceback is not."""
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    result = run("quantize", model, "-o", tmp_path / "out", "--force")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "real"}
    assert result.exit_code in (SUCCESS, USAGE), result.stderr


def test_force_on_the_current_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing it or refusing are both fine; a traceback after all the work is not."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    result = run("quantize", model, "-o", ".", "--force")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "here"}
    assert result.exit_code in (SUCCESS, USAGE), result.stderr


# verify notices


def test_verify_notices_one_byte_of_a_checkpoint(checkpoint: Made, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint.folder, tmp_path / "copy")
    flip(copy / "model.safetensors", -1000)
    assert_refused(tmp_path, ("verify", copy), VERIFICATION, "'model.safetensors' has changed")


def test_verify_notices_one_byte_of_a_package(checkpoint: Made, packages: Made, tmp_path: Path) -> None:
    copy = shutil.copytree(packages.folder, tmp_path / "copy")
    weights = sorted(copy.glob(f"*FFN*/{WEIGHT_BIN}"))[1]
    flip(weights, weights.stat().st_size // 2)
    name = weights.relative_to(copy).as_posix()
    args = ("verify", copy, "--checkpoint", checkpoint.folder)
    assert_refused(tmp_path, args, VERIFICATION, f"'{name}' has changed")


def test_verify_notices_one_byte_of_a_conversion(converted: tuple[Path, Ran], tmp_path: Path) -> None:
    copy = shutil.copytree(converted[0], tmp_path / "copy")
    flip(next(copy.glob(f"packages/*lm_head*/{WEIGHT_BIN}")), 5000)
    assert_refused(tmp_path, ("verify", copy), VERIFICATION, "lm_head", "weight.bin' has changed")


@pytest.mark.parametrize(("name", "problem"), [("merges.txt", "is missing"), ("more.txt", "is not one that")])
def test_verify_notices_a_missing_and_an_extra_file(
    checkpoint: Made, tmp_path: Path, name: str, problem: str
) -> None:
    copy = shutil.copytree(checkpoint.folder, tmp_path / "copy")
    if (copy / name).exists():
        (copy / name).unlink()
    else:
        (copy / name).write_text("mine", encoding="utf-8")
    assert_refused(tmp_path, ("verify", copy), VERIFICATION, f"'{name}' {problem}")


def rehash(folder: Path, name: str) -> None:
    """Make anequant.json say that the file is as it should be."""
    files = read(folder / "anequant.json")["files"]
    edit_json(
        folder / "anequant.json",
        files={**files, name: hashlib.sha256((folder / name).read_bytes()).hexdigest()},
    )


def test_verify_compares_codes_bit_for_bit(checkpoint: Made, packages: Made, tmp_path: Path) -> None:
    """One bit of one code, with the manifest's hash to match: the logits hardly move."""
    copy = shutil.copytree(packages.folder, tmp_path / "copy")
    package = sorted(copy.glob("*FFN*.mlpackage"))[-1]
    weights = package / WEIGHT_BIN
    value, offset = next(
        (value, weight.place)
        for _, value, weight in Package.open(package).read_compressed_weights()
        if "gate_proj" in value
    )
    assert offset is not None
    codes = int.from_bytes(weights.read_bytes()[offset + 16 : offset + 24], "little")
    flip(weights, codes + 1234, 1)
    rehash(copy, weights.relative_to(copy).as_posix())
    args = ("verify", copy, "--checkpoint", checkpoint.folder)
    assert_refused(tmp_path, args, VERIFICATION, f"the codes of '{value}'")


def test_verify_recomputes_the_stored_weights(checkpoint: Made, tmp_path: Path) -> None:
    """The last bit of one weight, with the manifest's hash to match: its code is still the same."""
    copy = shutil.copytree(checkpoint.folder, tmp_path / "copy")
    shard = copy / "model.safetensors"
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    name = "model.layers.0.mlp.gate_proj"
    start = json.loads(data[8 : 8 + length])[f"{name}.weight"]["data_offsets"][0]
    flip(shard, 8 + length + start, 1)
    rehash(copy, "model.safetensors")
    assert_refused(tmp_path, ("verify", copy), VERIFICATION, f"'{name}'")


def test_verify_knows_only_what_anequant_wrote(model: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path, ("verify", model), INPUT, "'anequant.json' is missing")
    assert_refused(tmp_path, ("verify", tmp_path / "gone"), INPUT, "'anequant.json' is missing")


def test_verify_packages_needs_their_checkpoint(packages: Made) -> None:
    lines = assert_refused(packages.folder, ("verify", packages.folder), USAGE, "holds packages only")
    assert "--checkpoint" in lines[-1]


def test_verify_packages_with_another_checkpoint(packages: Made, random_model: Path, tmp_path: Path) -> None:
    succeed("quantize", random_model, "-o", tmp_path / "other")
    args = ("verify", packages.folder, "--checkpoint", tmp_path / "other")
    assert_refused(packages.folder, args, VERIFICATION, "not made from", "other'")


@pytest.mark.parametrize("there", [False, True])
def test_verify_packages_with_what_is_no_checkpoint(
    packages: Made, random_model: Path, tmp_path: Path, there: bool
) -> None:
    named = random_model if there else tmp_path / "gone"
    args = ("verify", packages.folder, "--checkpoint", named)
    assert_refused(packages.folder, args, INPUT)


# The hub


@dataclass
class Hub:
    """What was asked of the hub; `failure` is raised instead of an answer.

    `folder` is a snapshot in the hub's cache, so its name is the commit.
    """

    folder: Path
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []


@pytest.fixture
def hub(random_model: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Hub:
    cache = tmp_path_factory.mktemp("snapshots")
    hub = Hub(shutil.copytree(random_model, cache / "c0ffee0123456789"))

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert "*.safetensors" in allow_patterns
        assert not any(pattern in ("*", "*.bin", "*.py") for pattern in allow_patterns)
        hub.asked.append((repo_id, revision))
        if hub.failure is not None:
            raise hub.failure
        return str(hub.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


@pytest.mark.parametrize(
    ("named", "revision"), [("org/some-model", None), ("org/some-model@v1.0/x", "v1.0/x")]
)
def test_a_hub_id_is_downloaded_at_one_commit(
    hub: Hub, output: Path, named: str, revision: str | None
) -> None:
    succeed("quantize", named, "-o", output)
    assert hub.asked == [("org/some-model", revision)]
    source = read(output / "anequant.json")["source"]
    assert (source["name"], source["revision"]) == ("some-model", "c0ffee0123456789")


def test_a_local_model_has_no_revision(random_model: Path, output: Path) -> None:
    succeed("quantize", random_model, "-o", output)
    assert read(output / "anequant.json")["source"]["revision"] is None


def not_found() -> RepositoryNotFoundError:
    request = HTTP.Request("GET", "https://huggingface.co/api/models/org/gone")
    return RepositoryNotFoundError("404 Client Error", response=HTTP.Response(404, request=request))


@pytest.mark.parametrize(
    "failure",
    [
        not_found(),
        HTTP.ConnectError("[Errno -2] Name or service not known"),
        HTTP.ReadTimeout("timed out"),
        LocalEntryNotFoundError("cannot find the requested files"),
        ConnectionResetError("connection reset by peer"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_hub_that_does_not_answer(hub: Hub, tmp_path: Path, output: Path, failure: Exception) -> None:
    hub.failure = failure
    args = ("quantize", "org/gone@v2", "-o", output)
    lines = assert_refused(tmp_path, args, INPUT, "'org/gone'", "hub", str(failure).splitlines()[0])
    assert "network" in lines[-1]


def test_offline_is_an_error_like_any_other(tmp_path: Path, output: Path) -> None:
    """No mock: conftest.py sets HF_HUB_OFFLINE."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert_refused(tmp_path, ("quantize", "org/gone", "-o", output), INPUT, "'org/gone'", "HF_HUB_OFFLINE")


# Interrupts and tracebacks


def interrupt_at(call: int, work: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return work(*args, **options)

    return interrupted


def test_an_interrupt_keeps_what_is_done(
    model: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/system/test_resume.py goes on from there."""
    work = interrupt_at(10, quantize_calibrated)
    monkeypatch.setattr(rounder, "quantize_calibrated", work)
    monkeypatch.setattr(sys, "argv", ["anequant", "quantize", str(model), "-o", str(output)])
    result = run(*sys.argv[1:])
    assert (result.exit_code, result.stdout) == (INTERRUPTED, "")
    kept, command = result.stderr.splitlines()
    assert kept.startswith(f"interrupted; kept in '{output.parent / '.out.partial'}': ")
    assert "the last is 'layer " in kept and command.startswith("to go on: anequant ")
    assert [path.name for path in output.parent.iterdir()] == [".out.partial"]


def test_an_interrupt_between_packages_keeps_those_that_are_done(
    checkpoint: Made, packages: Made, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(checkpoint.folder)
    with monkeypatch.context() as patch:
        patch.setattr(lower_package, "save_package", interrupt_at(2, save_package))
        result = run("lower", checkpoint.folder, "-o", output, *SIZES)
    assert result.exit_code == INTERRUPTED and not output.exists()
    result = run("lower", checkpoint.folder, "-o", output, *SIZES)
    note = f"resuming '{output}': 2 units are done, the last is 'embedding package'\n"
    assert (result.exit_code, result.stderr) == (SUCCESS, note)
    assert snapshot(checkpoint.folder) == before
    ours, whole = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (output, packages.folder)
    )
    assert ours == whole


def no_more_for_python() -> None:
    raise MemoryError


def no_more_for_torch() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


@pytest.mark.parametrize("exhaust", [no_more_for_python, no_more_for_torch])
def test_running_out_of_memory_is_reported(
    model: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, exhaust: Callable[[], None]
) -> None:
    monkeypatch.setattr(rounder, "quantize_calibrated", lambda *args, **options: exhaust())
    assert_refused(tmp_path, ("quantize", model, "-o", output), RESOURCE, "not enough memory")


def test_debug_shows_where_an_error_came_from(model: Path, tmp_path: Path, output: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        run("quantize", model / "gone", "-o", output, "--debug")
    assert snapshot(tmp_path) == before
