from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anequant.errors import UsageError
from anequant.recipe import CHOSEN, Recipe
from anequant.recipe_files import DEFAULT_RECIPE, load_recipe, named_recipes, recipe_from_dict

ROTATED = {"r1": "block-hadamard", "r1_block": 64, "r2": "hadamard", "codebook": "lut", "scales": "balanced"}
PUBLISHED = {"r1": "none", "r2": "none", "codebook": "uniform", "scales": "tensor"}
NAMED: dict[str, dict[str, Any]] = {
    "w4-nearest": {**ROTATED, "rounding": "nearest", "bits": 4},
    "w8-nearest": {**ROTATED, "rounding": "nearest", "bits": 8},
    "w_int4_per_tensor": {**PUBLISHED, "rounding": "nearest", "bits": 4},
    "w_int8_per_tensor": {**PUBLISHED, "rounding": "nearest", "bits": 8},
}


def message_of(caught: pytest.ExceptionInfo[UsageError]) -> str:
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_recipe_says_what_it_means(name: str) -> None:
    recipe = load_recipe(name)
    assert {key: recipe.to_dict()[key] for key in NAMED[name]} == NAMED[name]
    assert recipe.head_bits == recipe.embedding_bits == 16


def test_every_file_in_configs_is_a_recipe() -> None:
    assert set(NAMED) <= set(named_recipes())
    for name, path in named_recipes().items():
        assert path.stem == name
        assert load_recipe(name) == load_recipe(str(path))


def test_no_name_is_the_default() -> None:
    assert load_recipe() == load_recipe(None) == load_recipe(DEFAULT_RECIPE)


def test_a_recipe_survives_its_dictionary() -> None:
    for name in named_recipes():
        recipe = load_recipe(name)
        assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_whole_number_is_a_number() -> None:
    recipe = recipe_from_dict({"tune_minutes": 60, "correction": 1})
    assert recipe == Recipe(tune_minutes=60.0, correction=1.0)
    assert isinstance(recipe.tune_minutes, float)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().bits = 8  # type: ignore[misc]


# --- files --------------------------------------------------------------------------------------------

FILES = {
    "recipe.toml": 'r1 = "random"\nbits = 8\nseed = 5\n',
    "recipe.json": '{"r1": "random", "bits": 8, "seed": 5}',
    "recipe.yaml": "r1: random\nbits: 8\nseed: 5\n",
    "recipe.yml": "# a comment\n{r1: random, bits: 8, seed: 5}\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_any_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(FILES[name])
    assert load_recipe(str(path)) == Recipe(r1="random", bits=8, seed=5)


def test_keys_that_a_file_leaves_out_take_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("# nothing\n")
    assert load_recipe(str(tmp_path / "empty.toml")) == Recipe()


def test_overrides_win() -> None:
    recipe = load_recipe("w_int4_per_tensor", {"bits": 8, "head_bits": 6})
    assert (recipe.bits, recipe.head_bits, recipe.codebook) == (8, 6, "uniform")
    assert load_recipe("w4-nearest", {}) == load_recipe("w4-nearest")


@pytest.mark.parametrize("name", ["missing.toml", "folder/missing.json", "missing.yaml"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(str(tmp_path / name))
    assert name in message_of(caught) and "does not exist" in message_of(caught)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.toml", "r1 = "),
        ("broken.toml", "bits = 4\nbits = 8\n"),
        ("broken.json", "{"),
        ("broken.json", ""),
        ("broken.yaml", "a: [1,"),
        ("broken.yaml", "!!python/object/apply:os.system ['true']"),
        ("broken.toml", b"\xff\xfe\x00"),
    ],
)
def test_a_broken_file(tmp_path: Path, name: str, content: str | bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    assert name in message_of(caught) and "cannot be read" in message_of(caught)


@pytest.mark.parametrize(
    ("name", "content"),
    [("list.json", "[1, 2]"), ("word.json", '"w4"'), ("list.yaml", "- r1\n"), ("empty.yaml", "")],
)
def test_a_file_that_holds_no_table(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        load_recipe(str(tmp_path / name))
    assert name in message_of(caught) and "table" in message_of(caught)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError) as caught:
        load_recipe(str(tmp_path / "folder.toml"))
    assert "folder.toml" in message_of(caught)


# --- mistakes -----------------------------------------------------------------------------------------


def test_an_unknown_recipe_suggests_a_near_one() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("w4-nearst")
    assert "'w4-nearst'" in message_of(caught) and "did you mean 'w4-nearest'?" in message_of(caught)


def test_an_unknown_recipe_that_resembles_none_lists_all() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("qqq")
    assert all(name in message_of(caught) for name in NAMED)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("bit", "bits"), ("head_bit", "head_bits"), ("codebok", "codebook"), ("scale", "scales")],
)
def test_an_unknown_key_suggests_a_near_one(tmp_path: Path, key: str, suggestion: str) -> None:
    (tmp_path / "typo.toml").write_text(f"{key} = 4\n")
    attempts: list[Callable[[], Recipe]] = [
        lambda: load_recipe(str(tmp_path / "typo.toml")),
        lambda: load_recipe("w4-nearest", {key: 4}),
        lambda: recipe_from_dict({key: 4}),
    ]
    for attempt in attempts:
        with pytest.raises(UsageError) as caught:
            attempt()
        assert f"'{key}'" in message_of(caught)
        assert f"did you mean '{suggestion}'?" in message_of(caught)


def test_an_unknown_key_that_resembles_none_lists_all() -> None:
    with pytest.raises(UsageError) as caught:
        recipe_from_dict({"xyzzy": 4})
    assert all(field.name in message_of(caught) for field in dataclasses.fields(Recipe))


def test_a_key_that_is_no_word() -> None:
    with pytest.raises(UsageError) as caught:
        recipe_from_dict({4: 4})  # type: ignore[dict-item]
    assert "'4'" in message_of(caught)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", "4"),
        ("bits", 4.0),
        ("bits", True),
        ("bits", None),
        ("bits", [4]),
        ("seed", True),
        ("seed", 1.5),
        ("r1_block", False),
        ("r1_block", "64"),
        ("r1", 1),
        ("r1", None),
        ("r2", True),
        ("codebook", ["lut"]),
        ("head_bits", {}),
    ],
)
def test_a_value_of_the_wrong_type(key: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_from_dict({key: value})
    assert f"'{key}' must be" in message_of(caught) and repr(value) in message_of(caught)


@pytest.mark.parametrize(
    ("key", "value", "choices"),
    [
        ("r1", "hadamrd", ("none", "hadamard", "block-hadamard", "random")),
        ("r2", "random", ("none", "hadamard")),
        ("codebook", "", ("uniform", "lut")),
        ("scales", "row", ("tensor", "output", "balanced")),
        ("rounding", "Nearest", ("nearest", "gptq")),
        ("bits", 5, ("2", "3", "4", "6", "8")),
        ("bits", 5, ("2", "8")),
        ("head_bits", 3, ("16", "8", "6", "4")),
        ("embedding_bits", 1, ("16", "8", "6", "4", "0")),
    ],
)
def test_a_value_outside_the_choices_lists_them(key: str, value: Any, choices: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_from_dict({key: value})
    assert f"'{key}'" in message_of(caught) and repr(value) in message_of(caught)
    assert all(choice in caught.value.remedy for choice in choices)


@pytest.mark.parametrize("block", [0, 1, -64, 3, 48, 96])
def test_a_block_is_a_power_of_two(block: int) -> None:
    with pytest.raises(UsageError, match="r1_block"):
        Recipe(r1_block=block)


def test_a_seed_is_not_negative() -> None:
    with pytest.raises(UsageError, match="seed"):
        Recipe(seed=-1)
    assert Recipe(seed=0).seed == 0


@pytest.mark.parametrize("field", dataclasses.fields(Recipe), ids=lambda field: field.name)
def test_every_choice_is_accepted(field: Any) -> None:
    for choice in field.metadata["choices"] or (field.default,):
        chosen = field.name in ("head_bits", "embedding_bits") and choice == CHOSEN
        needs = {"target_bits": 4.5} if chosen else {}
        assert getattr(recipe_from_dict({field.name: choice} | needs), field.name) == choice
    assert field.metadata["help"].endswith(".")


STATIC = {"activation_bits": 8, "activation_scales": "static"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({**STATIC, "bits": 8, "codebook": "lut"}, "free codebook of 8 bits"),
        ({**STATIC, "tune": 5}, "tune moves scales"),
        ({"bits": 16, "tune": 5}, "tune moves scales"),
        ({"smooth": 0.5}, "smooth has no use"),
        ({**STATIC, "smooth": 0.5, "fold_input_scales": True}, "smooth needs an input scale"),
        ({**STATIC, "scales": "group"}, "scales of groups"),
        ({"scales": "group", "tune": 5}, "scales of groups"),
        ({"scales": "group", "tune_minutes": 1.0}, "scales of groups"),
        ({"tune": 5, "tune_minutes": 1.0}, "tune is 5 steps and tune_minutes 1"),
        ({"scales": "group", "fold_input_scales": True}, "fold_input_scales needs input scales"),
        ({"learn": 5, "r1": "none", "r2": "none"}, "learn has no rotation"),
        ({"restarts": 0}, "'restarts' is 0"),
        ({"r4_block": 48}, "'r4_block' is 48"),
        ({"activation_clip": 1.5}, "'activation_clip' is 1.5"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        recipe_from_dict(values)
    assert caught.value.remedy


def test_who_needs_calibration_tokens() -> None:
    nearest = load_recipe("w4-nearest")
    for changes, needed in (
        ({}, False),
        ({"rounding": "gptq"}, True),
        ({"rounding": "gptq", "bits": 16}, False),
        (STATIC, True),
        ({"activation_overrides": "down_proj=8", "activation_scales": "static"}, True),
        ({"activation_bits": 8}, False),
        ({"kv_bits": 4}, False),
        ({"r1": "pca"}, True),
        ({"learn": 3}, True),
        ({"restarts": 2}, True),
        ({"target_bits": 4.5}, True),
    ):
        assert dataclasses.replace(nearest, **changes).calibrated is needed, changes
