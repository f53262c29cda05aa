"""report.json: what it measures, against transformers and float64; where it takes the rest from."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FEW_TOKENS, REPOSITORY, Quantized
from hypothesis import given
from hypothesis import strategies as st
from running import succeed
from scipy import stats
from torch import Tensor

from anequant.checkpoints.reader import open_checkpoint
from anequant.checkpoints.source import BUNDLED_MODEL, Source
from anequant.errors import InputError, UsageError
from anequant.inspection.measure_projections import (
    ModelMeasurement,
    Outliers,
    measure_projections,
    measure_token_outliers,
)
from anequant.jobs.control import Unit
from anequant.pipeline.quantize import quantize
from anequant.pipeline.rotate import rotate
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.weight_format import WeightFormat
from anequant.recipe import Calibration
from anequant.recipe_files import load_recipe
from anequant.report.page import charts
from anequant.report.page.conversion_report import Stopwatch
from anequant.report.page.write_report import write_report
from anequant.request import Request
from anequant.rotation.rotation_plan import plan_rotations
from anequant.verification.verify import verify_folder

SAMPLED = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(3))
RUN = {"seconds": 1.0, "steps": [], "peak_memory_bytes": None}
DOCUMENT = REPOSITORY / "docs" / "report.md"


@pytest.fixture(scope="module")
def source(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", tied=True)


@pytest.fixture(scope="module")
def quantized(source: Path, quantize_model: Callable[..., Quantized]) -> Quantized:
    return quantize_model(source, "w4-nearest", r1="hadamard", r4="block-hadamard")


@pytest.fixture(scope="module")
def measured(quantized: Quantized) -> ModelMeasurement:
    checkpoint, original = open_checkpoint(quantized.folder), open_checkpoint(quantized.source)
    return measure_projections(checkpoint, original, quantized.recipe, SAMPLED)


@pytest.fixture(scope="module")
def float_run(source: Path) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]]:
    """transformers' own float64 run: the input of every projection, the residual stream, and the weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(
                lambda _, arguments, name=name: inputs.update({name: arguments[0].flatten(0, 1)})
            )
    streams: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: streams.append(arguments[0].flatten(0, 1)))
    model.model.norm.register_forward_pre_hook(
        lambda _, arguments: streams.append(arguments[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(SAMPLED)
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    return inputs, streams, weights


def of_tokens(x: Tensor) -> tuple[float, float]:
    """Median over rows of scipy's kurtosis, and of max / rms."""
    peaks = x.abs().amax(1) / x.square().mean(1).sqrt()
    kurtosis = torch.tensor(stats.kurtosis(x.numpy(), axis=1, fisher=False))
    return float(kurtosis.median()), float(peaks.median())


def of_weight(w: Tensor) -> tuple[float, float]:
    return stats.kurtosis(w.numpy(), axis=None, fisher=False), float(w.abs().max() / w.square().mean().sqrt())


def relative(off: Tensor, size: Tensor) -> float:
    return float(off.norm() / size.norm())


def test_every_projection_against_transformers(
    quantized: Quantized,
    measured: ModelMeasurement,
    float_run: tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]],
) -> None:
    inputs, _, weights = float_run
    checkpoint = open_checkpoint(quantized.folder)
    spec = checkpoint.spec
    plan = plan_rotations(spec, quantized.recipe)
    assert plan.r1 is not None and plan.r4 is not None
    r1, r4 = plan.r1.dense(), plan.r4.dense()
    assert len(measured.layers) == spec.num_layers
    for layer, linear in itertools.product(range(spec.num_layers), spec.architecture.linears):
        prefix = f"model.layers.{layer}."
        name = prefix + linear.name
        gain = weights[f"{prefix}{linear.norm}.weight"] if linear.norm else torch.ones(1)
        r2 = plan.r2[layer].dense()
        right = torch.block_diag(*[r2] * spec.num_heads) if linear.name.endswith("o_proj") else r1
        right = r4 if linear.name.endswith("down_proj") else right
        left = (
            r1 if linear.name.endswith(("o_proj", "down_proj")) else torch.eye(len(weights[f"{name}.weight"]))
        )
        if linear.name.endswith("v_proj"):
            left = torch.block_diag(*[r2] * spec.num_key_value_heads)
        x, w = inputs[name] / gain, weights[f"{name}.weight"] * gain
        turned_x, turned_w = x @ right.double(), left.double().T @ w @ right.double()
        found = next(item for item in measured.layers[layer].projections if item.stored.name == linear.name)
        assert found.before is not None
        for side, seen, weight in ((found.before, x, w), (found.after, turned_x, turned_w)):
            nearest = quantize_linear(weight.float(), None, WeightFormat(4, "lut", "balanced"), name)
            off = nearest.dequantize() - weight
            assert side.weight_error == pytest.approx(relative(off, weight), rel=1e-2)
            assert side.output_error == pytest.approx(relative(seen @ off.T, seen @ weight.T), rel=1e-2)
            assert (side.inputs.kurtosis, side.inputs.peak) == pytest.approx(of_tokens(seen), rel=1e-4)
            assert (side.weight.kurtosis, side.weight.peak) == pytest.approx(of_weight(weight), rel=1e-4)
        stored = checkpoint.read(f"{name}.weight").double()
        assert found.weight_error == pytest.approx(relative(stored - turned_w, turned_w), rel=1e-3)
        off, whole = turned_x @ (stored - turned_w).T, turned_x @ turned_w.T
        assert found.output_error == pytest.approx(relative(off, whole), rel=1e-3)
        codes = quantized.chosen[name].codes.flatten()
        assert found.stored.codes == tuple(int((codes == code).sum()) for code in range(16))


def test_residual_stream_against_transformers(
    quantized: Quantized,
    measured: ModelMeasurement,
    float_run: tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]],
) -> None:
    _, streams, _ = float_run
    plan = plan_rotations(open_checkpoint(quantized.folder).spec, quantized.recipe)
    assert plan.r1 is not None
    before = [measured.embedded_before, *(layer.residual_before for layer in measured.layers)]
    after = [measured.embedded_after, *(layer.residual_after for layer in measured.layers)]
    assert before == pytest.approx([float(stream.abs().max()) for stream in streams], rel=1e-4)
    assert after == pytest.approx([float((s @ plan.r1.dense()).abs().max()) for s in streams], rel=1e-4)


def test_tokens_of_equal_channels_do_not_count() -> None:
    assert measure_token_outliers(torch.ones(3, 8)) == Outliers(None, None)
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, -1.0]])
    assert measure_token_outliers(x) == Outliers(1.0, 1.0)


@pytest.fixture
def copy(quantized: Quantized, tmp_path: Path) -> Path:
    return shutil.copytree(quantized.folder, tmp_path / "copy")


def keys_of(value: Any) -> set[str]:
    """Every key in it, but those that are names of steps, keys of recipes and the like."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    named = {"recipe", "calibration", "versions", "missing", "verified"}
    deeper = [keys_of(item) for key, item in value.items() if key not in named]
    return set(value).union(*deeper)


def test_the_command_writes_both_files_and_verify_accepts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anequant.pipeline.converting.SAMPLE_WINDOWS", 1)
    monkeypatch.setattr("anequant.pipeline.converting.SAMPLE_LENGTH", 64)
    copy = tmp_path / "out"
    quantize(Request(Source(BUNDLED_MODEL, "tiny-qwen2"), load_recipe("w4-nearest"), Calibration()), copy)
    result = succeed("report", copy, "--json")
    values = json.loads(result.stdout)
    data = json.loads((copy / "report.json").read_text())
    assert values == {
        "report": str(copy / "report.html"),
        "data": str(copy / "report.json"),
        "worst": data["worst"],
        "missing": data["missing"],
    }
    assert data["missing"].keys() == {"packages", "asset", "lint", "run"}
    assert data["quality"]["kl"] > 0 and data["quality"]["base_perplexity"] > 1
    errors = [
        (item["output_error"]["written"], layer["layer"], item["name"])
        for layer in data["layers"]
        for item in layer["projections"]
    ]
    worst = [(item["output_error"], item["layer"], item["name"]) for item in data["worst"]]
    assert len(errors) == 28 and worst == sorted(errors, reverse=True)[:10]
    assert data["measured_on"] == {"text": "the bundled sample text", "windows": 2, "length": 128}
    assert verify_folder(copy).checkpoint is not None
    assert str(copy) not in (copy / "report.html").read_text() + (copy / "report.json").read_text()
    documented = set(re.findall(r"`(\w+)`", DOCUMENT.read_text(encoding="utf-8")))
    assert keys_of(data) <= documented


def test_without_the_float_model_it_says_what_is_missing(quantized: Quantized, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized.folder, tmp_path / "out")
    alone = write_report(folder).data
    assert "name it with --base" in alone["missing"]["measured"]
    assert "without a tokenizer" in alone["missing"]["quality"]
    recorded = {tensor.name: tensor for tensor in quantized.result.rounding.tensors}
    for layer in alone["layers"]:
        assert layer["residual"] is None
        for item in layer["projections"]:
            tensor = recorded[f"model.layers.{layer['layer']}.{item['name']}"]
            assert item["weight_error"]["written"] == pytest.approx(tensor.relative_error, rel=1e-5)
            assert item["output_error"]["written"] is None and sum(item["codes"]) == tensor.weights
    page = (folder / "report.html").read_text()
    assert page.count("Not here:") >= 4 and "name it with --base" in page

    full = write_report(folder, base=str(quantized.source), run=RUN).data
    assert full["missing"].keys() == {"quality", "packages", "asset", "lint"}
    assert full["measured_on"]["text"] == "random tokens" and len(full["worst"]) == 10
    later = write_report(folder).data
    assert later == full, "a report of the same checkpoint lends what is gone"


def test_a_report_of_another_checkpoint_lends_nothing(copy: Path) -> None:
    write_report(copy, run=RUN)
    assert write_report(copy).data["run"]["seconds"] == 1
    manifest = json.loads((copy / "anequant.json").read_text())
    manifest["measured"]["equivalence"] = 2e-7
    (copy / "anequant.json").write_text(json.dumps(manifest))
    assert write_report(copy).data["run"] is None


def test_a_model_that_came_rotated_has_no_before(source: Path, tmp_path: Path) -> None:
    between, folder = tmp_path / "rotated", tmp_path / "out"
    recipe = load_recipe("w4-nearest", {"r1": "hadamard"})
    rotate(Request(Source(source, source.name), recipe, FEW_TOKENS), between)
    quantize(Request(Source(between, between.name), recipe, FEW_TOKENS), folder)
    data = write_report(folder, base=str(between)).data
    assert "came rotated" in data["missing"]["before"]
    items = [item for layer in data["layers"] for item in layer["projections"]]
    assert all(item["weight"]["before"] is None and item["weight"]["after"]["kurtosis"] > 1 for item in items)
    assert "before rotation" not in (folder / "report.html").read_text()


def test_wrong_folders_and_models_are_refused(
    quantized: Quantized, copy: Path, source: Path, tmp_path: Path
) -> None:
    between = tmp_path / "rotated"
    rotate(Request(Source(source, source.name), load_recipe("w4-nearest"), FEW_TOKENS), between)
    with pytest.raises(UsageError, match="no output of convert or quantize"):
        write_report(between)
    with pytest.raises(InputError, match="is not the model that this checkpoint was made from"):
        write_report(copy, base=str(BUNDLED_MODEL))
    with pytest.raises(InputError, match=r"anequant\.json"):
        write_report(quantized.source)
    with pytest.raises(UsageError, match="--text needs a tokenizer"):
        write_report(copy, base=str(source), text=copy / "config.json")
    assert not list(copy.glob("*report*"))


def test_a_damaged_report_is_named(copy: Path) -> None:
    write_report(copy)
    data = json.loads((copy / "report.json").read_text())
    before = (copy / "report.html").read_bytes()
    (copy / "report.json").write_text(
        json.dumps({"schema": data["schema"], "checkpoint": data["checkpoint"]})
    )
    with pytest.raises(InputError, match="is damaged"):
        write_report(copy)
    assert (copy / "report.html").read_bytes() == before


def test_sixteen_bits_are_reported_as_kept(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    quantize(
        Request(Source(source, source.name), load_recipe("w4-nearest", {"bits": 16}), FEW_TOKENS), folder
    )
    data = write_report(folder, base=str(source)).data
    item = data["layers"][0]["projections"][0]
    assert (item["bits"], item["codes"], data["worst"]) == (16, [], [])
    assert item["weight_error"]["written"] < 1e-3 and item["weight_error"]["after"] is None
    assert "all projections stay float16" in (folder / "report.html").read_text()


def test_a_stopwatch_adds_up_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("anequant.report.page.conversion_report.time.monotonic", lambda: now)
    watch = Stopwatch()
    for name, stage, seconds in (("a", "quantize", 1.0), ("b", "quantize", 2.0), ("c", "lower", 4.0)):
        watch.add(Unit(name, stage, (), seconds, 0, 0.5, replayed=False))
        now += seconds
    watch.add(Unit("d", "quantize", (), 8.0, 0, 1.0, replayed=False))
    now += 8.0
    result = watch.result()
    assert result["steps"] == [{"step": "quantize", "seconds": 11.0}, {"step": "lower", "seconds": 4.0}]
    assert result["seconds"] == 15 and result["peak_memory_bytes"] > 20e6


@given(st.floats(0, 1))
def test_numbers_on_the_heat_map_can_be_read(share: float) -> None:
    fill = charts.viridis(share)
    assert charts.contrast(charts.readable_ink(fill), fill) >= 4.5


def test_viridis_gets_lighter() -> None:
    against_black = [charts.contrast(charts.viridis(step / 50), "#000000") for step in range(51)]
    assert against_black == sorted(against_black)
    assert charts.contrast("#000000", "#ffffff") == pytest.approx(21)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60), st.booleans())
def test_lines_stay_inside_and_in_order(values: list[float], percent: bool) -> None:
    chart = charts.draw_line_chart({"after": values, "before": [None] * len(values)}, percent=percent)
    assert chart is not None
    line, empty = chart.lines
    assert empty.points == () and empty.path == "" and len(line.points) == len(values)
    for x, y in line.points:
        assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT
        assert charts.TOP - 0.1 <= y <= charts.HEIGHT - charts.BOTTOM + 0.1
    heights = [y for _, y in line.points]
    for (one, high), (other, low) in itertools.pairwise(sorted(zip(values, heights, strict=True))):
        assert one > other or high >= low - 0.1
    assert 2 <= len(chart.y_ticks) <= 14 and len({tick.label for tick in chart.y_ticks}) == len(chart.y_ticks)


def test_a_gap_interrupts_a_line() -> None:
    chart = charts.draw_line_chart({"after": [1.0, None, 2.0, 3.0]})
    assert chart is not None and chart.lines[0].path.count("M") == 2


def test_bits_that_a_code_carries() -> None:
    assert charts.entropy([5] * 16) == pytest.approx(4)
    assert charts.entropy([8, 0, 0, 0]) == 0
    assert charts.entropy([1, 3]) == pytest.approx(-(math.log2(0.25) + 3 * math.log2(0.75)) / 4)
    assert charts.draw_code_bars([0, 2, 1]).count("M") == 3
