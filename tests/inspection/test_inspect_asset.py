"""`anequant inspect` of an asset of Core AI, against the checkpoint that it was made from and its tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Quantized
from listings import Program, listing
from running import invoke, succeed

from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import open_checkpoint
from anequant.errors import InputError, UnsupportedError, UsageError
from anequant.inspection import asset_forms
from anequant.inspection.asset_tensors import _look_up
from anequant.inspection.inspect import ASSET, BUNDLE, CONVERSION, inspect, inspect_tensor
from anequant.inspection.inspect_asset import AssetFacts
from anequant.lower_options import AssetOptions
from anequant.pipeline.lower import lower
from anequant.request import LowerRequest
from anequant.targets.coreai.assemble import PROGRAM
from anequant.targets.coreai.bundle import DESIGN, find_asset, read_design
from anequant.targets.coreai.design import list_functions
from anequant.targets.coreai.installed import find_problem
from anequant.targets.coreai.listed_weights import LOOKED_UP, MULTIPLIED, list_weights

problem = find_problem()

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def quantized(tiny_qwen2: Path, quantize_model: Callable[..., Quantized]) -> Quantized:
    return quantize_model(tiny_qwen2, "w4-nearest", embedding_bits=8)


@pytest.fixture(scope="module")
def bundle(quantized: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if problem is not None:
        pytest.skip(problem.what)
    folder = tmp_path_factory.mktemp("inspected") / "bundle"
    lower(LowerRequest(quantized.folder, AssetOptions(512, (8, 64))), folder)
    return folder


@pytest.fixture
def without_core_ai(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(asset: Path) -> Any:
        raise UnsupportedError("coreai-core is not installed", remedy="install it")

    monkeypatch.setattr(asset_forms, "read_listing", refuse)


def inspected(path: Path) -> AssetFacts:
    found = inspect(path).asset
    assert found is not None
    return found


def test_functions_are_those_that_were_designed(bundle: Path) -> None:
    facts = inspected(bundle)
    design, _ = read_design(bundle)
    assert facts.functions is not None
    assert [
        (
            function.name,
            *(
                [(port.name, port.dtype, port.shape) for port in ports]
                for ports in (function.inputs, function.states, function.outputs)
            ),
        )
        for function in facts.functions
    ] == [
        (
            ports.name,
            *(
                [(port.name, port.dtype, port.shape) for port in part]
                for part in (ports.inputs, ports.states, ports.outputs)
            ),
        )
        for ports in list_functions(design)
    ]
    extend = next(function for function in facts.functions if function.name == "extend_512_64")
    assert extend.operations is not None
    assert extend.operations["lut_to_dense"] == 7 * design.sizes.layers
    assert extend.operations["softmax"] == design.sizes.layers


def test_weights_and_widths_are_the_checkpoint_s(bundle: Path, quantized: Quantized) -> None:
    facts, spec = inspected(bundle), open_checkpoint(quantized.folder).spec
    assert facts.constants is not None and facts.weights is not None
    by_dtype = {width.dtype: width for width in facts.constants}
    assert by_dtype.keys() == {"float16", "uint4", "uint8"}
    assert by_dtype["uint4"].count == 7 * spec.num_layers
    assert by_dtype["uint4"].values == spec.num_layers * spec.layer_weights == 2 * by_dtype["uint4"].bytes
    assert by_dtype["uint8"].values == by_dtype["uint8"].bytes == spec.vocab_size * spec.hidden_size
    kinds = {kind.name: kind for kind in facts.weights if not kind.name.startswith("rope")}
    assert len(kinds) == 7 + 2
    down = kinds["model.layers.N.mlp.down_proj"]
    assert (down.bits, down.tables, down.entries, down.count) == (4, 1, 16, spec.num_layers)
    assert (kinds["model.embed_tokens"].use, kinds["model.embed_tokens"].entries) == (LOOKED_UP, 256)
    assert (kinds["lm_head.1"].use, kinds["lm_head.1"].bits) == (MULTIPLIED, 16)
    head, body = spec.vocab_size * spec.hidden_size, spec.num_layers * spec.layer_weights
    assert facts.bits == pytest.approx((16 * head + 4 * body) / (head + body))
    assert facts.stored_bits is not None and facts.bits is not None and facts.stored_bits > facts.bits
    assert facts.blob_bytes == sum(width.bytes for width in facts.constants)
    assert facts.files[PROGRAM] > facts.blob_bytes and facts.missing == {}
    assert facts.bundle is not None and facts.bundle["language"]["max_context_length"] == 512


@pytest.mark.usefixtures("without_core_ai")
def test_without_core_ai_the_record_tells_all_but_operations(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = inspected(bundle)
    monkeypatch.undo()
    whole = inspected(bundle)
    assert told.missing == {"operations": "coreai-core is not installed; install it"}
    assert told.functions is not None and whole.functions is not None
    assert all(function.operations is None for function in told.functions)
    assert [(item.name, item.inputs, item.states, item.outputs) for item in told.functions] == [
        (item.name, item.inputs, item.states, item.outputs) for item in whole.functions
    ]
    assert told.weights is not None and whole.weights is not None
    assert set(told.weights) == {kind for kind in whole.weights if not kind.name.startswith("rope")}
    assert (told.constants, told.bits, told.stored_bits) == (whole.constants, whole.bits, whole.stored_bits)
    assert told.float16_bytes == whole.float16_bytes


@pytest.mark.usefixtures("without_core_ai")
def test_without_core_ai_and_a_record_sizes_remain(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / DESIGN).unlink()
    facts = inspected(tmp_path / "bundle")
    assert (facts.functions, facts.constants, facts.weights, facts.bits) == (None, None, None, None)
    assert facts.blobs > 7 and facts.blob_bytes > 10**6
    assert facts.missing == {"functions, widths and weights": "coreai-core is not installed; install it"}
    shown = succeed("inspect", tmp_path / "bundle").stdout
    assert "not known  functions, widths and weights: coreai-core is not installed" in shown
    with pytest.raises(UnsupportedError, match=r"'rope.cos' cannot be shown: coreai-core is not installed"):
        inspect_tensor(tmp_path / "bundle", "rope.cos")
    with pytest.raises(UsageError, match="no tensor"):
        inspect_tensor(tmp_path / "bundle", "rope.tan")


def test_an_asset_alone_tells_the_same(bundle: Path) -> None:
    assert (inspect(bundle).kind, inspect(find_asset(bundle)).kind) == (BUNDLE, ASSET)
    alone, inside = inspected(find_asset(bundle)), inspected(bundle)
    assert alone.bundle is None
    assert (alone.functions, alone.weights, alone.files) == (inside.functions, inside.weights, inside.files)


def test_an_output_of_convert_has_both(bundle: Path, quantized: Quantized, tmp_path: Path) -> None:
    shutil.copytree(quantized.folder, tmp_path / "checkpoint")
    shutil.copytree(bundle, tmp_path / "coreai")
    found = inspect(tmp_path)
    assert found.kind == CONVERSION and found.checkpoint is not None and found.packages == ()
    assert found.asset == inspected(bundle)
    words = [line.split()[0] for line in succeed("inspect", tmp_path).stdout.splitlines() if line.strip()]
    assert {"checkpoint", "asset", "bundle", "function", "weights"} <= set(words)
    assert json.loads(succeed("inspect", tmp_path, "--json").stdout)["asset"]["name"] == found.asset.name


@pytest.mark.parametrize("name", [DOWN, f"{DOWN}.codes"])
def test_a_weight_is_the_checkpoint_s_codes(bundle: Path, quantized: Quantized, name: str) -> None:
    """Codes and table without the scales, which are constants of their own."""
    checkpoint = open_checkpoint(quantized.folder)
    linear = load(DOWN, checkpoint.read, checkpoint.tensors)
    facts = inspect_tensor(bundle, name)
    counts = np.bincount(linear.codes.numpy().reshape(-1), minlength=16)
    assert facts.codes is not None and [use.count for use in facts.codes] == counts.tolist()
    dense = linear.codebook[linear.codes.long()].double()
    assert facts.distribution.mean == pytest.approx(float(dense.mean()), abs=1e-6)
    assert facts.distribution.low == pytest.approx(float(dense.min()), rel=1e-3)
    assert (facts.dtype, facts.shape, facts.tables) == ("float16", (*linear.codes.shape, 1, 1), 1)


def test_a_scale_is_the_checkpoint_s(bundle: Path, quantized: Quantized) -> None:
    checkpoint = open_checkpoint(quantized.folder)
    linear = load(DOWN, checkpoint.read, checkpoint.tensors)
    facts = inspect_tensor(bundle, f"{DOWN}.input_scale")
    assert (facts.dtype, facts.shape, facts.codes) == ("float16", (1, linear.codes.shape[1], 1, 1), None)
    assert facts.distribution.high == pytest.approx(float(linear.input_scale.max()), rel=1e-3)


def test_a_name_that_is_not_there_has_suggestions(bundle: Path) -> None:
    with pytest.raises(UsageError) as refused:
        inspect_tensor(bundle, "rope.co")
    assert "rope.cos" in refused.value.remedy
    result = invoke("inspect", bundle, "--tensor", DOWN)
    assert result.exit_code == 0 and "16 entries" in result.stdout


def test_a_damaged_asset_is_a_named_error(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    program = find_asset(tmp_path / "bundle") / PROGRAM
    program.write_bytes(program.read_bytes()[:-1000])
    with pytest.raises(InputError, match="no whole MLIR bytecode"):
        inspect(tmp_path / "bundle")


def test_several_tables_are_looked_up_block_by_block() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(4, (6, 8), generator=generator, dtype=torch.uint8)
    tables = torch.randn(3, 2, 4, generator=generator)
    expected = np.empty((6, 8), np.float32)
    for row in range(6):
        for column in range(8):
            expected[row, column] = tables[row // 2, column // 4, int(codes[row, column])]
    assert np.array_equal(_look_up(codes, tables).numpy(), expected)


def test_weights_of_others_are_told_by_their_use() -> None:
    """Integers with scales, a table inside them, a weight that was transposed; biases and scales are none."""
    program = Program(x="tensor<1x128x1x64xf16>")
    data = program.constant("tensor<128x128x1x1xsi8>", name="a")
    scale, zero = (program.constant("tensor<128x1x1x1xf16>", name=name) for name in ("b", "c"))
    weight = program.op("blockwise_shift_scale", data, scale, zero, zero, type="tensor<128x128x1x1xf16>")
    program.op("conv2d", 0, weight)
    codes = program.constant("tensor<128x128x1x1xui4>", name="d")
    table = program.constant("tensor<4x1x1x1x16x1xsi8>", name="e")
    dense = program.op("lut_to_dense", codes, table, type="tensor<128x128x1x1xsi8>")
    program.op(
        "conv2d", 0, program.op("blockwise_shift_scale", dense, scale, zero, zero, type="tensor<128x128xf16>")
    )
    plain = program.constant("tensor<128x256xf16>", name="f")
    program.op("batch_matmul", 0, program.op("transpose", plain, type="tensor<256x128xf16>"))
    program.op("decomposable.broadcasting_add", 0, program.constant("tensor<1x128x1x1xf16>", name="g"))
    found = {weight.name: weight for weight in list_weights(listing(program))}
    assert found.keys() == {"a", "d", "f"}
    assert (found["a"].parts, found["a"].form.bits, found["a"].tables) == (("a", "b", "c"), 8, 0)
    assert (found["d"].parts, found["d"].tables, found["d"].entries) == (("d", "e", "b", "c"), 4, 16)
    assert (found["f"].parts, found["f"].form.values) == (("f",), 128 * 256)
