"""`anequant plan` and --max-memory: what is planned against what then happens."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure_memory
import pytest
import torch
from measure_memory import Shape, limited_run, write_random_model
from running import execute_python, invoke, succeed

from anequant.architectures.spec import EMBEDDING, HEAD
from anequant.calibration.sample import sample_windows
from anequant.checkpoints.reader import Checkpoint, open_checkpoint
from anequant.checkpoints.source import BUNDLED_MODEL, Source
from anequant.errors import ResourceError
from anequant.jobs.control import Run
from anequant.jobs.process import give_back_memory, resident_bytes
from anequant.jobs.resume import Job, open_job
from anequant.jobs.step import AnyStep
from anequant.lower_options import LowerOptions
from anequant.pipeline import plan as plan_module
from anequant.pipeline.convert import convert
from anequant.pipeline.lower import lower
from anequant.pipeline.plan import Plan, plan_lowering, plan_request
from anequant.pipeline.quantize import quantize
from anequant.pipeline.steps.collect_tokens import RESIDENT, STREAMED, fits_whole
from anequant.pipeline.steps.rounding import RoundPart
from anequant.recipe import Calibration, Recipe
from anequant.recipe_files import load_recipe
from anequant.request import LowerRequest, Request

GIGABYTE = 10**9
CALIBRATION = Calibration(("self",), samples=4, length=32)
LLAMA_8B = Shape("llama", 4096, 14336, 32, 8, 128256, 4)


def planned(folder: Path, recipe: Recipe, **options: Any) -> Plan:
    lowering = options.pop("options", LowerOptions(context=128))
    request = Request(Source(folder, folder.name), recipe, CALIBRATION, lowering=lowering)
    return plan_request(request, **{"base": 0, **options})


def told(step: AnyStep) -> tuple[Any, ...]:
    """What a plan says of a step."""
    return step.id, step.title, step.moves, step.holds, step.cost


@pytest.fixture
def without_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Checkpoint, name: str, rows: slice | None = None) -> None:
        raise AssertionError(f"'{name}' was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)


@pytest.mark.usefixtures("without_reading")
def test_a_plan_is_one_object_with_every_job_and_reads_no_weight() -> None:
    result = succeed("plan", str(BUNDLED_MODEL), "--recipe", "w4-ane", "--json")
    plan = json.loads(result.stdout)
    names = [job["name"] for job in plan["jobs"]]
    layers = open_checkpoint(BUNDLED_MODEL).spec.num_layers
    assert names[: layers + 5] == [
        *("sample", "token weights", "embedding"),
        *[f"layer {number + 1}" for number in range(layers)],
        *("head", "checkpoint files"),
    ]
    assert names[layers + 5 :] == [
        *("ranges", "embedding package", "chunk 1 of 1", "head package", "package files"),
        *("checkpoint", "packages", "lint", "quality", "conversion files"),
    ]
    for job in plan["jobs"]:
        assert job["peak"] >= plan["base_bytes"] > 0 and job["seconds"] > 0, job
    assert plan["peak_bytes"] == max(job["peak"] for job in plan["jobs"])
    assert plan["seconds"] == pytest.approx(sum(job["seconds"] for job in plan["jobs"]))


def test_planned_bytes_are_those_that_are_written(tmp_path: Path, eight_bits: Recipe) -> None:
    quantized, packages = tmp_path / "quantized", tmp_path / "packages"
    quantize(Request(Source(BUNDLED_MODEL, "tiny"), eight_bits), quantized)
    lower(LowerRequest(quantized, LowerOptions(context=128)), packages)
    plan = planned(BUNDLED_MODEL, eight_bits)
    written = quantized / "model.safetensors"
    header = 8 + int.from_bytes(written.read_bytes()[:8], "little")
    assert plan.disk.checkpoint == written.stat().st_size - header
    assert plan.disk.packages == pytest.approx(
        sum(file.stat().st_size for file in packages.glob("*.mlpackage/Data/**/*") if file.is_file()),
        rel=0.05,
    )
    read = sum(step.moves[0] for step in plan.steps if isinstance(step, RoundPart))
    source = BUNDLED_MODEL / "model.safetensors"
    table = math.prod(open_checkpoint(BUNDLED_MODEL).tensors[f"{EMBEDDING}.weight"].shape)
    assert read == pytest.approx(source.stat().st_size + 2 * table, rel=0.01)  # tied: the embedding twice
    lowering = plan_lowering(LowerRequest(quantized, LowerOptions(context=128)))
    assert [told(step) for step in plan.stage("lower")] == [told(step) for step in lowering.steps]


@pytest.mark.parametrize("recipe", ["w4-ane", "w4-nearest"])
def test_a_run_does_the_steps_of_the_plan_and_no_others(recipe: str, tmp_path: Path) -> None:
    """The plan's ids, in their order, are what is told before a run, and what it then does."""
    steps = load_recipe(recipe, {"descent": 0, "refinement": 0} if recipe == "w4-ane" else {})
    request = Request(Source(BUNDLED_MODEL, "tiny"), steps, CALIBRATION, lowering=LowerOptions(128, 64))
    ids = [step.id for step in plan_request(request).steps]
    assert len(set(ids)) == len(ids)
    expected: list[str] = []
    done: list[str] = []
    run = Run(
        planned=lambda units: expected.extend(unit.name for unit in units),
        finished=lambda unit: done.append(unit.name),
    )
    convert(request, tmp_path / "out", run)
    assert expected == done == ids


def test_a_step_that_is_not_due_is_refused(tmp_path: Path) -> None:
    request = Request(Source(BUNDLED_MODEL, "tiny"), load_recipe("w4-nearest"), CALIBRATION)
    steps = plan_request(request).steps
    job = Job(BUNDLED_MODEL, tmp_path / "out", request.fingerprint("quantize"), steps, 0)
    with pytest.raises(RuntimeError, match="'layer 1 of 4' is not step 1"), open_job(job, Run()) as journal:
        journal.do(steps[1], None)
    undone = f"0 of the plan's {len(steps)} steps are done"
    with pytest.raises(RuntimeError, match=undone), open_job(job, Run()) as journal:
        assert journal.units == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def eight_bits() -> Recipe:
    return load_recipe("w8-nearest", {"head_bits": 8, "embedding_bits": 8})


def test_everything_in_float_has_a_row_with_its_reason(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", "qwen3", True, vocab_size=1024)
    rows = {row.what: row for row in planned(folder, load_recipe("w4-nearest")).kept}
    assert rows[EMBEDDING].reason == "embedding_bits is 16"
    assert "tied" in rows[HEAD].reason
    assert "RoPE" in rows["self_attn.q_norm, self_attn.k_norm"].reason
    assert rows["KV cache"].form == "fp16 state"
    assert any(what.startswith("biases of self_attn.q_proj") for what in rows)
    more = {"activation_bits": 8, "activation_prefix": 4, "activation_overrides": "down_proj=16"}
    rows = {row.what: row for row in planned(folder, load_recipe("w4-nearest", more), options=None).kept}
    assert rows["the first 4 positions"].reason == "activation_prefix is 4"
    assert rows["input of down_proj"].form == "float"
    assert "activations" not in rows


@pytest.mark.parametrize(
    ("recipe", "better"), [("w4-nearest", "w4-ane"), ("w_int4_per_tensor", "w4-ane"), ("w8-nearest", None)]
)
def test_few_bits_without_calibration_are_advised_against(recipe: str, better: str | None) -> None:
    advice = planned(BUNDLED_MODEL, load_recipe(recipe)).advice
    assert [better is not None and better in line for line in advice] == [True] * (better is not None)
    shown = invoke("plan", str(BUNDLED_MODEL), "--recipe", recipe).stdout
    assert ("first look" in shown) == (better is not None)


def test_calibrated_recipes_need_no_advice() -> None:
    assert planned(BUNDLED_MODEL, load_recipe("w4-ane")).advice == ()


CONVERSIONS: dict[str, tuple[str, ...]] = {
    "a cache of 4 bits": ("--recipe", "w4a4kv4"),
    "a prefix of float": ("--recipe", "w8a8-ane", "--activation-prefix", "4"),
    "dynamic activations": ("--recipe", "w8a8-ane", "--activation-scales", "dynamic"),
    "weights of 16 bits": ("--recipe", "w4-nearest", "--bits", "16"),
    "a context that is no multiple": ("--context", "100", "--batch", "64"),
    "a batch of one": ("--batch", "1"),
    "no context": ("--context", "0"),
    "more chunks than layers": ("--chunks", "5"),
    "chunks too small": ("--max-chunk-mb", "1"),
    "a name that is none": ("--prefix", "../x"),
    "rotations without a file": ("--r1", "file"),
    "a file of rotations that nobody asked for": ("--rotations", "r.safetensors"),
    "a file of rotations that is not there": ("--r1", "file", "--rotations", "r.safetensors"),
    "restarts of nothing": ("--r1", "none", "--r2", "none", "--restarts", "2"),
    "a width without a Hadamard matrix": ("--r1-block", "128"),
    "too little memory": ("--max-memory", "0.1GB"),
    "a calibration that is not there": ("--calib", "gone.txt"),
}


@pytest.mark.parametrize("case", CONVERSIONS)
def test_a_conversion_that_is_refused_is_not_planned(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same words; tests/damage.py does the same for every input that is refused there."""
    monkeypatch.chdir(tmp_path)
    words = (str(BUNDLED_MODEL), *CONVERSIONS[case])
    converted, plan = invoke("convert", "-o", "out", *words), invoke("plan", *words)
    assert converted.exit_code in (2, 3, 4, 5), converted.stderr
    assert (plan.exit_code, plan.stderr) == (converted.exit_code, converted.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_people_has_a_line_for_each_job() -> None:
    result = invoke("plan", str(BUNDLED_MODEL), "--recipe", "w4-nearest")
    lines = result.stdout.splitlines()
    assert lines[0].split("\t") == ["step", "job", "in", "out", "peak memory", "time, about"]
    assert sum(line.startswith("quantize\tlayer") for line in lines) == 4
    assert any(line.startswith("peak memory") for line in lines)
    assert "estimate" in result.stdout


def test_the_least_memory_that_is_named_is_the_least(tmp_path: Path) -> None:
    folder = _headers(tmp_path / "model", LLAMA_8B)
    recipe = load_recipe("w4-nearest")
    with pytest.raises(ResourceError, match=r"needs .* GB, and --max-memory allows 1\.00 GB") as error:
        planned(folder, recipe, options=None, max_memory=GIGABYTE, base=GIGABYTE // 2)
    found = re.search(r"--max-memory ([\d.]+)GB", error.value.remedy)
    assert found is not None
    least = int(float(found[1]) * GIGABYTE)
    plan = planned(folder, recipe, options=None, max_memory=least, base=GIGABYTE // 2)
    assert plan.peak(plan.largest) <= least
    with pytest.raises(ResourceError):
        planned(folder, recipe, options=None, max_memory=least - GIGABYTE // 50, base=GIGABYTE // 2)


def test_the_peak_of_a_llama_3_8b_stays_below_4_gb_and_does_not_grow_with_layers(tmp_path: Path) -> None:
    plans = [
        planned(
            _headers(tmp_path / f"{layers}", dataclasses.replace(LLAMA_8B, layers=layers)),
            load_recipe("w4-nearest"),
            options=None,
            base=600_000_000,
        )
        for layers in (4, 12, 32)
    ]
    peaks = [plan.peak(plan.largest) for plan in plans]
    assert len(set(peaks)) == 1
    assert peaks[0] < 4 * GIGABYTE


def test_less_memory_samples_without_the_model_in_memory(tmp_path: Path) -> None:
    folder = _headers(tmp_path / "model", dataclasses.replace(LLAMA_8B, layers=32))
    recipe = load_recipe("w4-nearest", {"target_bits": 5.0})
    plan = planned(folder, recipe, options=None)
    assert plan.steps[0].title == RESIDENT and plan.peak(plan.steps[0]) > 15 * GIGABYTE
    plan = planned(folder, recipe, options=None, max_memory=15 * GIGABYTE)
    assert plan.steps[0].title == STREAMED and plan.peak(plan.steps[0]) < 4 * GIGABYTE
    checkpoint = open_checkpoint(folder)
    assert not fits_whole(checkpoint, CALIBRATION, 15 * GIGABYTE, 0)
    assert fits_whole(checkpoint, CALIBRATION, None, 0)


def test_max_memory_changes_no_byte_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe = Source(BUNDLED_MODEL, "tiny"), load_recipe("w4-ane", {"descent": 0, "refinement": 0})
    quantize(Request(source, recipe, CALIBRATION), tmp_path / "free")
    asked: list[bool] = []

    def streamed(*arguments: Any, **options: Any) -> bool:
        asked.append(fits_whole(*arguments, **options))
        return False

    monkeypatch.setattr(plan_module, "fits_whole", streamed)
    control = Run(max_memory=64 * GIGABYTE)
    quantize(Request(source, recipe, CALIBRATION), tmp_path / "bounded", control)
    assert asked == [True]
    files = sorted(path.name for path in (tmp_path / "free").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "bounded").iterdir())
    for name in files:
        assert (tmp_path / "free" / name).read_bytes() == (tmp_path / "bounded" / name).read_bytes(), name


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_model_that_is_read_again_for_every_token_writes_the_same(
    make_model: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "model", model_type, model_type != "llama"))
    one, other = (
        sample_windows(checkpoint, [[1], [2, 3]], Calibration(("self",), 3, 8, seed=5), resident=resident)
        for resident in (True, False)
    )
    assert one.tolist() == other.tolist()


@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_too_little_memory_is_refused_before_anything_is_done(tmp_path: Path, command: str) -> None:
    output = tmp_path / "output"
    result = invoke(command, str(BUNDLED_MODEL), "-o", str(output), "--max-memory", "0.1GB")
    assert result.exit_code == ResourceError.exit_code
    assert "the least that works is --max-memory" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "good"), [("4GB", True), ("512MiB", True), ("7e9", False), ("four", False)])
def test_sizes(size: str, good: bool, tmp_path: Path) -> None:
    result = invoke("plan", str(tmp_path / "gone"), "--max-memory", size)
    assert result.exit_code == (3 if good else 2)
    assert ("is no size" in result.stderr) != good


def planned_over_measured(model: Path, work: Path) -> float:
    """Of resident peaks, by a process of its own: a child's starts with that of what it was forked from."""
    script = (
        "import measure_memory as m, pathlib, sys\n"
        "model, work = map(pathlib.Path, sys.argv[1:])\n"
        "print(m.compare(model.name, model, work, 'quantize', '--recipe', m.NEAREST)['ratio'])"
    )
    done = execute_python(script, model, work, folder=Path(measure_memory.__file__).parent)
    assert done.exit_code == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_the_planned_peak_is_within_a_quarter_of_the_measured_one(tmp_path: Path) -> None:
    assert 0.75 < planned_over_measured(BUNDLED_MODEL, tmp_path) < 1.25


def test_a_model_is_quantized_within_its_planned_peak(tmp_path: Path) -> None:
    """Resident, as planned, to 10%: RLIMIT_DATA also counts what stacks and allocators only reserve."""
    shape = Shape("llama", 1024, 4096, 16, 4, 16384, 3)
    write_random_model(tmp_path / "model", shape)
    assert planned_over_measured(tmp_path / "model", tmp_path) > 1 / 1.1
    plan = measure_memory.planned(tmp_path / "model", "--recipe", measure_memory.NEAREST)
    peak = plan["peak_bytes_by_step"]["quantize"]
    _, refused = limited_run(tmp_path / "model", tmp_path / "output", data_limit=peak // 2)
    assert refused.code not in (0, 2, 3, 4, 6)


def _headers(folder: Path, shape: Shape) -> Path:
    """A model of that shape whose weights are holes."""
    write_random_model(folder, shape, holes=True)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps freed memory in pieces")
def test_freed_pieces_go_back_to_the_system() -> None:
    pieces = [torch.ones(25_000) for _ in range(3000)]
    kept = pieces[::20]
    before = resident_bytes()
    del pieces
    give_back_memory()
    assert resident_bytes() < before - 200 * 10**6 and len(kept) == 150
