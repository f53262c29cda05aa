"""Per-tensor checkpoints as others write them: read, lowered, and refused where they break the contract."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Quantized
from files import Tensors, edit_tensors
from safetensors.torch import load_file
from torch import Tensor

from anequant.checkpoints.foreign import complete_codebook, find_codebook
from anequant.checkpoints.quantized import load, store
from anequant.checkpoints.source import Source
from anequant.errors import InputError
from anequant.lower_options import LowerOptions
from anequant.pipeline.lower import lower
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.weight_format import WeightFormat
from anequant.reference.open_float import open_float
from anequant.request import LowerRequest
from anequant.verification.verify import verify_packages

SHARD = "model.safetensors"


@pytest.fixture
def folder(tiny_qwen2: Path, quantize_model: Callable[..., Quantized], tmp_path: Path) -> Path:
    shutil.copytree(quantize_model(tiny_qwen2, "w4-nearest").folder, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def projections(tensors: Tensors) -> list[str]:
    return sorted(name.removesuffix(".output_scales") for name in tensors if name.endswith("output_scales"))


def without_codebooks(tensors: Tensors) -> None:
    for name in projections(tensors):
        del tensors[f"{name}.codebook"]


def with_negative_scales(tensors: Tensors) -> None:
    """Every other row flipped, its codes mirrored: the same weights."""
    for name in projections(tensors):
        book = tensors[f"{name}.codebook"]
        tensors[f"{name}.codebook"] = torch.unique(torch.cat([book, -book]))
        tensors[f"{name}.output_scales"][::2] *= -1


def shuffled_codebooks(tensors: Tensors) -> None:
    for name in projections(tensors):
        book = tensors[f"{name}.codebook"]
        tensors[f"{name}.codebook"] = book[torch.randperm(len(book))].reshape(1, -1)


def without_zero_biases(tensors: Tensors) -> None:
    for name in projections(tensors):
        if not bool(tensors[f"{name}.bias"].any()):
            del tensors[f"{name}.bias"]


def half_scales(tensors: Tensors) -> None:
    for name in projections(tensors):
        for suffix in ("input_scales", "output_scales", "codebook"):
            tensors[f"{name}.{suffix}"] = tensors[f"{name}.{suffix}"].half()


CHANGES = [without_codebooks, with_negative_scales, shuffled_codebooks, without_zero_biases, half_scales]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_it_is_read_for_what_it_is_and_lowered(
    folder: Path, tmp_path: Path, change: Callable[[Tensors], None]
) -> None:
    before = load_file(folder / SHARD)
    after = edit_tensors(folder, change)
    for name in projections(before):
        ours = load(name, after.__getitem__, after)
        weight = before[f"{name}.weight"].float()
        torch.testing.assert_close(ours.dequantize(), weight, rtol=2e-3, atol=1e-6)
        assert len(ours.codebook) in (16, 64)
    lower(LowerRequest(folder, LowerOptions(context=80, batch=16)), tmp_path / "packages")
    assert verify_packages(tmp_path / "packages", folder).weights == 28


@pytest.mark.parametrize("quantized", [False, True], ids=["float16", "codebook"])
def test_a_tied_head_and_anemlls_own_config(folder: Path, tmp_path: Path, quantized: bool) -> None:
    """No lm_head is stored, config.json has the quantization_config of ANEMLL's script, and there is no
    anequant.json. The judge is transformers, which `verify_packages` runs."""

    def tie(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        if quantized:
            parts = quantize_linear(
                tensors["model.embed_tokens.weight"].float(),
                None,
                WeightFormat(8, "uniform", "output"),
                "model.embed_tokens",
            )
            tensors.update(store("model.embed_tokens", parts, bias=False))

    edit_tensors(folder, tie)
    (folder / "anequant.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "quarot", "bits": 4, "group_size": -1, "per_tensor": True, "rotated": True}
    config |= {"tie_word_embeddings": True, "quantization_config": method}
    (folder / "config.json").write_text(json.dumps(config))
    lower(LowerRequest(folder, LowerOptions(context=80, batch=16)), tmp_path / "packages")
    check = verify_packages(tmp_path / "packages", folder)
    assert check.weights == (28 + 1 + 16 if quantized else 28) and check.relative_error < 2e-3
    with pytest.raises(InputError, match="is already quantized"):
        open_float(Source(folder, "a"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_integers_are_found_without_a_codebook(bits: int, dtype: torch.dtype) -> None:
    """The symmetric absmax scheme: weight = integer * scale."""
    generator = torch.Generator().manual_seed(bits)
    top = 2 ** (bits - 1) - 1
    integers = torch.randint(-top, top + 1, (64, 512), generator=generator).float()
    scale = torch.full((64, 1), 0.0123).half().float()
    stored = (integers * scale).to(dtype)
    entries = find_codebook("p", stored, torch.ones(1, 512), scale)
    assert len(entries) == 2**bits
    codes = (integers[..., None] - entries).abs().argmin(-1) if bits == 4 else None
    torch.testing.assert_close(entries[: 2 * top + 1], torch.arange(-top, top + 1).float(), rtol=4e-3, atol=0)
    assert codes is None or torch.equal(entries[codes].round(), integers)


def test_a_float_weight_is_no_codebook() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r"'p\.weight' divided by its scales takes \d+ values"):
        find_codebook("p", weight, torch.ones(1, 64), torch.ones(64, 1))


@pytest.mark.parametrize(
    ("count", "length"), [(2, 4), (4, 4), (5, 8), (13, 16), (16, 16), (17, 64), (255, 256)]
)
def test_codebooks_are_filled_up(count: int, length: int) -> None:
    entries = torch.linspace(-1, 1, count)
    book = complete_codebook("p", entries.flip(0))
    assert len(book) == length and bool((book.diff() > 0).all())
    assert torch.equal(book[:count], entries)


@pytest.mark.parametrize("entries", [torch.ones(5), torch.randn(300), torch.tensor([0.0, float("nan")])])
def test_impossible_codebooks_are_refused(entries: Tensor) -> None:
    with pytest.raises(InputError, match=r"'p\.codebook' must hold 2 to 256"):
        complete_codebook("p", entries)


def drop(suffix: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"model.layers.2.mlp.up_proj.{suffix}")


def put(suffix: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        name = f"model.layers.2.mlp.up_proj.{suffix}"
        tensors[name] = value(tensors[name]).contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("input_scales"), r"up_proj\.input_scales' is missing"),
        (drop("output_scales"), r"up_proj\.output_scales' is missing"),
        (put("output_scales", lambda scale: scale * 0), r"up_proj\.output_scales' must be .* without zeros"),
        (put("input_scales", lambda scale: scale.T), r"up_proj\.input_scales' must be \[1, "),
        (put("codebook", lambda book: book[:1]), r"up_proj\.codebook' must hold"),
    ],
    ids=["no input scale", "no output scale", "zero scale", "shape", "codebook"],
)
def test_a_broken_contract_is_refused_by_tensor(
    folder: Path, tmp_path: Path, change: Callable[[Tensors], object], message: str
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(InputError, match=message):
        lower(LowerRequest(folder, LowerOptions(context=80, batch=16)), tmp_path / "packages")
    assert not (tmp_path / "packages").exists()
