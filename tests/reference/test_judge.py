"""Stock transformers judges how a folder is read: what is understood differently is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from files import edit_json, edit_tensors
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anequant.architectures.spec import Window
from anequant.checkpoints import reader
from anequant.checkpoints.header import TensorInfo
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import Source
from anequant.errors import InputError, ResourceError, UnsupportedError, VerificationError
from anequant.pipeline.rotate import rotate
from anequant.recipe_files import load_recipe
from anequant.reference import miniature
from anequant.reference.judge import check_reading, check_written
from anequant.reference.miniature import TOKENS, WINDOW, Stored, read_as_stock
from anequant.request import Request

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
MakeModel = Callable[..., Path]


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result: torch.Tensor = model(input_ids=torch.arange(40)[None], use_cache=False).logits.double()
    return result


def assert_rotation_keeps_the_logits(folder: Path) -> None:
    out = folder.with_name("out")
    rotate(Request(Source(folder, "model"), load_recipe("w4-nearest", {})), out)
    expected = logits(folder)
    assert float((logits(out) - expected).abs().max() / expected.abs().max()) < 1e-5


def another_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = torch.randn(97, 64, generator=torch.Generator().manual_seed(1))


def the_same_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def only_the_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


TIES = {
    "another head": (another_head, False),
    "the same": (the_same_head, False),
    "head": (only_the_head, True),
}


@pytest.mark.parametrize("stored", TIES)
def test_a_tied_model_has_the_head_that_transformers_gives_it(
    make_model: MakeModel, tmp_path: Path, stored: str
) -> None:
    folder = make_model(tmp_path / "model", "qwen2", True, **SMALL)
    edit, tied = TIES[stored]
    edit_tensors(folder, edit)
    assert open_checkpoint(folder).spec.tied is tied
    assert_rotation_keeps_the_logits(folder)


@pytest.mark.parametrize("missing", [EMBEDDING, HEAD])
def test_an_untied_model_needs_both_tables(make_model: MakeModel, tmp_path: Path, missing: str) -> None:
    folder = make_model(tmp_path / "model", "llama", False, **SMALL)
    edit_tensors(folder, lambda tensors: tensors.pop(missing))
    with pytest.raises(InputError, match=f"tensor '{missing}' is missing"):
        open_checkpoint(folder)


def beside_an_older_index(make_model: MakeModel, place: Path) -> Path:
    """One file with a model, and the shards and index of another of the same shapes."""
    folder = make_model(place / "model", "llama", False, seed=2, max_shard_size="60KB", **SMALL)
    assert len(list(folder.glob("*.safetensors"))) > 2
    newer = make_model(place / "newer", "llama", False, seed=1, **SMALL)
    (newer / "model.safetensors").rename(folder / "model.safetensors")
    return folder


def test_one_file_wins_over_an_index(make_model: MakeModel, tmp_path: Path) -> None:
    folder = beside_an_older_index(make_model, tmp_path)
    assert open_checkpoint(folder).files == ["config.json", "model.safetensors"]
    assert_rotation_keeps_the_logits(folder)


def test_a_reader_that_prefers_the_index_is_found_out(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = beside_an_older_index(make_model, tmp_path)
    monkeypatch.setattr(reader, "_first_file", lambda folder, stem: f"{stem}.safetensors.index.json")
    with pytest.raises(VerificationError, match=r"'lm_head.weight' in 'model.safetensors', anequant from"):
        check_reading(open_checkpoint(folder))


def test_a_reader_that_ties_what_is_not_tied_is_found_out(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "model", "qwen2", True, **SMALL)
    edit_tensors(folder, another_head)
    monkeypatch.setattr(reader, "_tie", lambda spec, tensors: (spec, tensors))
    with pytest.raises(VerificationError, match=rf"'{HEAD}' from '{HEAD}' in"):
        check_reading(open_checkpoint(folder))


def with_config(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    return replace(checkpoint, spec=replace(checkpoint.spec, config={**checkpoint.spec.config, **changes}))


def with_window(checkpoint: Checkpoint, window: Window) -> Checkpoint:
    architecture = replace(checkpoint.spec.architecture, window=window)
    return replace(checkpoint, spec=replace(checkpoint.spec, architecture=architecture))


def moved(checkpoint: Checkpoint) -> Checkpoint:
    """Two tensors of the same shape, each taken for the other."""
    up, gate = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"
    tensors: dict[str, TensorInfo] = checkpoint.tensors
    return replace(checkpoint, tensors={**tensors, up: tensors[gate], gate: tensors[up]})


MISREAD: dict[str, tuple[Callable[[Checkpoint], Checkpoint], str]] = {
    "a number": (lambda checkpoint: with_config(checkpoint, rms_norm_eps=0.5), "'rms_norm_eps' as 1e-06"),
    "rope": (
        lambda checkpoint: with_config(checkpoint, rope_parameters={"rope_theta": 3.0}),
        "rope_parameters",
    ),
    "a window": (lambda checkpoint: with_window(checkpoint, Window.NO_LAYER), "'sliding_window' otherwise"),
    "tensors": (moved, "'model.layers.1.mlp.gate_proj.weight' in"),
}


@pytest.mark.parametrize("case", MISREAD)
def test_what_is_read_differently_is_named(make_model: MakeModel, tmp_path: Path, case: str) -> None:
    folder = make_model(tmp_path / "model", "mistral", False, sliding_window=64, **SMALL)
    checkpoint = open_checkpoint(folder)
    check_reading(checkpoint)
    misread, words = MISREAD[case]
    with pytest.raises(VerificationError, match=words):
        check_reading(misread(checkpoint))


def test_a_written_config_that_is_another_model_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    source = open_checkpoint(make_model(tmp_path / "model", "qwen3", False, **SMALL))
    out = tmp_path / "out"
    rotate(Request(Source(source.folder, "model"), load_recipe("w4-nearest", {})), out)
    check_written(source, out)
    edit_json(out / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(
        VerificationError, match=r"'rms_norm_eps' was written as 0.001 and is 1e-06 in the source"
    ):
        check_written(source, out)


def test_a_miniature_tells_where_everything_comes_from(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "mistral", True, sliding_window=4096, **SMALL)
    edit_tensors(folder, lambda tensors: tensors.update(unrelated=torch.ones(3)))
    (folder / "broken.safetensors").write_bytes(b"no header")
    stock = read_as_stock(open_checkpoint(folder))
    weights = load_file(folder / "model.safetensors")
    assert stock.origins == {
        **{name: Stored("model.safetensors", name) for name in weights if name != "unrelated"},
        HEAD: Stored("model.safetensors", EMBEDDING),
    }
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    assert len(stock.masks) == 2 and all(torch.equal(mask, causal.triu(1 - WINDOW)) for mask in stock.masks)
    assert stock.config["sliding_window"] == 4096 > WINDOW
    model = AutoModelForCausalLM.from_pretrained(folder)
    cos, sin = model.model.rotary_emb(torch.empty(1), torch.arange(32)[None])
    assert torch.equal(stock.cos, cos) and torch.equal(stock.sin, sin)


def test_a_layer_that_looks_ahead_is_found_out(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "model", "llama", False, **SMALL)
    edit_json(folder / "config.json", is_causal=False)
    with pytest.raises(UnsupportedError, match="'is_causal' is False"):
        open_checkpoint(folder)
    monkeypatch.setattr("anequant.architectures.check_settings", lambda config, where: None)
    with pytest.raises(VerificationError, match="'is_causal' otherwise"):
        check_reading(open_checkpoint(folder))


BESIDE: dict[str, Callable[[Path], Any]] = {
    "a folder called as an index": lambda folder: (folder / "model.safetensors.index.json").mkdir(),
    "an index that leads nowhere": lambda folder: (folder / "old.safetensors.index.json").symlink_to("gone"),
    "a folder called as weights": lambda folder: (folder / "old.safetensors").mkdir(),
    "weights of another kind": lambda folder: save_file({"a": torch.ones(2)}, folder / "old.safetensors"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_transformers_does_not_read_changes_nothing(
    make_model: MakeModel, tmp_path: Path, case: str
) -> None:
    folder = make_model(tmp_path / "model", "llama", False, **SMALL)
    BESIDE[case](folder)
    check_reading(open_checkpoint(folder))


def test_a_tensor_under_two_names_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen2", True, **SMALL)
    edit_tensors(folder, lambda tensors: tensors.update({"embed_tokens.weight": tensors[EMBEDDING] + 1}))
    expected = logits(folder)
    try:
        check_reading(open_checkpoint(folder))
    except VerificationError as error:
        assert "'embed_tokens.weight' in 'model.safetensors'" in error.what
        return
    assert_rotation_keeps_the_logits(folder)
    assert torch.equal(logits(folder), expected)


def test_no_room_for_the_miniature_is_said(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    folder = make_model(tmp_path / "model", "llama", False, **SMALL)
    monkeypatch.setattr(miniature, "save_file", full)
    with pytest.raises(ResourceError, match="No space left") as error:
        check_reading(open_checkpoint(folder))
    assert "TMPDIR" in error.value.remedy


def test_half_a_character_in_config_json_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", False, **SMALL)
    edit_json(folder / "config.json", x="\ud800", y="\U0001f600")
    with pytest.raises(InputError, match="half a character"):
        open_checkpoint(folder)
    edit_json(folder / "config.json", x="")
    assert open_checkpoint(folder).spec.config["y"] == "\U0001f600"


def test_an_adapter_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", False, **SMALL)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"'adapter_config.json' makes this an adapter"):
        check_reading(open_checkpoint(folder))
