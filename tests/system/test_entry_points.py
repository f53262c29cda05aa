"""ANEMLL's published scripts, its convert_model.sh, and what a Mac is asked to run: by their own flags."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from running import Ran, execute, invoke
from safetensors.torch import load_file, save_file
from torch import Tensor

from anequant.checkpoints.contract import check_contract
from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT
from anequant.errors import UnsupportedError
from anequant.inspection.device_profile import measure_agreement, time_decoding
from anequant.quantization.fold_scales import premultiply_scales
from anequant.quantization.linear import QuantizedLinear
from anequant.runtime.coreml_backend import PackageModel
from anequant.targets.coreml.device import Placement, count_by_device, list_placements

SCRIPTS = REPOSITORY / "tests" / "dev"
TOOLS = REPOSITORY / "tools"
ENTRY_POINTS = sorted(SCRIPTS.glob("*.py"))
CONFIG = SCRIPTS / "qwen25_quarot.json"
AWKWARD = 'it\'s a "model" $(echo of) many `words`'
SWITCHED = {"ENABLE_SP_QUANT": "true"}
USAGE, INPUT, UNSUPPORTED, RESOURCE, VERIFICATION = 2, 3, 4, 5, 6
PROJECTIONS = 4 * 7
FIRST, SECOND = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
PROMPT = "In the morning they went down to the"


def run(*command: object, **more: str) -> Ran:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    unset = dict.fromkeys(SWITCHED)
    return execute(*command, env={**unset, "PATH": path, "OMP_NUM_THREADS": "1", **more})


def script(name: str, *arguments: object, **more: str) -> str:
    """stdout of one of the scripts, run by itself."""
    result = run(sys.executable, SCRIPTS / f"{name}.py", *arguments, **more)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def call(name: str, *arguments: object, **more: str | None) -> Ran:
    """A script's command in this process."""
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return invoke(*arguments, command=module.main, env=more)


def tensors(folder: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return loaded


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    """A folder of awkward name with the bundled model in `float`."""
    place = tmp_path_factory.mktemp("entry") / AWKWARD
    shutil.copytree(tiny_qwen2, place / "float")
    return place


@pytest.fixture(scope="module")
def calibration(place: Path) -> Path:
    output = place / "calib.json"
    said = script(
        *("create_simple_calib", "--nsamples", 3, "--seqlen", 32, "--output", output),
        *("--model", place / "float", "--text", SAMPLE_TEXT),
    )
    assert said == f"Saved 3 calibration samples to {output}\n"
    return output


@pytest.fixture(scope="module")
def quantized(place: Path, calibration: Path) -> Path:
    output = place / "quantized"
    said = script(
        *("quantize_qwen25_quarot", "--model_dir", place / "float", "--calib_data", calibration),
        *("--quant_scheme", "w_int4_per_tensor", "--pre_quantization_optimization", "quarot"),
        *("--quarot_config", CONFIG, "--output_dir", output),
    )
    assert said.splitlines() == [
        f"Quantization complete! Model saved to {output}",
        f"Quantized {PROJECTIONS} layers with 4-bit precision",
    ]
    return output


@pytest.fixture(scope="module")
def packages(place: Path) -> Path:
    """What convert_model.sh makes of the bundled model."""
    output = place / "packages"
    result = convert(place, output, "--restart", 1, *SIZES, "--", "--recipe", "w_int4_per_tensor")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"done: {output}"
    for line in (
        "steps 1-3: quantize",
        "steps 4-5: lower and verify",
        "step 8: generate",
        "left for the Mac",
    ):
        assert line in result.stdout
    return output


SIZES = ("--context", 32, "--batch", 8, "--chunk", 2, "--lut3", "none", "--prefix", "named")


def convert(place: Path, output: Path, *arguments: object, **more: str) -> Ran:
    script = TOOLS / "convert_model.sh"
    return run(script, "--model", place / "float", "--output", output, *arguments, **more)


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: path.stem)
def test_entry_points_are_thin_and_no_test_modules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 40
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [name for name in names if name.lower().startswith("test")]


def test_calibration_file_is_one_that_calibrates(place: Path, calibration: Path) -> None:
    rows = json.loads(calibration.read_text(encoding="utf-8"))
    assert [len(row["input_ids"]) for row in rows] == [32] * 3 and all(row["text"] for row in rows)
    recipe = place / "by gptq.toml"
    recipe.write_text(
        'scales = "tensor"\ncodebook = "uniform"\nrounding = "gptq"\nrefinement = 0\ndescent = 0\n'
    )
    result = call(
        *("quantize_qwen25_quarot", "--model_dir", place / "float", "--calib_data", calibration),
        *("--quant_scheme", recipe, "--output_dir", place / "calibrated"),
    )
    assert result.exit_code == 0 and "no use for" not in result.stderr, result.stderr
    record = json.loads((place / "calibrated" / "anequant.json").read_text(encoding="utf-8"))["calibration"]
    assert (record["source"], record["windows"], record["length"]) == ("calib.json", 3, 32)


def test_quantization_config_says_what_was_done(quantized: Path) -> None:
    said = json.loads((quantized / "quantization_config.json").read_text(encoding="utf-8"))
    quality = said.pop("quality_metrics")
    assert said == {
        "quantization_method": "quarot",
        "weight_bits": 4,
        "per_tensor": True,
        "rotated": True,
        "symmetric": True,
        "model_type": "qwen2",
        "layers_quantized": PROJECTIONS,
        "block_size": 64,
        "fusion_applied": True,
        "premultiplied_scales": False,
        "fusion_metadata": {
            "layernorm_fusions": 9,
            "r1": "block-hadamard",
            "r2": "hadamard",
            "r3": "none",
            "r4": "none",
            "seed": 0,
        },
    }
    assert 0 < quality["relative_logit_error_of_rotation"] < 1e-5
    assert 0 < quality["mean_relative_weight_error"] < quality["largest_relative_weight_error"] < 0.5
    codebooks = [name for name in tensors(quantized) if name.endswith(".codebook")]
    assert len(codebooks) == said["layers_quantized"]


def test_the_depth_of_qwen25_counts_168_layers(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 24, "num_key_value_heads": 1}
    model = make_model(tmp_path / "model", "qwen2", True, **sizes)
    result = call("quantize_qwen25_quarot", "--model_dir", model, "--output_dir", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "Quantized 168 layers with 4-bit precision"


def test_premultiplied_scales_are_ones_and_the_weights_stay(place: Path, quantized: Path) -> None:
    output = place / "premultiplied"
    result = call(
        *("quantize_qwen25_quarot", "--model_dir", place / "float", "--quarot_config", CONFIG),
        *("--output_dir", output, "--premultiply_scales"),
    )
    assert result.exit_code == 0, result.stderr
    ours, separate = tensors(output), tensors(quantized)
    assert ours.keys() == separate.keys()
    for name, tensor in ours.items():
        if name.endswith("_scales"):
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif name.endswith(".codebook"):
            scale = separate[name.replace(".codebook", ".output_scales")][0, 0]
            assert torch.equal(tensor, (separate[name] * scale).half().float())
        else:
            assert torch.equal(tensor, separate[name]), name
    for name in (FIRST, SECOND):
        assert set(ours[f"{name}.weight"].unique().tolist()) <= set(ours[f"{name}.codebook"].tolist())
    assert check_contract(output) == []
    said = json.loads((output / "quantization_config.json").read_text(encoding="utf-8"))
    assert said["premultiplied_scales"] is True


def test_more_than_one_scale_cannot_be_premultiplied(place: Path, tmp_path: Path) -> None:
    result = call(
        *("quantize_qwen25_quarot", "--model_dir", place / "float", "--quant_scheme", "w4-nearest"),
        *("--output_dir", tmp_path / "out", "--premultiply_scales"),
    )
    assert (result.exit_code, (tmp_path / "out").exists()) == (USAGE, False)
    assert (
        "premultiply_scales needs one scale per tensor that stays, and scales is 'balanced'" in result.stderr
    )
    rows = QuantizedLinear(
        torch.zeros(2, 2, dtype=torch.uint8),
        torch.tensor([-1.0, 1.0]),
        torch.ones(2),
        torch.tensor([1.0, 2.0]),
    )
    with pytest.raises(UnsupportedError, match="'some' has more than one scale"):
        premultiply_scales(rows, "some")


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"blocksize": 64}, USAGE, "unknown key 'blocksize' in"),
        ({"online-had": 1}, USAGE, "key 'online-had' in"),
        ({"q_proj": "attention.q"}, UNSUPPORTED, "key 'q_proj' in"),
        ({"block_size": 48}, USAGE, "'r1_block' is 48"),
        ({"block_size": "64"}, USAGE, "'r1_block' must be a whole number"),
        ({"block_size": 128}, USAGE, "a Hadamard block of 128 does not fit a width of 192"),
        ([], USAGE, "holds no table"),
    ],
)
def test_what_a_quarot_file_may_not_say(
    place: Path, tmp_path: Path, change: Any, code: int, message: str
) -> None:
    config = tmp_path / "own.json"
    config.write_text(json.dumps({**json.loads(CONFIG.read_text()), **change} if change else change))
    output = tmp_path / "out"
    result = call(
        *("quantize_qwen25_quarot", "--model_dir", place / "float"),
        *("--quarot_config", config, "--output_dir", output),
    )
    assert (result.exit_code, output.exists()) == (code, False), result.stderr
    assert message in result.stderr


def test_settings_without_use_are_named(place: Path, tmp_path: Path) -> None:
    config = tmp_path / "published.json"
    config.write_text(json.dumps({"name": "quarot", "block_size": 32, "search_iters": 100, "lr": 1e-4}))
    arguments = ("--model_dir", place / "float", "--quarot_config", config, "--output_dir", tmp_path / "out")
    result = call("quantize_qwen25_quarot", *arguments, "--quant_scheme", "w_int8_per_tensor")
    assert result.exit_code == 0, result.stderr
    assert "no use for search_iters, lr" in result.stderr and "no use for calibration data" in result.stderr
    assert result.stdout.endswith(f"Quantized {PROJECTIONS} layers with 8-bit precision\n")
    said = json.loads((tmp_path / "out" / "quantization_config.json").read_text(encoding="utf-8"))
    assert (said["weight_bits"], said["block_size"]) == (8, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quant_scheme", "w_int5_per_tensor"), "unknown recipe 'w_int5_per_tensor'"),
        (("--pre_quantization_optimization", "quarrot"), "did you mean 'quarot'?"),
        (("--pre_quantization_optimization", "none", "--quarot_config", CONFIG), "says how to rotate"),
        (("--calib_data", "missing.json"), "'missing.json' cannot be read"),
    ],
)
def test_words_that_mean_nothing(place: Path, tmp_path: Path, arguments: Any, message: str) -> None:
    output = tmp_path / "out"
    result = call(
        *("quantize_qwen25_quarot", "--model_dir", place / "float", "--output_dir", output, *arguments)
    )
    assert (result.exit_code, output.exists()) == (USAGE, False), result.stderr
    assert message in result.stderr


def test_the_remedy_for_an_output_that_exists_is_there(place: Path, tmp_path: Path) -> None:
    words = ("quantize_qwen25_quarot", "--model_dir", place / "float", "--output_dir", tmp_path / "out")
    (tmp_path / "out").mkdir()
    result = call(*words, "--pre_quantization_optimization", "none")
    assert result.exit_code == USAGE and "pass --force" in result.stderr
    assert call(*words, "--pre_quantization_optimization", "none", "--force").exit_code == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_fusion_leaves_a_model_in_memory_as_it_was(place: Path) -> None:
    program = f"""
import json, sys
sys.path.insert(0, {str(SCRIPTS)!r})
import torch
from transformers import AutoModelForCausalLM
from anequant.errors import UsageError
from quarot_fusion import apply_quarot_fusion_to_model, verify_fusion_quality
class Config: block_size = 64
model = AutoModelForCausalLM.from_pretrained({str(place / "float")!r}, dtype=torch.float32).eval()
try:
    verify_fusion_quality(model, Config())
except UsageError as error:
    refusal = str(error)
before = model.model.layers[0].mlp.up_proj.weight.clone()
print(json.dumps({{
    "refusal": refusal,
    "done": apply_quarot_fusion_to_model(model, Config()),
    "quality": verify_fusion_quality(model, Config()),
    "turned": not torch.equal(before, model.model.layers[0].mlp.up_proj.weight),
    "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    "gains": all(bool((p == 1).all()) for n, p in model.named_parameters() if "norm" in n),
}}))
"""
    result = run(sys.executable, "-c", program)
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["refusal"].startswith("the model was not fused")
    done = said["done"]
    assert (done["layers_processed"], done["layernorm_fusions"], done["bias_fusions"]) == (4, 9, 0)
    assert (done["hadamard_rotations"], done["r1"], done["r2"]) == (PROJECTIONS, "block-hadamard", "hadamard")
    assert said["quality"]["relative_logit_error"] < 1e-5 and said["quality"]["same_top_token"] == 1
    assert (said["turned"], said["tied"], said["gains"]) == (True, False, True)


def test_a_sound_checkpoint_passes(quantized: Path) -> None:
    said = script(
        *("test_qwen25_sp_quant", "--model", quantized, "--name", "tiny", "--description", "bundled"),
        *("--skip-default",),
        **SWITCHED,
    ).splitlines()
    assert said[:2] == ["Testing: tiny", "Description: bundled"]
    assert said[-2:] == ["tiny test PASSED", "All 1 tests passed"]
    assert f"{PROJECTIONS} projections keep the contract" in said[2] and said[3].startswith("Perplexity")


def test_the_variable_is_needed(quantized: Path) -> None:
    for value in (None, "false", "0"):
        result = call("test_qwen25_sp_quant", "--model", quantized, "--skip-default", ENABLE_SP_QUANT=value)
        assert result.exit_code == USAGE and "set ENABLE_SP_QUANT=true" in result.stderr


def test_something_must_be_tested() -> None:
    result = call("test_qwen25_sp_quant", "--skip-default", **SWITCHED)
    assert result.exit_code == USAGE and "leaves nothing to test" in result.stderr


def removed(part: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda stored: stored.__delitem__(part)


def changed(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(stored: dict[str, Tensor]) -> None:
        stored[part] = change(stored[part]).contiguous()

    return apply


def zero_first(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = 0
    return tensor


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (removed(f"{FIRST}.input_scales"), VERIFICATION, f"'{FIRST}.input_scales' is missing"),
        (removed(f"{SECOND}.output_scales"), VERIFICATION, f"'{SECOND}.output_scales' is missing"),
        (removed(f"{SECOND}.bias"), VERIFICATION, f"'{SECOND}.bias' is missing"),
        (removed(f"{FIRST}.bias"), INPUT, f"tensor '{FIRST}.bias' is missing"),
        (changed(f"{SECOND}.output_scales", zero_first), VERIFICATION, "holds zeros"),
        (changed(f"{SECOND}.input_scales", lambda scale: scale * 1e-9), VERIFICATION, "holds zeros"),
        (changed(f"{SECOND}.input_scales", torch.Tensor.t), VERIFICATION, "it must be [1, 576]"),
        (
            changed(f"{SECOND}.weight", torch.Tensor.t),
            INPUT,
            "has shape [576, 192], config.json says [192, 576]",
        ),
        (
            changed(f"{SECOND}.weight", lambda weight: weight * 1.3),
            VERIFICATION,
            "which is no entry of the codebook",
        ),
        (changed(f"{SECOND}.bias", lambda bias: bias + 60000), VERIFICATION, "leaves float16"),
        (changed(f"{SECOND}.codebook", lambda book: book[:1]), VERIFICATION, "must hold 2 to 256"),
        (changed(f"{SECOND}.output_scales", lambda scale: scale * torch.inf), VERIFICATION, "not finite"),
    ],
)
def test_a_broken_checkpoint_fails_with_a_reason(
    quantized: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], code: int, message: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copyfile(quantized / "config.json", broken / "config.json")
    stored = tensors(quantized)
    change(stored)
    save_file(stored, broken / "model.safetensors")
    result = call("test_qwen25_sp_quant", "--model", broken, "--skip-default", **SWITCHED)
    assert (result.exit_code, "PASSED" in result.stdout) == (code, False), result.stderr
    assert message in result.stderr


def test_contract_lists_every_violation_and_reads_others(quantized: Path, tmp_path: Path) -> None:
    stored = tensors(quantized)
    for name in (FIRST, SECOND):
        for part in ("weight", "output_scales"):
            stored[f"{name}.{part}"][::2] *= -1
        stored[f"{name}.codebook"] = stored[f"{name}.codebook"].flip(0).reshape(4, 4).contiguous()
    stored.pop("model.layers.2.mlp.up_proj.codebook")
    shutil.copyfile(quantized / "config.json", tmp_path / "config.json")
    save_file(stored, tmp_path / "model.safetensors")
    assert check_contract(tmp_path) == []
    for part in ("input_scales", "bias"):
        stored.pop(f"{SECOND}.{part}")
    save_file(stored, tmp_path / "model.safetensors")
    missing = {str(violation) for violation in check_contract(tmp_path) if violation.rule == "is missing"}
    assert missing == {f"'{SECOND}.input_scales' is missing", f"'{SECOND}.bias' is missing"}


def test_both_backends_of_inference_say_the_same(quantized: Path) -> None:
    arguments = ("--model", quantized, "--prompt", PROMPT, "--max_tokens", 8, "--temperature", 0)
    said = script("test_inference_simple", *arguments, "--backend", "anemll")
    assert said.startswith(PROMPT) and len(said) > len(PROMPT) + 8
    result = call("test_inference_simple", *arguments, "--backend", "transformers")
    assert (result.exit_code, result.stdout) == (0, said)


def test_inference_reads_packages_and_refuses_the_rest(packages: Path, place: Path, tmp_path: Path) -> None:
    result = call("test_inference_simple", "--model", packages, "--prompt", PROMPT, "--max_tokens", 2)
    assert result.exit_code == 0 and result.stdout.startswith(PROMPT)
    result = call("test_inference_simple", "--model", place / "float")
    assert result.exit_code == INPUT and "is not quantized" in result.stderr
    result = call("test_inference_simple", "--model", tmp_path / "nothing")
    assert result.exit_code == INPUT and "does not exist" in result.stderr


def test_convert_model_writes_where_anemll_looks(packages: Path) -> None:
    names = {path.name for path in packages.glob("*.mlpackage")}
    chunks = {f"named_FFN_PF_lut4_chunk_{number:02d}of02.mlpackage" for number in (1, 2)}
    assert names == {"named_embeddings.mlpackage", "named_lm_head.mlpackage", *chunks}
    assert (packages / "meta.yaml").is_file() and (packages / "tokenizer.json").is_file()
    assert open_checkpoint(packages.with_name("packages-checkpoint")).is_quantized


def stubs(folder: Path, **bodies: str) -> str:
    """A PATH on which uname says Darwin and the commands of a Mac write to `folder`/log."""
    folder.mkdir()
    log = f'printf "%s\\n" "$(basename "$0") $*" >> {str(folder / "log")!r}\n'
    commands = {"uname": "echo Darwin", "sysctl": "echo 16", "sw_vers": "echo 15.1", "xcrun": "", **bodies}
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{log}{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


QUANTIZE, LOWER, VERIFY, GENERATE = "quantize", "lower", "verify", "generate"


@pytest.mark.parametrize(
    ("arguments", "commands"),
    [
        ((), [QUANTIZE, LOWER, VERIFY, GENERATE]),
        (("--restart", 2), [QUANTIZE, LOWER, VERIFY, GENERATE]),
        (("--restart", 4), [LOWER, VERIFY, GENERATE]),
        (("--restart", 6), [GENERATE]),
        (("--only", 3), [QUANTIZE, LOWER, VERIFY]),
        (("--only", 5), [LOWER, VERIFY]),
        (("--only", 6), []),
        (("--only", 7), []),
        (("--only", 8), [GENERATE]),
    ],
)
def test_steps_of_convert_model(
    packages: Path, place: Path, tmp_path: Path, arguments: tuple[object, ...], commands: list[str]
) -> None:
    path = stubs(tmp_path / "bin", anequant=":", uname="echo Linux")
    result = convert(place, packages, *arguments, PATH=path)
    assert result.exit_code == 0, result.stderr
    log = tmp_path / "bin" / "log"
    called = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("anequant")]
    assert called == commands
    assert log.read_text().count("--force") == (len({QUANTIZE, LOWER} & set(commands)) if arguments else 0)


@pytest.mark.parametrize("failing", [QUANTIZE, LOWER, VERIFY, GENERATE])
def test_convert_model_ends_at_the_step_that_fails(
    packages: Path, place: Path, tmp_path: Path, failing: str
) -> None:
    path = stubs(tmp_path / "bin", anequant=f'[ "$1" != {failing} ] || exit 6', uname="echo Linux")
    result = convert(place, packages, PATH=path)
    assert result.exit_code == VERIFICATION and "done:" not in result.stdout
    assert (tmp_path / "bin" / "log").read_text().splitlines()[-1].startswith(f"anequant {failing}")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--only", 9), USAGE, "--only is '9'"),
        (("--lut4", 4), USAGE, "unknown option '--lut4'"),
        (("--context",), USAGE, "--context needs a value"),
        (("--only", 8), INPUT, "holds no packages"),
        (("--lut2", "none"), USAGE, "--lut2 is 'none'"),
    ],
)
def test_convert_model_refuses_what_it_cannot_do(
    place: Path, tmp_path: Path, arguments: tuple[object, ...], code: int, message: str
) -> None:
    result = convert(place, tmp_path / "out put", *arguments)
    assert result.exit_code == code and message in result.stderr
    assert "done:" not in result.stdout and not (tmp_path / "out put").exists()


def test_convert_model_compiles_and_predicts_on_a_mac(packages: Path, place: Path, tmp_path: Path) -> None:
    path = stubs(tmp_path / "bin", anequant="")
    result = convert(place, packages, "--restart", 6, PATH=path)
    assert result.exit_code == 0 and "left for the Mac" not in result.stdout
    log = (tmp_path / "bin" / "log").read_text()
    assert log.count("xcrun coremlcompiler compile") == 4
    assert f"anequant generate {packages} --prompt Who are you? --max-tokens 16 --backend coreml" in log
    path = stubs(tmp_path / "failing", anequant="", xcrun='case "$1" in coremlcompiler) exit 7;; esac')
    result = convert(place, packages, "--only", 6, PATH=path)
    assert result.exit_code == 7 and "done:" not in result.stdout


@pytest.mark.parametrize(
    ("failing", "macos", "lacks"),
    [
        (None, "15.1", "Core AI comes with macOS 27, this is 15.1"),
        ("profile", "15.1", "Core AI comes with macOS 27, this is 15.1"),
        (None, "27.0", "coreai-core is not installed"),
        (None, "27.0", ""),
    ],
)
def test_the_report_from_a_mac_is_one_json_file(
    place: Path, tmp_path: Path, failing: str | None, macos: str, lacks: str
) -> None:
    work, report = tmp_path / "wo rk", tmp_path / "re port.json"
    body = f"""
if [ "$1" = "{failing}" ]; then echo '{{"error": "no luck"}}'; exit 6; fi
if [ "$1" = convert ]; then mkdir -p "{work}/packages/a b.mlpackage"; fi
if [ "$1" = lower ]; then mkdir -p "{work}-coreai/a b.aimodel"; fi
echo '{{"command": "'$1'"}}'
"""
    own = {"sysctl": "echo 'Apple \"M4\"'", "sw_vers": f"echo {macos}", "python": f"printf '{lacks}'"}
    path = stubs(tmp_path / "bin", anequant=body, **own)
    script = TOOLS / "verify_on_mac.sh"
    result = run(
        script, "--model", place / "float", "--work", work, "--report", report, "--tokens", 5, PATH=path
    )
    code = VERIFICATION if failing else 0
    assert result.exit_code == code, result.stderr
    written = report.read_text().replace('"memory_bytes": Apple "M4"', '"memory_bytes": 0')
    said = json.loads(written)
    assert (said["chip"], said["macos"], said["exit_code"]) == ("Apple M4", macos, code)
    coreai: list[tuple[str, Any]] = [("coreai", lacks)]
    if not lacks:
        coreai = [("coreai-lower", 0), ("coreai-verify", 0), ("coreai-compile", 0)]
    assert [(step["step"], step.get("exit_code", step.get("skipped"))) for step in said["steps"]] == [
        *(("convert", 0), ("compile", 0), ("profile", code), *coreai)
    ]
    assert said["steps"][0]["result"] == {"command": "convert"}
    log = (tmp_path / "bin" / "log").read_text()
    assert f"xcrun coremlcompiler compile {work}/packages/a b.mlpackage {work}/packages" in log
    assert f"anequant profile {work} --tokens 5 --json" in log
    compiled = f"xcrun coreai-build compile {work}-coreai/a b.aimodel --preferred-compute neural-engine"
    assert (compiled in log) is (not lacks)


def test_elsewhere_a_mac_is_asked_for(packages: Path) -> None:
    result = run(TOOLS / "verify_on_mac.sh")
    assert result.exit_code == UNSUPPORTED and "needs a Mac" in result.stderr
    if sys.platform != "darwin":
        refused = invoke("profile", packages)
        assert refused.exit_code == UNSUPPORTED and "macOS only" in refused.stderr


class MLCPUComputeDevice:
    """Named as coremltools names its own."""


class MLNeuralEngineComputeDevice:
    """Named as coremltools names its own."""


def test_placements_follow_the_plan() -> None:
    cpu, engine = MLCPUComputeDevice(), MLNeuralEngineComputeDevice()

    def operation(kind: str, output: str) -> SimpleNamespace:
        return SimpleNamespace(operator_name=kind, outputs=[SimpleNamespace(name=output)])

    block = [
        operation(*pair) for pair in (("const", "w"), ("ios18.conv", "y"), ("gather", "z"), ("add", "s"))
    ]
    usage = {
        "y": SimpleNamespace(preferred_compute_device=engine, supported_compute_devices=[cpu, engine]),
        "z": SimpleNamespace(preferred_compute_device=cpu, supported_compute_devices=[cpu]),
    }
    functions = {
        "prefill": SimpleNamespace(block=SimpleNamespace(operations=[operation("add", "t")])),
        "infer": SimpleNamespace(block=SimpleNamespace(operations=block)),
    }
    plan = SimpleNamespace(
        model_structure=SimpleNamespace(program=SimpleNamespace(functions=functions)),
        get_compute_device_usage_for_mlprogram_operation=lambda op: usage.get(op.outputs[0].name),
        get_estimated_cost_for_mlprogram_operation=lambda op: (
            SimpleNamespace(weight=0.5) if op.operator_name == "ios18.conv" else None
        ),
    )
    placements = list(list_placements(plan))
    assert placements == [
        Placement("infer", "ios18.conv", "y", "neural engine", ("cpu", "neural engine"), 0.5),
        Placement("infer", "gather", "z", "cpu", ("cpu",), None),
        Placement("infer", "add", "s", "unknown", (), None),
        Placement("prefill", "add", "t", "unknown", (), None),
    ]
    assert count_by_device(placements) == {"neural engine": 1, "cpu": 1, "unknown": 2}


def test_timing_and_agreement_by_the_interpreter(packages: Path) -> None:
    seconds, logits = time_decoding(lambda: PackageModel(packages), list(range(12)), 8)
    assert logits.shape == (5, 8192)
    assert min(seconds.token, seconds.load, seconds.prefill) > 0
    same = measure_agreement(logits, logits)
    assert (same.positions, same.top_token, same.relative_error) == (5, 1.0, 0.0)
    partial = logits.where(logits > logits.median(), float("-inf"))
    assert measure_agreement(partial, logits).relative_error == 0
    assert measure_agreement(-logits, logits).top_token == 0
