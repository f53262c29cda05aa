"""Assets of Core AI, run by Apple's own interpreter beside the checkpoint in transformers.

References: transformers in float32 and float64, and the checkpoint's own tensors. Nothing here is run where
coreai-core is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Quantized
from transformers import AutoModelForCausalLM

from anequant.calibration.ranges import measure_ranges
from anequant.checkpoints.layers import load_table, open_quantized
from anequant.checkpoints.layout import list_projections
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.errors import UnsupportedError, UsageError
from anequant.lower_options import AssetOptions, LowerOptions
from anequant.pipeline.asset_lowering import AssetResult
from anequant.pipeline.lower import lower
from anequant.quantization.linear import QuantizedLinear
from anequant.reference.windows import RANGE_TOKENS, choose_probe_tokens, load_tokenizer
from anequant.request import LowerRequest
from anequant.runtime.coreai_backend import AssetModel
from anequant.runtime.generate import generate_tokens
from anequant.runtime.transformers_backend import TransformersModel
from anequant.targets.coreai.assemble import PROGRAM, build_asset
from anequant.targets.coreai.bundle import find_asset, read_design
from anequant.targets.coreai.design import list_functions
from anequant.targets.coreai.host import Host
from anequant.targets.coreai.installed import find_problem
from anequant.targets.coreai.runner import Runner
from anequant.targets.coreai.stored import StoredAsset
from anequant.targets.shared.headroom import plan_headroom
from anequant.verification import assets
from anequant.verification.assets import AssetCheck, verify_bundle

problem = find_problem()
pytestmark = pytest.mark.skipif(problem is not None, reason=problem.what if problem else "")

DECIDED = 0.05
"""A difference of two logits that float16 does not turn round: ten times what was seen."""

SMALL = AssetOptions(context=256, ladder=(1, 8))
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
FORMS: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2},
    "3 bits, tables 6 and 4": {"bits": 3, "head_bits": 6, "embedding_bits": 4},
    "6 bits, head 8": {"bits": 6, "head_bits": 8},
    "8 bits, embedding 8": {"bits": 8, "embedding_bits": 8},
    "one scale, folded": {"premultiply_scales": True, "scales": "tensor"},
    "R3 and R4": {"r3": "hadamard", "r4": "block-hadamard", "r4_block": 64},
}

Lower = Callable[..., Path]


@pytest.fixture(scope="module")
def asset_of(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    """`asset_of(quantized, options)`: the bundle of a checkpoint."""

    def run(quantized: Quantized, options: AssetOptions = SMALL) -> Path:
        folder = tmp_path_factory.mktemp("bundle") / "bundle"
        assert isinstance(lower(LowerRequest(quantized.folder, options), folder), AssetResult)
        return folder

    return run


@pytest.fixture(scope="session")
def random_model(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> Callable[[str], Path]:
    return lambda name: make_model(tmp_path_factory.mktemp("random") / name, name, False)


def assert_same(check: AssetCheck, checkpoint: Path) -> None:
    """All layers were run, at 144 positions, with the same choices and logits."""
    assert check.layers == check.of and check.positions == check.prompt + assets.DECODE
    assert check.agreement + check.ties / check.positions >= 0.99
    assert check.relative_error < 0.01
    assert check.constants >= 3 * len(list_projections(open_quantized(checkpoint).spec))


@pytest.mark.parametrize("kv", ["state", "functional"])
@pytest.mark.parametrize("name", ["tiny-qwen2", *ARCHITECTURES])
def test_what_apples_runtime_computes_is_the_checkpoint(
    name: str,
    kv: str,
    tiny_qwen2: Path,
    random_model: Callable[[str], Path],
    quantize_model: Callable[..., Quantized],
    asset_of: Lower,
) -> None:
    source = tiny_qwen2 if name == "tiny-qwen2" else random_model(name)
    quantized = quantize_model(source, "w4-nearest")
    bundle = asset_of(quantized, AssetOptions(256, (8,), kv))
    assert_same(verify_bundle(bundle, quantized.folder), quantized.folder)


@pytest.mark.parametrize("kv", ["state", "functional"])
def test_greedy_text_is_that_of_transformers(
    kv: str, tiny_qwen2: Path, quantize_model: Callable[..., Quantized], asset_of: Lower
) -> None:
    """The prompt goes through `prompt_opt` and then `extend`, and the text across two contexts."""
    quantized = quantize_model(tiny_qwen2, "w4-nearest")
    text = SAMPLE_TEXT.read_text(encoding="utf-8")
    tokens = load_tokenizer(quantized.folder)(text)["input_ids"]
    prompt, expected = find_decided_prompt(TransformersModel(quantized.folder), tokens)
    asset = AssetModel(asset_of(quantized, AssetOptions(512, (8, 64), kv)))
    found = list(generate_tokens(asset, prompt, lambda logits: int(logits.argmax()), limit=16, stop=()))
    assert found == expected and asset.position == len(prompt) + 15 > 256


def find_decided_prompt(model: TransformersModel, tokens: list[int]) -> tuple[list[int], list[int]]:
    """The first beginning of the tokens after which the best of each of 16 tokens is DECIDED beyond rounding,
    and these 16."""
    for length in range(243, 256):
        margins: list[float] = []

        def choose(logits: torch.Tensor, margins: list[float] = margins) -> int:
            best = logits.topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            return int(best.indices[0])

        model.reset()
        found = list(generate_tokens(model, tokens[:length], choose, limit=16, stop=()))
        if min(margins) > DECIDED:
            return tokens[:length], found
    raise AssertionError("every prompt has a tie")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint(
    form: str, random_model: Callable[[str], Path], quantize_model: Callable[..., Quantized], asset_of: Lower
) -> None:
    quantized = quantize_model(random_model("qwen3"), "w4-nearest", **FORMS[form])
    bundle = asset_of(quantized, AssetOptions(256, (8,)))
    assert_same(verify_bundle(bundle, quantized.folder), quantized.folder)
    design, _ = read_design(bundle)
    scaled = any(name.endswith(".input_scale") for name in design.constants)
    assert scaled is (form != "one scale, folded")
    assert ("r4_factor_1.codes" in design.constants) is (form == "R3 and R4")


def test_rounded_activations(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], asset_of: Lower
) -> None:
    quantized = quantize_model(tiny_qwen2, "w8a8-ane")
    check = verify_bundle(asset_of(quantized, AssetOptions(256, (8,))), quantized.folder)
    assert_same(check, quantized.folder)
    assert check.rounding is not None and check.rounding < 2


@pytest.mark.parametrize("name", ["tiny-qwen2", "qwen3"])
def test_a_twin_in_float32_is_what_codes_and_scales_say(
    name: str,
    tmp_path: Path,
    tiny_qwen2: Path,
    random_model: Callable[[str], Path],
    quantize_model: Callable[..., Quantized],
) -> None:
    """Every weight is output_scale * codebook[codes] * input_scale in float64, not the stored float16."""
    source = tiny_qwen2 if name == "tiny-qwen2" else random_model(name)
    folder = quantize_model(source, "w4-nearest").folder
    checkpoint = open_quantized(folder)
    tokens = choose_probe_tokens(checkpoint, 64)
    headroom = plan_headroom(list(measure_ranges(checkpoint, tokens[None])))
    design, _ = build_asset(
        folder, tmp_path / "twin.aimodel", AssetOptions(256, (64,)), headroom, dtype="float32"
    )
    with Runner(tmp_path / "twin.aimodel") as runner:
        ours = Host(runner, design).score(tokens.tolist(), 64)
    expected = exact_logits(folder, checkpoint, tokens)
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 1e-5


def exact_logits(folder: Path, checkpoint: Checkpoint, tokens: torch.Tensor) -> Any:
    """transformers in float64, with the weights that the codes stand for."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        for name in list_projections(checkpoint.spec):
            linear = load(name, checkpoint.read, checkpoint.tensors)
            rows, columns = linear.output_scale.double()[:, None], linear.input_scale.double()
            exact = rows * linear.codebook.double()[linear.codes.long()] * columns
            model.get_submodule(name).weight.copy_(exact)
        return model(tokens[None]).logits[0].numpy()


def test_qwen2_29m_on_four_layers(
    qwen2_29m: Path,
    quantize_model: Callable[..., Quantized],
    asset_of: Lower,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layers are copied out of the file that was written."""
    quantized = quantize_model(qwen2_29m, "w4-nearest")
    monkeypatch.setattr(assets, "choose_extent", lambda sizes, ladder: assets.Extent(4, 8, 4, 1.0))
    check = verify_bundle(asset_of(quantized, SMALL), quantized.folder)
    assert (check.layers, check.positions) == (4, 20) and check.of > 4
    assert check.agreement + check.ties / check.positions >= 0.99 and check.relative_error < 0.01


def test_the_functions_are_those_of_the_design(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], asset_of: Lower
) -> None:
    for kv in ("state", "functional"):
        bundle = asset_of(quantize_model(tiny_qwen2, "w4-nearest"), AssetOptions(256, (8, 16), kv))
        design, _ = read_design(bundle)
        with Runner(find_asset(bundle)) as runner:
            for ports in list_functions(design):
                told = runner.describe(ports.name)
                for kind in ("inputs", "states", "outputs"):
                    expected = [[port.name, port.dtype, list(port.shape)] for port in getattr(ports, kind)]
                    assert sorted(told[kind]) == sorted(expected), f"{ports.name} {kind}"
            assert sorted(runner.functions) == sorted(ports.name for ports in list_functions(design))


def test_four_bits_are_four_bits_on_disk(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], asset_of: Lower
) -> None:
    """Codes, tables and scales of projections; each is there once, whatever the number of functions."""
    quantized = quantize_model(tiny_qwen2, "w4-nearest", scales="output")
    few, many = (
        find_asset(asset_of(quantized, options))
        for options in (AssetOptions(256, (8,)), AssetOptions(1024, (8, 16, 32, 64)))
    )
    checkpoint = open_quantized(quantized.folder)
    blobs = StoredAsset(many).blobs
    names = list_projections(checkpoint.spec)
    weights = sum(load(name, checkpoint.read, checkpoint.tensors).codes.numel() for name in names)
    sizes = [blobs[f"{name}.{part}"].size for name in names for part in ("codes", "codebook")]
    assert 8 * sum(sizes) / weights <= 4.05
    data = (many / PROGRAM).read_bytes()
    for name in names:
        blob = blobs[f"{name}.codes"]
        assert data.count(data[blob.start : blob.start + blob.size]) == 1
    rope = blobs["rope.cos"].size * 2 - StoredAsset(few).blobs["rope.cos"].size * 2
    graphs = (many / PROGRAM).stat().st_size - (few / PROGRAM).stat().st_size - rope
    assert graphs < 1_500_000


def test_tables_are_the_checkpoints_own_bytes(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], asset_of: Lower
) -> None:
    """The embedding and the head in float16 are what the checkpoint's safetensors hold."""
    quantized = quantize_model(tiny_qwen2, "w4-nearest")
    stored = StoredAsset(find_asset(asset_of(quantized)))
    checkpoint = open_quantized(quantized.folder)
    for name, part in (("model.embed_tokens", ""), ("lm_head", ".1")):
        assert not isinstance(load_table(checkpoint, name), QuantizedLinear)
        expected = checkpoint.read(f"{name}.weight").half().numpy().tobytes()
        assert b"".join(stored.read(f"{name}{part}.weight")) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (AssetOptions(context=300), "--context 300 is none of Core AI's"),
        (AssetOptions(context=128), "--context 128 is none of Core AI's"),
        (AssetOptions(ladder=()), "is no ladder"),
        (AssetOptions(ladder=(16, 8)), "is no ladder"),
        (AssetOptions(ladder=(8, 24)), "24, which does not divide 256"),
        (AssetOptions(kv="paged"), "--kv is 'paged'"),
    ],
)
def test_impossible_sizes_are_refused(
    options: AssetOptions,
    message: str,
    tmp_path: Path,
    tiny_qwen2: Path,
    quantize_model: Callable[..., Quantized],
) -> None:
    quantized = quantize_model(tiny_qwen2, "w4-nearest")
    with pytest.raises(UsageError) as refused:
        lower(LowerRequest(quantized.folder, options), tmp_path / "bundle")
    assert message in refused.value.what and refused.value.remedy
    assert not list(tmp_path.iterdir())


def test_scales_of_groups_are_refused(
    tmp_path: Path, random_model: Callable[[str], Path], quantize_model: Callable[..., Quantized]
) -> None:
    quantized = quantize_model(random_model("llama"), "w4-nearest", scales="group", group_size=32)
    with pytest.raises(UnsupportedError, match="scales of groups") as refused:
        lower(LowerRequest(quantized.folder, SMALL), tmp_path / "bundle")
    assert "--target coreml" in refused.value.remedy
    assert not list(tmp_path.iterdir())


def test_packages_and_asset_agree(
    tmp_path: Path, tiny_qwen2: Path, quantize_model: Callable[..., Quantized], asset_of: Lower
) -> None:
    """Apple's runtime on the asset and our interpreter on the packages of one checkpoint."""
    quantized = quantize_model(tiny_qwen2, "w4-nearest")
    lower(LowerRequest(quantized.folder, LowerOptions(context=256, batch=16)), tmp_path / "packages")
    check = verify_bundle(
        asset_of(quantized, AssetOptions(256, (8,))), quantized.folder, tmp_path / "packages"
    )
    assert check.witness is not None and check.witness < 0.01


def test_probe_lengths_fit(tiny_qwen2: Path) -> None:
    assert assets.DECODE + 2 * max(AssetOptions().ladder) <= 256 >= RANGE_TOKENS
