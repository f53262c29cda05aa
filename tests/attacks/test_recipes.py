"""Recipe files that are no recipe: refused by file and key, with what was meant where that can be guessed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from damage import assert_refused

from anequant.errors import UsageError
from anequant.recipe_files import load_recipe

pytestmark = pytest.mark.usefixtures("warm")

CASES: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    "unknown key": ("toml", "bitz = 4", ("unknown recipe key 'bitz'", "did you mean 'bits'?")),
    "unknown table": ("toml", "[rotation]\nr1 = 'none'", ("unknown recipe key 'rotation'",)),
    "an escape as key": ("json", '{"\\u001b[2J": 1}', (r"\x1b[2J",)),
    "a key of a megabyte": ("toml", "a" * 90_000 + " = 1", ("(90000 characters)",)),
    "wrong type": ("toml", "bits = '4'", ("'bits' must be a whole number, not '4'",)),
    "a bool as number": ("toml", "bits = true", ("'bits' must be a whole number, not True",)),
    "a number as bool": ("toml", "fold_input_scales = 1", ("must be true or false, not 1",)),
    "a bool as share": ("toml", "correction = true", ("'correction' must be a number, not True",)),
    "a whole number outside": ("toml", f"correction = {10**400}", ("'correction' is ", "from 0 to 1")),
    "a list as word": ("yaml", "r1: [none]", ("'r1' must be a word, not ['none']",)),
    "a table as word": ("yaml", "r1: {a: b}", ("'r1' must be a word",)),
    "null": ("json", '{"r1": null}', ("'r1' must be a word, not None",)),
    "bits outside the grid": ("toml", "bits = 5", ("'bits' cannot be 5", "choose from 2, 3, 4, 6, 8, 16")),
    "bits of 2**70": ("toml", f"bits = {2**70}", ("'bits' cannot be",)),
    "share of 2": ("toml", "correction = 2.0", ("'correction' is 2.0", "from 0 to 1")),
    "share of nan": ("toml", "correction = nan", ("'correction' is nan",)),
    "share of infinity": ("yaml", "correction: .inf", ("'correction' is inf",)),
    "nan in json": ("json", '{"correction": NaN}', ("NaN is not JSON",)),
    "an unknown rotation": ("toml", "r1 = 'hadamart'", ("'r1' cannot be 'hadamart'", "block-hadamard")),
    "a block of 48": ("toml", "r1_block = 48", ("'r1_block' is 48", "power of two")),
    "a block of 0": ("toml", "r1_block = 0", ("'r1_block' is 0",)),
    "a block that does not divide": ("toml", "r1_block = 256", ("256 does not fit a width of 64", "2, 4, 8")),
    "input scales folded that are not there": (
        "toml",
        "scales = 'output'\nfold_input_scales = true",
        ("fold_input_scales needs input scales",),
    ),
    "nothing to learn": ("toml", "learn = 3\nr1 = 'none'\nr2 = 'none'", ("learn has no rotation",)),
    "no restart": ("toml", "restarts = 0", ("'restarts' is 0",)),
    "a head that nothing chooses for": (
        "toml",
        "head_bits = 0",
        ("'head_bits' is 0", "no target_bits", "set target_bits"),
    ),
    "widths": ("toml", "target_bits = 5.0\nmixed_bits = '4,5'", ("'mixed_bits' is '4,5'",)),
    "overrides of 5 bits": ("toml", "activation_overrides = 'down_proj=5'", ("'down_proj' 5 bits",)),
    "overrides of nothing": (
        "toml",
        "activation_bits = 8\nactivation_overrides = 'down=16'",
        ("activation_overrides", "down"),
    ),
    "a python object": ("yaml", "r1: !!python/object/apply:os.system [ls]", ("line 1", "constructor")),
    "a python name": ("yaml", "r1: !!python/name:os.system ''", ("line 1", "constructor")),
    "aliases": (
        "yaml",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nr1: [*c, *c]",
        ("line 2: an alias",),
    ),
    "deep yaml": ("yaml", "a: " + "[" * 40_000, ("cannot be read",)),
    "deep json": ("json", "[" * 90_000, ("nested too deeply",)),
    "deep toml": ("toml", "a = " + "[" * 40_000, ("cannot be read",)),
    "a date that is none": ("yaml", "r1: 2020-99-99", ("cannot be read",)),
    "a float that is none": ("yaml", "r1: !!float ''", ("cannot be read",)),
    "two documents": ("yaml", "r1: none\n---\nr1: none", ("cannot be read",)),
    "a key twice, toml": ("toml", "bits = 4\nbits = 8", ("Cannot overwrite a value",)),
    "a key twice, json": ("json", '{"bits": 4, "bits": 8}', ("'bits' appears twice",)),
    "a key twice, yaml": ("yaml", "bits: 4\nbits: 8", ("a key appears twice",)),
    "empty json": ("json", "", ("cannot be read",)),
    "empty yaml": ("yaml", "", ("no table of keys and values",)),
    "a list": ("json", "[]", ("no table of keys and values",)),
    "a word": ("yaml", "w4-ane", ("no table of keys and values",)),
    "not utf-8": ("toml", b"r1 = '\xff'", ("cannot be read", "utf-8")),
    "zeros": ("toml", bytes(100), ("cannot be read",)),
    "ten megabytes": ("toml", "# " + "a" * 10_000_000, ("more than 100000 bytes",)),
}

OF_THE_MODEL = ("a block that does not divide", "overrides of nothing")
"""Recipes that are sound by themselves."""


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_recipe_is_refused(model: Path, case: str) -> None:
    suffix, content, words = CASES[case]
    file = model.parent / f"mine.{suffix}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["quantize", model, "-o", model.parent / "out", "--recipe", file]
    named = () if case in OF_THE_MODEL else (str(file),)
    assert_refused(model.parent, arguments, UsageError.exit_code, *words, *named)


@pytest.mark.parametrize("name", ["gone.toml", "w4-ann", "a" * 300, "a\0b", "/dev/zero", "pipe.toml"])
def test_a_recipe_that_is_no_file(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    os.mkfifo(model.parent / "pipe.toml")
    arguments = ["quantize", model, "-o", model.parent / "out", "--recipe", name]
    assert_refused(model.parent, arguments, UsageError.exit_code, "recipe")


@pytest.mark.parametrize("suffix", ["toml", "json", "yaml"])
def test_a_byte_order_mark_is_no_mistake(tmp_path: Path, suffix: str) -> None:
    text = {"toml": "bits = 8", "json": '{"bits": 8}', "yaml": "bits: 8"}[suffix]
    file = tmp_path / f"mine.{suffix}"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_recipe(str(file)).bits == 8


def test_an_empty_toml_is_every_default(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(b"")
    assert load_recipe(str(file)) == load_recipe("w4-ane")


def test_an_option_to_blame_blames_no_file(model: Path) -> None:
    from running import invoke

    result = invoke("quantize", model, "-o", model.parent / "o", "--bits", "5")
    assert result.exit_code == UsageError.exit_code
    assert "'bits' cannot be 5" in result.stderr and "where" not in result.stderr
