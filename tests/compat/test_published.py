"""The interfaces of three published systems, each by its own command line and config file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY
from quantize import main
from running import Ran, invoke, succeed
from safetensors.torch import load_file
from torch import Tensor

from anequant.architectures.spec import ModelSpec
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import resolve_source
from anequant.compat.quarot_hooks import make_hooked_recipe, quant_tag
from anequant.pipeline.quantize import quantize
from anequant.recipe import Calibration, Recipe
from anequant.reference.forward import logits
from anequant.request import Request
from anequant.verification.verify import verify_checkpoint

SCRIPTS = REPOSITORY / "tests" / "dev"
QUARK = SCRIPTS / "qwen2_7b_quark.json"
STEP_1, STEP_2 = SCRIPTS / "llmc_step_1_quarot.yml", SCRIPTS / "llmc_step_2_gptq.yml"
USAGE, INPUT, UNSUPPORTED = 2, 3, 4
LAYERS, WIDTH, INNER, HEAD_DIM = 3, 128, 192, 32
QUERY = "model.layers.1.self_attn.q_proj"
GAIN = "model.layers.1.input_layernorm.weight"
REMOVE = object()
OFFLINE = {"quant.special.online_rotate": False}


def call(*arguments: object) -> Ran:
    return invoke(*arguments, command=main)


def call_well(*arguments: object) -> Ran:
    return succeed(*arguments, command=main)


def refused(result: Ran, code: int, message: str, folder: Path) -> None:
    """The command failed as documented, and `folder` does not exist."""
    assert (result.exit_code, folder.exists()) == (code, False), result.stderr
    assert message in result.stderr, result.stderr


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def recipe_of(folder: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = read(folder / "anequant.json")["recipe"]
    return recipe


def weights(folder: Path, stem: str = "anequant") -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = load_file(folder / f"{stem}.safetensors")
    return loaded


def folded(model: Path, name: str = QUERY, gain: str = GAIN) -> Tensor:
    """A float weight with its norm's gain, float64."""
    tensors = weights(model, "model")
    return tensors[f"{name}.weight"].double() * tensors[gain].double()


def divergence(folder: Path, model: Path) -> float:
    """How far the logits of a written model are from the float model's, relative, on random tokens."""
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(3))
    ours, theirs = (run(path, tokens) for path in (folder, model))
    return float((ours - theirs).norm() / theirs.norm())


def run(folder: Path, tokens: Tensor) -> Tensor:
    """The logits of a checkpoint, layer by layer: [n, length, vocab]."""
    return torch.stack(list(logits(open_checkpoint(folder), tokens)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path_factory.mktemp("published") / "model", "qwen2", True)


@pytest.fixture(scope="module")
def calibration(model: Path) -> Path:
    """Eight windows of 32 token ids beside the model."""
    ids = torch.randint(97, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()
    path = model.parent / "calib.json"
    path.write_text(json.dumps([{"input_ids": row} for row in ids]))
    return path


@pytest.fixture(scope="module")
def hooked(model: Path, calibration: Path) -> Path:
    """What `run` writes at 4 bits everywhere, with Hadamard rotations."""
    destination = model.parent / "hooked"
    call_well(
        *("run", "--src", model, "--dst", destination, "--method", "quarot", "--bits", 4, "--acts-bits", 4),
        *("--kv-bits", 4, "--group-size", 64, "--rotation-method", "hadamard", "--seed", 5),
        *("--calib", calibration),
    )
    return destination / "model_QuaRot_w4_g64_a4_kv4_headfp16"


# run: QuaRot with runtime hooks


@pytest.mark.parametrize(
    ("acts", "kv", "group", "tag"),
    [
        (4, 4, 64, "QuaRot_w4_g64_a4_kv4_headfp16"),
        (8, 4, 128, "QuaRot_w4_g128_kv4_headfp16"),
        (8, 8, 64, "QuaRot_w4_g64_headfp16"),
        (4, 16, 32, "QuaRot_w4_g32_a4_headfp16"),
    ],
)
def test_the_name_leaves_out_what_the_convention_leaves_out(acts: int, kv: int, group: int, tag: str) -> None:
    recipe = make_hooked_recipe(
        *("quarot",),
        bits=4,
        acts_bits=acts,
        kv_bits=kv,
        group_size=group,
        rotation_method="hadamard",
        seed=13,
    )
    assert quant_tag(recipe) == tag
    assert (recipe.r3 != "none", recipe.r4 != "none") == (kv < 16, acts < 16)


def test_run_writes_what_its_files_say(hooked: Path) -> None:
    made, config = read(hooked / "anequant.json"), read(hooked / "quarot_config.json")
    metadata, recipe = read(hooked / "quantization_metadata.json"), made["recipe"]
    for said in (config, metadata):
        assert {key: said[key] for key in ("weights_bits", "activations_bits", "kv_cache_bits")} == {
            "weights_bits": recipe["bits"],
            "activations_bits": recipe["activation_bits"],
            "kv_cache_bits": recipe["kv_bits"],
        }
        assert said["group_size"] == recipe["group_size"] == 64
        assert said["rotation_method"] == recipe["r1"] == "hadamard"
        assert said["seed"] == recipe["seed"] == 5
        assert said["quantized_layers"] == len(made["measured"]["tensors"]) == 7 * LAYERS
        assert said["calibration_samples"] == 0 and made["calibration"] is None
    assert (recipe["bits"], recipe["activation_bits"], recipe["kv_bits"]) == (4, 4, 4)
    assert (recipe["activation_scales"], recipe["r3"], recipe["r4"]) == ("dynamic", "hadamard", "hadamard")
    assert (
        metadata["quant_tag"] == hooked.name.removeprefix("model_") and metadata["destination"] == hooked.name
    )
    assert (metadata["source_model"], metadata["requires_runtime_hooks"]) == ("model", True)
    assert verify_checkpoint(hooked).tensors == 7 * LAYERS
    assert {"quarot_config.json", "quarot_runtime.py", "rotations.safetensors"} <= made["files"].keys()


def test_run_stores_every_rotation_that_it_used(hooked: Path, model: Path) -> None:
    rotations = weights(hooked, "rotations")
    sizes = {"r1": WIDTH, **{f"r2.{layer}": HEAD_DIM for layer in range(LAYERS)}}
    assert {name: tuple(matrix.shape) for name, matrix in rotations.items()} == {
        name: (size, size) for name, size in sizes.items()
    }
    turned = read(hooked / "quarot_config.json")["rotation_matrices"]
    assert turned["self_attn.q_proj"]["rotation_shape"] == [WIDTH, WIDTH]
    assert turned["mlp.down_proj"]["rotation_shape"] == [INNER, INNER]
    groups = (folded(model) @ rotations["r1"]).float().unflatten(1, (-1, 64))
    scales = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    expected = ((groups / scales).round().clamp(-8, 7) * scales).flatten(1)
    stored = weights(hooked)[f"{QUERY}.weight"].float()
    assert (stored - expected).abs().max() < 2e-3 * expected.abs().max()


def test_the_runtime_module_opens_the_model(hooked: Path) -> None:
    specification = importlib.util.spec_from_file_location("quarot_runtime", hooked / "quarot_runtime.py")
    assert specification is not None and specification.loader is not None
    runtime = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(runtime)
    opened = runtime.load_quarot_model(str(hooked)).double()
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        theirs = opened(tokens).logits
    ours = torch.stack(list(logits(open_checkpoint(hooked), tokens, torch.float64)))
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)
    again = runtime.load_quarot_model(str(hooked), opened)
    assert type(again) is type(opened) and again.device == opened.device


def test_run_finds_a_pca_basis_on_the_calibration_data(
    model: Path, calibration: Path, tmp_path: Path
) -> None:
    call_well(
        *("run", "--src", model, "--dst", tmp_path, "--method", "quarot", "--bits", 8, "--acts-bits", 16),
        *("--kv-bits", 16, "--group-size", 32, "--rotation-method", "pca", "--calib", calibration),
    )
    folder = tmp_path / "model_QuaRot_w8_g32_headfp16"
    metadata, made = read(folder / "quantization_metadata.json"), read(folder / "anequant.json")
    assert metadata["rotation_method"] == made["recipe"]["r1"] == "pca" and metadata["seed"] == 13
    assert metadata["calibration"] == {
        "size": 8,
        "source": "calib.json",
        "hash": made["calibration"]["tokens_sha256"],
        "seed": 13,
    }
    assert metadata["requires_runtime_hooks"] is False
    assert set(weights(folder, "rotations")) == {"r1", *(f"r2.{layer}" for layer in range(LAYERS))}
    assert divergence(folder, model) < 0.05


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--method", "awq"), UNSUPPORTED, "method 'awq' is not known here"),
        (("--rotation-method", "svd"), UNSUPPORTED, "rotation method 'svd' is not known"),
        (("--bits", 5), USAGE, "'bits' cannot be 5"),
        (("--acts-bits", 6), USAGE, "'activation_bits' cannot be 6"),
        (("--kv-bits", 2), USAGE, "'kv_bits' cannot be 2"),
        (("--group-size", 48), USAGE, "'group_size' cannot be 48"),
        (("--group-size", 128), USAGE, "groups of 128 do not divide 192"),
        (("--calib", "missing.json"), USAGE, "'missing.json' cannot be read"),
        (("--src", "nowhere/at/all"), INPUT, "does not exist"),
    ],
)
def test_what_run_refuses(
    model: Path, calibration: Path, tmp_path: Path, arguments: Any, code: int, message: str
) -> None:
    usual = ("--src", model, "--dst", tmp_path / "out", "--method", "quarot", "--calib", calibration)
    refused(call("run", *usual, *arguments), code, message, tmp_path / "out")


# quark: a scheme, and a JSON file for the rotation


def quark(model: Path, calibration: Path, output: Path, scheme: str, config: Path | None) -> Ran:
    quarot = ("--pre_quantization_optimization", "quarot", "--pre_optimization_config_file_path", config)
    return call(
        *("quark", "--model_dir", model, "--output_dir", output, "--quant_scheme", scheme),
        *("--dataset", calibration, *(quarot if config else ())),
    )


def changed(path: Path, folder: Path, **change: Any) -> Path:
    """The JSON file with other values, written to `folder`."""
    values = {
        **read(path),
        **{key.replace("online_had", "online-had"): value for key, value in change.items()},
    }
    written = folder / "own.json"
    written.write_text(json.dumps(values))
    return written


def test_the_published_scheme_has_one_scale_per_tensor(
    model: Path, calibration: Path, tmp_path: Path
) -> None:
    result = quark(model, calibration, tmp_path / "out", "w_int8_a_int8_per_tensor_sym", None)
    assert result.exit_code == 0, result.stderr
    weight = folded(model).float()
    scale = (weight.abs().max() / 127).half().float()
    expected = (weight / scale).round() * scale
    stored = weights(tmp_path / "out")[f"{QUERY}.weight"].float()
    assert (stored - expected).abs().max() < 1e-3 * expected.abs().max()
    said = read(tmp_path / "out" / "config.json")["quantization_config"]
    assert (said["activation_bits"], said["activation_scales"], said["r4"]) == (8, "static", "none")
    assert len(said["static_scales"]) == 7 * LAYERS


def test_quark_rotates_as_its_file_says(model: Path, calibration: Path, tmp_path: Path) -> None:
    result = quark(model, calibration, tmp_path / "out", "w_int8_a_int8_per_tensor_sym", QUARK)
    assert result.exit_code == 0, result.stderr
    recipe = recipe_of(tmp_path / "out")
    assert [recipe[key] for key in ("r1", "r2", "r3", "r4")] == ["hadamard", "hadamard", "none", "none"]
    assert (recipe["bits"], recipe["scales"], recipe["activation_bits"]) == (8, "tensor", 8)
    assert verify_checkpoint(tmp_path / "out").tensors == 7 * LAYERS
    assert divergence(tmp_path / "out", model) < 0.1


@pytest.mark.parametrize(
    ("scheme", "online"),
    [
        ("w_int8_per_tensor", ("none", "none")),
        ("w_int8_a_int8_per_tensor_sym", ("none", "hadamard")),
        ("w4a4kv4", ("hadamard", "hadamard")),
    ],
)
def test_online_rotations_serve_what_is_small(
    model: Path, tmp_path: Path, scheme: str, online: tuple[str, str]
) -> None:
    from anequant.compat.quark import WHOLE, translate_recipe

    config = changed(QUARK, tmp_path, online_had=True)
    chosen = translate_recipe(scheme, "quarot", config, str(model), rotated=WHOLE)
    assert (chosen.recipe.r3, chosen.recipe.r4) == online
    assert any("no use for online-had" in note for note in chosen.notes) == (online == ("none", "none"))
    config = changed(QUARK, tmp_path, online_had=False)
    offline = translate_recipe(scheme, "quarot", config, str(model), rotated=WHOLE)
    assert (offline.recipe.r3, offline.recipe.r4) == ("none", "none")


def pairs(spec: ModelSpec) -> list[dict[str, Any]]:
    """R1_pairs of an exported Qwen2, as Quark's ONNX half has them."""
    written, found = ["/model/embed_tokens/Gather"], []
    for layer in range(spec.num_layers):
        at = f"/model/layers.{layer}"
        attention = [f"{at}/self_attn/{name}_proj/MatMul" for name in "qkv"]
        found.append(
            {"prev_nodes": written, "norm_node": f"{at}/input_layernorm/Mul_1", "next_nodes": attention}
        )
        mlp = [f"{at}/mlp/{name}_proj/MatMul" for name in ("gate", "up")]
        norm = f"{at}/post_attention_layernorm/Mul_1"
        found.append({"prev_nodes": [f"{at}/self_attn/o_proj/MatMul"], "norm_node": norm, "next_nodes": mlp})
        written = [f"{at}/mlp/down_proj/MatMul"]
    last = {"prev_nodes": written, "norm_node": "/model/norm/Mul_1", "next_nodes": ["/lm_head/MatMul"]}
    return [*found, last]


@pytest.mark.parametrize(("dim", "r1"), [(WIDTH, ("hadamard", 64)), (32, ("block-hadamard", 32))])
def test_the_onnx_keys_choose_the_hadamard_matrix(
    model: Path, calibration: Path, tmp_path: Path, dim: int, r1: tuple[str, int]
) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps({"R1_pairs": pairs(open_checkpoint(model).spec)}))
    config = tmp_path / "onnx.json"
    words = {"name": "quarot", "r_matrix_dim": dim, "use_random_had": True, "r_config_path": "pairs.json"}
    config.write_text(json.dumps(words))
    result = quark(model, calibration, tmp_path / "out", "w_int8_per_tensor", config)
    assert result.exit_code == 0, result.stderr
    recipe = recipe_of(tmp_path / "out")
    assert (recipe["r1"], recipe["r1_block"]) == r1


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"v_proj": "attn.v"}, UNSUPPORTED, "key 'v_proj' in"),
        ({"backbone": "transformer"}, UNSUPPORTED, "key 'backbone' in"),
        ({"name": "rotation"}, UNSUPPORTED, "key 'name' in"),
        ({"onlinehad": True}, USAGE, "unknown key 'onlinehad' in"),
        ({"online_had": "yes"}, USAGE, "key 'online-had' in"),
        ({"r_matrix_dim": 4096}, UNSUPPORTED, "key 'r_matrix_dim' in"),
        ({"r_matrix_dim": 64, "block_size": 64}, USAGE, "both 'block_size' and 'r_matrix_dim'"),
        ({"use_random_had": False}, UNSUPPORTED, "key 'use_random_had' in"),
        ({"r_config_path": "missing.json"}, INPUT, "'missing.json' is missing"),
    ],
)
def test_what_a_quark_file_may_not_say(
    model: Path, calibration: Path, tmp_path: Path, change: dict[str, Any], code: int, message: str
) -> None:
    config = changed(QUARK, tmp_path, **change)
    result = quark(model, calibration, tmp_path / "out", "w_int8_per_tensor", config)
    refused(result, code, message, tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "code", "message"),
    [
        (lambda listed: listed.pop(), UNSUPPORTED, "leaves out 'model.layers.2.mlp.down_proj'"),
        (
            lambda listed: listed[0]["next_nodes"].append("/model/nothing/MatMul"),
            UNSUPPORTED,
            "/model/nothing/",
        ),
        (lambda listed: listed[0].update(previous=[]), USAGE, "unknown key 'previous'"),
        (lambda listed: listed[0].update(prev_nodes="x"), USAGE, "'prev_nodes' in"),
    ],
)
def test_r1_turns_the_whole_stream_or_nothing(
    model: Path,
    calibration: Path,
    tmp_path: Path,
    edit: Callable[[list[dict[str, Any]]], object],
    code: int,
    message: str,
) -> None:
    listed = pairs(open_checkpoint(model).spec)
    edit(listed)
    (tmp_path / "pairs.json").write_text(json.dumps({"R1_pairs": listed}))
    config = changed(QUARK, tmp_path, r_config_path="pairs.json")
    result = quark(model, calibration, tmp_path / "out", "w_int8_per_tensor", config)
    refused(result, code, message, tmp_path / "out")


def test_a_scheme_that_nobody_published(model: Path, calibration: Path, tmp_path: Path) -> None:
    result = quark(model, calibration, tmp_path / "out", "w_int8_a_int8_per_tensor", None)
    refused(result, USAGE, "did you mean 'w_int8_a_int8_per_tensor_sym'?", tmp_path / "out")


# llmc: YAML, in two steps


@pytest.fixture(scope="module")
def two_steps(model: Path, calibration: Path) -> tuple[Path, Path, str]:
    """The folders that the two files write, run where their relative paths mean something, and the notes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(model.parent)
        notes = [call_well("llmc", "--config", step).stderr for step in (STEP_1, STEP_2)]
    first, second = model.parent / "rotated", model.parent / "quantized"
    return first / "transformed_model", second / "fake_quant_model", "".join(notes)


def test_step_1_writes_the_rotated_float_model(two_steps: tuple[Path, Path, str], model: Path) -> None:
    rotated, _, _ = two_steps
    recipe = recipe_of(rotated)
    assert [recipe[key] for key in ("r1", "r2", "r3", "r4", "seed")] == [
        *("hadamard", "hadamard", "none", "hadamard", 0)
    ]
    assert [path.name for path in rotated.parent.iterdir()] == ["transformed_model"]
    assert divergence(rotated, model) < 1e-5


def test_step_2_is_gptq_of_it(
    two_steps: tuple[Path, Path, str], model: Path, calibration: Path, tmp_path: Path
) -> None:
    rotated, quantized, _ = two_steps
    recipe = recipe_of(quantized)
    assert (recipe["bits"], recipe["rounding"], recipe["codebook"], recipe["scales"]) == (
        *(8, "gptq", "lut", "output"),
    )
    assert (recipe["correction"], recipe["descent"], recipe["refinement"]) == (0, 0, 0)
    assert (recipe["activation_bits"], recipe["activation_symmetric"]) == (8, False)
    assert {key: recipe[key] for key in recipe_of(rotated)} == recipe_of(rotated)
    assert read(quantized / "anequant.json")["calibration"]["windows"] == 8
    assert verify_checkpoint(quantized).tensors == 7 * LAYERS
    assert divergence(quantized, model) < 0.05
    tokens = Calibration((str(calibration),), samples=128, length=32)
    quantize(Request(resolve_source(str(model)), Recipe(**recipe), tokens), tmp_path / "one")
    one, two = weights(tmp_path / "one"), weights(quantized)
    for name in (f"{QUERY}.weight", "model.layers.2.mlp.down_proj.weight"):
        assert (one[name].float() - two[name].float()).norm() < 1e-2 * one[name].float().norm()


def test_llmc_is_told_what_has_no_effect(two_steps: tuple[Path, Path, str]) -> None:
    _, _, notes = two_steps
    for key in (
        *("model.tokenizer_mode", "model.torch_dtype", "calib.preproc", "calib.bs", "eval.eval_pos"),
        *("eval.inference_per_block", "quant.special.percdamp", "quant.special.blocksize"),
        *("a rotation across heads", "what quant says of bits", "zero points"),
    ):
        assert key in notes, key
    assert "fp32_had" not in notes and "actorder" not in notes


def edited(path: Path, folder: Path, changes: Mapping[str, Any]) -> Path:
    """The YAML file with other values by dotted key."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        if value is REMOVE:
            del place[last]
        else:
            place[last] = value
    written = folder / "own.yml"
    written.write_text(yaml.safe_dump(values))
    return written


def test_one_step_writes_both_models(model: Path, calibration: Path, tmp_path: Path) -> None:
    changes = {
        "model.path": str(model),
        "quant.weight.bit": 4,
        "quant.weight.symmetric": True,
        "quant.weight.granularity": "per_group",
        "quant.weight.group_size": 32,
        "quant.act.bit": 4,
        "quant.kvcache": {"method": "Naive", "bit": 4, "symmetric": False, "granularity": "per_token"},
        "quant.special.rotate_mode": "random",
        "save.save_fake": True,
        "save.save_path": str(tmp_path / "out"),
    }
    result = call_well("llmc", "--config", edited(STEP_1, tmp_path, changes))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"transformed_model", "fake_quant_model"}
    recipe = recipe_of(tmp_path / "out" / "fake_quant_model")
    assert (recipe["codebook"], recipe["scales"], recipe["group_size"]) == ("uniform", "group", 32)
    assert (recipe["r1"], recipe["bits"], recipe["activation_bits"], recipe["kv_bits"]) == ("random", 4, 4, 4)
    assert "zero points" not in result.stderr and "kvcache" not in result.stderr


def test_static_activations_of_llmc(model: Path, calibration: Path, tmp_path: Path) -> None:
    changes = {
        "model.path": str(model),
        "calib": {"name": "custom", "path": str(calibration), "n_samples": 3, "seq_len": 16},
        "quant.weight.symmetric": True,
        "quant.act": {"bit": 8, "symmetric": True, "granularity": "per_tensor", "static": True},
        "quant.special.online_rotate": False,
        "save": {"save_path": str(tmp_path / "out")},
    }
    call_well("llmc", "--config", edited(STEP_1, tmp_path, changes))
    folder = tmp_path / "out" / "fake_quant_model"
    recipe = recipe_of(folder)
    assert (recipe["activation_scales"], recipe["r2"], recipe["r4"]) == ("static", "none", "none")
    assert read(folder / "anequant.json")["calibration"]["windows"] == 3


@pytest.mark.parametrize(
    ("step", "changes", "code", "message"),
    [
        (STEP_1, {"quant.special.rotatemode": "random"}, USAGE, "unknown key 'quant.special.rotatemode'"),
        (STEP_1, {"quant.sparsity": {"weight": 1}}, USAGE, "unknown key 'quant.sparsity.weight'"),
        (STEP_1, {"quant.weight.bit": "4"}, USAGE, "key 'quant.weight.bit' in"),
        (STEP_1, {"quant.weight.bit": 5}, USAGE, "'bits' cannot be 5"),
        (STEP_1, {"quant.weight.bit": REMOVE}, USAGE, "key 'quant.weight.bit' is missing"),
        (STEP_1, {"eval": None}, USAGE, "key 'eval' in"),
        (STEP_1, {"model.type": "Llama"}, USAGE, "key 'model.type' in"),
        (STEP_1, {"quant.method": "Awq"}, UNSUPPORTED, "key 'quant.method' in"),
        (STEP_1, {"quant.weight.granularity": "per_head"}, UNSUPPORTED, "'quant.weight.granularity'"),
        (
            STEP_1,
            {"quant.weight.symmetric": True, "quant.weight.calib_algo": "mse"},
            UNSUPPORTED,
            "calib_algo",
        ),
        (STEP_1, {"quant.act.granularity": "per_tensor"}, UNSUPPORTED, "key 'quant.act.static'"),
        (STEP_1, {"quant.act.calib_algo": "mse"}, UNSUPPORTED, "key 'quant.act.calib_algo'"),
        (STEP_1, {"quant.kvcache": {"method": "Kivi", "bit": 4}}, UNSUPPORTED, "'quant.kvcache.method'"),
        (STEP_1, {"quant.special.rotate_mode": "dct"}, UNSUPPORTED, "'quant.special.rotate_mode'"),
        (STEP_2, {"save.save_trans": True}, UNSUPPORTED, "key 'save.save_trans'"),
        (STEP_2, {"quant.special.actorder": False}, UNSUPPORTED, "'quant.special.actorder'"),
        (STEP_2, {**OFFLINE, "calib": REMOVE}, USAGE, "no section 'calib'"),
        (STEP_2, {**OFFLINE, "calib.path": REMOVE}, USAGE, "key 'calib.path' is missing"),
        (STEP_2, {**OFFLINE, "calib.download": True, "calib.name": "c4"}, UNSUPPORTED, "'calib.name'"),
        (STEP_2, {**OFFLINE, "calib.path": "no.txt"}, USAGE, "'no.txt' does not exist"),
        (STEP_2, {}, USAGE, "does not run R4"),
    ],
)
def test_what_an_llmc_file_may_not_say(
    model: Path, tmp_path: Path, step: Path, changes: dict[str, Any], code: int, message: str
) -> None:
    """The model is not a rotated one here."""
    output = tmp_path / "out"
    config = edited(step, tmp_path, {"model.path": str(model), "save.save_path": str(output), **changes})
    refused(call("llmc", "--config", config), code, message, output)


def test_step_2_agrees_with_step_1(two_steps: tuple[Path, Path, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    changes = {
        "model.path": str(two_steps[0]),
        "save.save_path": str(output),
        "quant.special.online_rotate": False,
    }
    result = call("llmc", "--config", edited(STEP_2, tmp_path, changes))
    refused(result, USAGE, "'quant.special.online_rotate'", output)
    again = call("llmc", "--config", edited(STEP_1, tmp_path, {**changes, "save.save_trans": True}))
    refused(again, INPUT, "already rotated", output)


def test_a_file_that_is_no_yaml_table(tmp_path: Path) -> None:
    path = tmp_path / "own.yml"
    for text, message in (("a: [", "cannot be read"), ("- a", "no table"), (None, "cannot be read")):
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        result = call("llmc", "--config", path)
        assert result.exit_code == USAGE and message in result.stderr
