"""The written packages against stock transformers and coremltools' own reader, from disk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.models import MLModel
from torch import Tensor

from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT, resolve_source
from anequant.errors import UnsupportedError, UsageError, VerificationError
from anequant.jobs.control import silent
from anequant.lower_options import LowerOptions
from anequant.pipeline.lower import lower
from anequant.pipeline.lowering import LowerResult
from anequant.pipeline.quantize import quantize
from anequant.recipe_files import load_recipe
from anequant.reference.sources import read_text
from anequant.reference.windows import cut_windows, load_tokenizer
from anequant.request import LowerRequest, Request
from anequant.runtime.coreml_backend import PackageModel, run_package_by_package
from anequant.targets.coreml.interpreter.interpreter import Package
from anequant.targets.coreml.meta import read_meta
from anequant.targets.coreml.program.linears import name_weight
from anequant.targets.shared.agreement import compare_logits
from anequant.targets.shared.geometry import count_head_parts, split_layers
from anequant.verification.verify import verify_packages

PREFILL = DECODE = 64
WINDOWS = 4
START = 8189


@dataclass(frozen=True)
class Written:
    checkpoint: Path
    packages: Path
    lowered: LowerResult


def write(folder: Path, model: Path, options: LowerOptions, **recipe: Any) -> Written:
    quantize(Request(resolve_source(str(model)), load_recipe("w4-nearest", recipe)), folder / "checkpoint")
    result = lower(LowerRequest(folder / "checkpoint", options), folder / "packages")
    assert isinstance(result, LowerResult)
    return Written(folder / "checkpoint", folder / "packages", result)


@pytest.fixture(scope="module", params=["tiny-qwen2", "qwen2-29m"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    model = request.getfixturevalue(request.param.replace("-", "_"))
    folder = tmp_path_factory.mktemp(request.param)
    return write(folder, model, LowerOptions(context=160, batch=32, chunks=2))


def stock_logits(checkpoint: Path, tokens: Tensor) -> Tensor:
    """Logits [length, vocab] of stock transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(tokens[None], use_cache=False).logits[0]
    return logits


def package_logits(model: PackageModel, tokens: Tensor, prefill: int) -> Tensor:
    """Logits after the prompt and after each later token, by prefill and decode."""
    model.reset()
    rows = [model.feed(tokens[:prefill].tolist())]
    rows += [model.feed([int(token)]) for token in tokens[prefill:]]
    return torch.stack(rows)


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


def test_prefill_and_decode_agree_with_stock_transformers(trained: Written) -> None:
    tokenizer = load_tokenizer(trained.checkpoint)
    windows = cut_windows(read_text(SAMPLE_TEXT), tokenizer, START, count=WINDOWS, length=PREFILL + DECODE)
    model = PackageModel(trained.packages)
    equal = 0
    for tokens in windows:
        expected = stock_logits(trained.checkpoint, tokens)[PREFILL - 1 :]
        ours = package_logits(model, tokens, PREFILL)
        assert relative_error(ours, expected) <= 1e-2
        equal += int((ours.argmax(-1) == expected.argmax(-1)).sum())
    assert equal / (WINDOWS * (DECODE + 1)) >= 0.99


def test_package_by_package_is_the_same_with_a_single_one_open(trained: Written, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    lower(LowerRequest(trained.checkpoint, LowerOptions(context=64, batch=8, chunks=2)), packages)
    tokens = torch.randint(8192, (20,), generator=torch.Generator().manual_seed(2))
    opened: list[weakref.ref[Package]] = []

    def alone(path: Path) -> Package:
        assert not any(reference() for reference in opened), f"another package is open beside '{path.name}'"
        package = Package.open(path)
        opened.append(weakref.ref(package))
        return package

    ours = run_package_by_package(packages, tokens, 16, silent, alone)
    assert len(opened) == 4
    assert torch.equal(ours, package_logits(PackageModel(packages), tokens, 16))


def test_blocks_of_prefill_leave_the_state_of_single_tokens(trained: Written) -> None:
    tokens = torch.randint(8192, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    blocks, singles = PackageModel(trained.packages), PackageModel(trained.packages)
    blocks.feed(tokens)
    for token in tokens:
        singles.feed([token])
    (by_block,), (by_token,) = blocks.state.values(), singles.state.values()
    assert not by_block[:, :, 64:].any()
    assert float(by_token.abs().max()) > 1
    assert relative_error(by_block.float(), by_token.float()) < 5e-3


def palettized(package: Path) -> Iterator[tuple[str, str, np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """(function, value name, codes, codebook) of every palettized constant, by coremltools' reader."""
    model = MLModel(str(package), skip_model_load=True)
    program = load_program(model.get_spec(), model.get_spec().specificationVersion, model.weights_dir)
    for name, function in program.functions.items():
        for operation in function.operations:
            if operation.op_type == "constexpr_lut_to_dense":
                yield name, operation.outputs[0].name, operation.indices.val, operation.lut.val


def test_every_palettized_weight_is_the_checkpoints_bit_for_bit(trained: Written) -> None:
    checkpoint = open_checkpoint(trained.checkpoint)
    spec = checkpoint.spec
    expected = {
        name_weight(name): name
        for name in (
            f"model.layers.{layer}.{linear.name}"
            for layer in range(spec.num_layers)
            for linear in spec.architecture.linears
        )
    }
    seen: list[tuple[str, str]] = []
    for chunk in read_meta(trained.packages).chunk_names:
        for function, value, codes, codebook in palettized(trained.packages / f"{chunk}.mlpackage"):
            quantized = load(expected[value], checkpoint.read, checkpoint.tensors)
            assert codebook.shape == (1, 1, 1, 1, 16, 1)
            assert codebook.dtype == np.float16
            assert np.array_equal(codebook.reshape(-1), quantized.codebook.half().numpy())
            assert np.array_equal(codes.squeeze((2, 3)).astype(np.uint8), quantized.codes.numpy())
            seen.append((function, value))
    assert sorted(seen) == sorted(
        (function, value) for function in ("infer", "prefill") for value in expected
    )


def test_functions_share_one_copy_of_every_weight(trained: Written) -> None:
    for size in trained.lowered.packages:
        assert size.weight_bytes <= 1.02 * size.constant_bytes, size
        assert size.weight_bytes >= size.constant_bytes, size
    for chunk in read_meta(trained.packages).chunk_names:
        offsets: dict[str, set[int | None]] = {}
        opened = Package.open(trained.packages / f"{chunk}.mlpackage")
        assert opened.default_function == "infer"
        for _, value, weight in opened.read_compressed_weights():
            offsets.setdefault(value, set()).add(weight.place)
        assert offsets and all(len(places) == 1 for places in offsets.values())


def test_chunks_do_not_change_the_logits(trained: Written, tmp_path: Path) -> None:
    lower(LowerRequest(trained.checkpoint, LowerOptions(context=160, batch=32, chunks=1)), tmp_path / "whole")
    tokens = torch.randint(8192, (40,), generator=torch.Generator().manual_seed(2))
    one = package_logits(PackageModel(tmp_path / "whole"), tokens, 36)
    two = package_logits(PackageModel(trained.packages), tokens, 36)
    assert torch.equal(one, two)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["default", "llama3"],
)
def test_every_architecture_lowers_to_what_transformers_computes(
    make_model: Callable[..., Path], tmp_path: Path, model_type: str, rope: dict[str, Any]
) -> None:
    model = make_model(tmp_path / "model", model_type, False, vocab_size=96, rope_parameters=rope)
    written = write(tmp_path, model, LowerOptions(context=64, batch=8, chunks=2))
    tokens = torch.randint(96, (48,), generator=torch.Generator().manual_seed(3))
    expected = stock_logits(written.checkpoint, tokens)[19:]
    ours = package_logits(PackageModel(written.packages), tokens, 20)
    assert relative_error(ours, expected) <= 1e-2
    assert verify_packages(written.packages, written.checkpoint).weights == 21


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_quantized_head_and_embedding_lower(tmp_path: Path, tiny_qwen2: Path, bits: int) -> None:
    recipe = {"head_bits": bits, "embedding_bits": bits, "bits": 8, "codebook": "uniform"}
    written = write(tmp_path, tiny_qwen2, LowerOptions(context=64, batch=16), **recipe)
    meta = read_meta(written.packages)
    assert (meta.lut_embeddings, meta.lut_ffn, meta.lut_head) == (bits, 8, bits)
    result = verify_packages(written.packages, written.checkpoint)
    assert result.weights == 28 + 1 + meta.head_parts
    for size in written.lowered.packages:
        assert size.weight_bytes <= 1.02 * size.constant_bytes, size


def test_files_inputs_outputs_and_state_are_anemlls(trained: Written) -> None:
    meta = read_meta(trained.packages)
    assert meta.package_names == [
        "qwen25_embeddings",
        "qwen25_FFN_PF_lut4_chunk_01of02",
        "qwen25_FFN_PF_lut4_chunk_02of02",
        "qwen25_lm_head",
    ]
    spec = open_checkpoint(trained.checkpoint).spec
    embeddings = Package.open(trained.packages / "qwen25_embeddings.mlpackage")
    assert embeddings.functions["main"].enumerated == {"input_ids": ((1, 1), (1, 32))}
    last = Package.open(trained.packages / "qwen25_FFN_PF_lut4_chunk_02of02.mlpackage")
    for function, length, rows in (("infer", 1, 1), ("prefill", 32, 1)):
        declared = last.functions[function]
        shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in declared.inputs}
        assert shapes == {
            "hidden_states": ("fp16", (1, length, spec.hidden_size)),
            "position_ids": ("int32", (length,)),
            "causal_mask": ("fp16", (1, 1, length, 160)),
            "current_pos": ("int32", (1,)),
        }
        (output,) = declared.outputs
        assert (output.name, output.shape) == ("output_hidden_states", (1, rows, spec.hidden_size))
        (state,) = declared.states
        assert state.name == "model_model_kv_cache_0"
        assert state.shape == (2 * spec.num_layers, spec.num_key_value_heads, 160, spec.head_dim)
    head = Package.open(trained.packages / "qwen25_lm_head.mlpackage")
    assert [tensor.name for tensor in head.functions["main"].outputs] == [f"logits{i}" for i in range(1, 17)]


def test_layers_spread_over_chunks_without_loss() -> None:
    assert [list(chunk) for chunk in split_layers(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]


def test_head_split_needs_a_divisor(make_model: Callable[..., Path], tmp_path: Path) -> None:
    spec = open_checkpoint(make_model(tmp_path / "prime", "qwen2", True, vocab_size=97)).spec
    with pytest.raises(UnsupportedError, match="97"):
        count_head_parts(spec)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (LowerOptions(context=60, batch=32), "multiple"),
        (LowerOptions(context=64, batch=1), "batch"),
        (LowerOptions(context=64, batch=32, chunks=99), "chunks"),
        (LowerOptions(context=0), "context"),
    ],
)
def test_impossible_sizes_are_refused(
    trained: Written, tmp_path: Path, options: LowerOptions, word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        lower(LowerRequest(trained.checkpoint, options), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_prompt_longer_than_the_context_is_refused(trained: Written) -> None:
    with pytest.raises(UsageError, match="161 tokens"):
        PackageModel(trained.packages).feed([5] * 161)


@pytest.mark.parametrize(
    ("context", "batch", "prefill", "positions"), [(32, 32, 32, 1), (1536, 1536, 1536, 1), (64, 16, 32, 33)]
)
def test_verify_runs_prefill_whatever_the_sizes(
    tmp_path: Path, tiny_qwen2: Path, context: int, batch: int, prefill: int, positions: int
) -> None:
    """A context of one batch, a batch longer than the bundled text, a context that prefill could fill."""
    written = write(tmp_path, tiny_qwen2, LowerOptions(context=context, batch=batch))
    result = verify_packages(written.packages, written.checkpoint)
    assert (result.prefill_tokens, result.positions) == (prefill, positions)


def test_disagreement_counts_unless_rounding_explains_it() -> None:
    """Position 0 agrees, 1 is decided by noise, 2 is plainly different."""
    generator = torch.Generator().manual_seed(4)
    expected = torch.randn(200, 1000, generator=generator)
    expected[:, 0] = 10.0
    ours = expected + 1e-3 * torch.randn(200, 1000, generator=generator)
    expected[1, 1], ours[1, 1] = 9.999, 10.01
    assert compare_logits(0, 64, ours, expected, "here").ties == 1
    ours[2:5, 2] = 10.06
    with pytest.raises(VerificationError, match=r"agrees at 98\.0% of 200"):
        compare_logits(0, 64, ours, expected, "here")
    ours[2:5, 2] = 0.0
    ours[7, 7] += 0.2
    with pytest.raises(VerificationError, match="relative"):
        compare_logits(0, 64, ours, expected, "here")
