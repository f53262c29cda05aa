"""Tasks on a cluster of two worker processes: the same bytes as here, also when a worker is killed."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cluster_tasks
import pytest
import torch
from distributed import LocalCluster
from files import contents
from running import invoke, succeed
from safetensors.torch import save_file

from anequant.checkpoints.source import BUNDLED_MODEL, resolve_source
from anequant.errors import InputError, Interrupted, ResourceError, UsageError
from anequant.jobs import dask_scheduler as scheduler_dask
from anequant.jobs.control import Run, Unit
from anequant.jobs.scheduler import open_scheduler
from anequant.jobs.task_files import VALUE, passing_folder, read_value, write_value
from anequant.jobs.tasks import TasksLost, local
from anequant.lower_options import LowerOptions
from anequant.pipeline.lower import lower
from anequant.pipeline.quantize import quantize
from anequant.quantization.linear import QuantizedLinear
from anequant.recipe import Calibration
from anequant.recipe_files import load_recipe
from anequant.request import LowerRequest, Request
from anequant.targets.coreml import build as lower_package
from anequant.targets.coreml.program.package import save_package

SIZES = LowerOptions(context=32, batch=16, chunks=2)
FEW_TOKENS = Calibration(("self",), samples=3, length=16)
QUICK = {"codebook": "uniform", "descent": 1, "refinement": 1}
USAGE, RESOURCE = 2, 5
DISTRIBUTED_WAITS = 30.0
"""Seconds, for a scheduler that does not answer, unless it is told otherwise."""


def linear(seed: int = 0) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (6, 4), generator=generator, dtype=torch.uint8)
    scales = torch.rand(10, generator=generator)
    return QuantizedLinear(codes.t(), torch.arange(16.0), scales[:6].clone(), scales[6:].clone())


# Files


def test_a_value_comes_back_as_it_was(tmp_path: Path) -> None:
    one = linear()
    value: dict[str | int, Any] = {
        "dataclasses": (one, load_recipe("w4-ane"), [SIZES, None]),
        3: (True, 1.5, float("inf"), -0.0, "text", range(2, 9, 3), tmp_path),
        "tensors": (torch.arange(24).view(2, 3, 4).permute(2, 0, 1), torch.tensor(7), torch.empty(0, 3)),
        "one memory": (one.codebook, one.codebook.view(4, 4)),
    }
    write_value(tmp_path / "value", value)
    back = read_value(tmp_path / "value")
    assert torch.equal(back["dataclasses"][0].dequantize(), one.dequantize())
    assert back["dataclasses"][0].codes.stride() == one.codes.stride() == (1, 4)
    assert back["dataclasses"][1:] == value["dataclasses"][1:]
    assert back[3] == value[3] and str(back[3][3]) == "-0.0"
    for ours, theirs in zip(back["tensors"], value["tensors"], strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride() and ours.data_ptr() % 64 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["value"]


@dataclass(frozen=True)
class Foreign:
    number: int = 0


@pytest.mark.parametrize("value", [Foreign(), {1, 2}, torch.zeros(4, 6)[:, 1:3], print], ids=repr)
def test_what_a_task_cannot_hold(value: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a task cannot hold"):
        write_value(tmp_path / "value", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["os:system", "test_scheduler:Foreign", "anequant.jobs.tasks:Local", "anequant:x"]
)
def test_a_file_makes_only_dataclasses_of_anequant(name: str, tmp_path: Path) -> None:
    tree = f'{{"type": "{name}", "fields": {{}}}}'
    save_file({}, tmp_path / "value", metadata={VALUE: tree})
    with pytest.raises(TypeError, match="is no dataclass of anequant"):
        read_value(tmp_path / "value")


def test_a_passing_folder_is_gone_for_those_who_still_write(tmp_path: Path) -> None:
    with passing_folder(tmp_path) as folder:
        (folder / "deep").mkdir()
    with pytest.raises(FileNotFoundError):
        (folder / "late").touch()
    assert list(tmp_path.iterdir()) == []


# Here


def test_here_a_task_is_done_when_its_result_is_asked_for(tmp_path: Path) -> None:
    asked: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(3):
            asked.append(number)
            yield number

    results = local(tmp_path).map(abs, tasks())
    assert asked == [] and next(results) == 0 and asked == [0]
    assert list(results) == [1, 2]


# On a cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        memory_limit=0,
        dashboard_address=None,
        local_directory=str(tmp_path_factory.mktemp("dask")),
    ) as started:
        yield started


@pytest.fixture
def address(cluster: LocalCluster) -> str:
    """With both workers there."""
    cluster.scale(2)
    cluster.wait_for_workers(2, timeout=60)
    return str(cluster.scheduler_address).replace("tcp://", "dask://")


def processes(cluster: LocalCluster) -> list[int]:
    return [worker.pid for worker in cluster.workers.values()]


def test_results_come_in_order_from_both_workers(cluster: LocalCluster, address: str, tmp_path: Path) -> None:
    with open_scheduler(address) as schedulers:
        results = list(schedulers(tmp_path).map(cluster_tasks.whoami, range(7)))
    assert [number for number, _, _ in results] == list(range(7))
    assert {process for _, process, _ in results} == set(processes(cluster))
    assert {threads for _, _, threads in results} == {torch.get_num_threads()}
    assert list(tmp_path.iterdir()) == []


def test_dataclasses_of_tensors_travel(address: str, tmp_path: Path) -> None:
    tasks = [linear(seed) for seed in range(3)]
    with open_scheduler(address) as schedulers:
        results = list(schedulers(tmp_path).map(cluster_tasks.doubled, tasks))
    for there, here in zip(results, map(cluster_tasks.doubled, tasks), strict=True):
        assert torch.equal(there.dequantize(), here.dequantize())


def test_an_error_is_that_of_the_task(address: str, tmp_path: Path) -> None:
    with open_scheduler(address) as schedulers:
        results = schedulers(tmp_path).map(cluster_tasks.refuse, range(5))
        assert (next(results), next(results)) == (0, 1)
        with pytest.raises(InputError) as raised:
            next(results)
    error = raised.value
    assert (error.what, error.where, error.remedy) == ("'x' is no model", "x", "name another")
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_has_begun_is_not_done_once_it_is_closed(address: str, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    tasks = ((tmp_path / "marks", number) for number in range(50))
    with open_scheduler(address) as schedulers:
        with closing(schedulers(tmp_path).map(cluster_tasks.leave_mark, tasks)) as results:
            assert next(results) == 0
        time.sleep(3 * cluster_tasks.WAIT)
        marks = len(list((tmp_path / "marks").iterdir()))
    assert marks < 25
    assert next(tasks)[1] <= marks + 2 * scheduler_dask.AHEAD


def test_a_worker_that_does_not_see_a_folder_is_named(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_scheduler(address) as schedulers:
        with pytest.raises(ResourceError, match=r"worker tcp://\S+ does not see '.*missing'"):
            list(schedulers(tmp_path).map(cluster_tasks.exists, [tmp_path / "missing"]))
        monkeypatch.setattr(scheduler_dask, "passing_folder", elsewhere)
        with pytest.raises(ResourceError, match=r"worker tcp://\S+ does not see '.*elsewhere'"):
            schedulers(tmp_path)


@contextmanager
def elsewhere(home: Path) -> Iterator[Path]:
    """A folder that is on another machine."""
    yield home / "elsewhere"


def test_a_worker_that_differs_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    words = r"worker tcp://\S+ has instructions .*, and this process has ABACUS"
    with pytest.raises(UsageError, match=words), open_scheduler(address):
        pytest.fail("it was let in")


def test_workers_of_several_threads_and_none_at_all() -> None:
    for number, kind, words in (
        (0, ResourceError, "has no workers"),
        (1, UsageError, "does 2 tasks at once"),
    ):
        with LocalCluster(
            n_workers=number,
            threads_per_worker=2,
            processes=False,
            protocol="tcp://",
            dashboard_address=":0",
        ) as small:
            name = f"dask://{small.scheduler.address.removeprefix('tcp://')}"
            with pytest.raises(kind, match=words), open_scheduler(name):
                pytest.fail("it was let in")


# Jobs


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and packages, made in this process."""
    home = tmp_path_factory.mktemp("here")
    quantize(Request(resolve_source(None), load_recipe("w4-nearest")), home / "checkpoint")
    lower(LowerRequest(home / "checkpoint", SIZES), home / "packages")
    return home


def test_a_conversion_has_the_same_bytes(here: Path, address: str, tmp_path: Path) -> None:
    words = ("-o", tmp_path / "checkpoint", "--recipe", "w4-nearest", "--scheduler", address)
    result = succeed("quantize", BUNDLED_MODEL, *words)
    assert len(re.findall(r"\d+ tasks done by worker tcp://", result.stderr)) == 2
    sizes = ("--context", 32, "--batch", 16, "--chunks", 2)
    result = succeed(
        "lower", tmp_path / "checkpoint", "-o", tmp_path / "packages", *sizes, "--scheduler", address
    )
    assert contents(tmp_path) == contents(here)


def test_a_job_begun_on_a_cluster_goes_on_here(
    here: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = False

    def stop(unit: Unit) -> None:
        nonlocal stopped
        stopped = unit.name == "chunk 1 of 2"

    with open_scheduler(address) as schedulers:
        control = Run(stopping=lambda: stopped, finished=stop, scheduler=schedulers)
        with pytest.raises(Interrupted, match="the last is 'chunk 1 of 2'"):
            lower(LowerRequest(here / "checkpoint", SIZES), tmp_path / "packages", control)
    built: list[str] = []

    def listed(program: Any, path: Path, metadata: Any) -> None:
        built.append(path.stem)
        save_package(program, path, metadata)

    monkeypatch.setattr(lower_package, "save_package", listed)
    lower(LowerRequest(here / "checkpoint", SIZES), tmp_path / "packages")
    assert built == ["qwen25_FFN_PF_lut4_chunk_02of02", "qwen25_lm_head"]
    assert contents(tmp_path / "packages") == contents(here / "packages")


def test_a_comparison_goes_to_the_cluster(address: str, tmp_path: Path) -> None:
    few = ("--windows", 1, "--length", 16, "--json", "--quiet")
    result = invoke("compare", BUNDLED_MODEL, "--recipes", "w4-nearest", *few, "--scheduler", address)
    assert result.exit_code == USAGE and "--output" in result.stderr
    for name in ("local", address):
        output = tmp_path / name[:4]
        words = ("--recipes", "w4-nearest", "-o", output, *few, "--scheduler", name)
        succeed("compare", BUNDLED_MODEL, *words)
    assert contents(tmp_path / "loca") == contents(tmp_path / "dask")


# Workers that are lost, last: those that follow import everything anew


def test_packages_are_built_once_each_also_when_a_worker_is_killed(
    cluster: LocalCluster, here: Path, address: str, tmp_path: Path
) -> None:
    def kill(unit: Unit) -> None:
        if unit.name == "embedding package":
            os.kill(processes(cluster)[1], signal.SIGKILL)

    with open_scheduler(address) as schedulers:
        control = Run(scheduler=schedulers, finished=kill)
        lower(LowerRequest(here / "checkpoint", SIZES), tmp_path / "packages", control)
    assert contents(tmp_path / "packages") == contents(here / "packages")
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def test_calibrated_rounding_has_the_same_bytes(cluster: LocalCluster, address: str, tmp_path: Path) -> None:
    """A worker is killed half-way."""
    recipe, source = load_recipe("w4-ane", QUICK), resolve_source(None)
    quantize(Request(source, recipe, FEW_TOKENS), tmp_path / "here")

    def kill(unit: Unit) -> None:
        if unit.name.startswith("layer 2"):
            os.kill(processes(cluster)[0], signal.SIGKILL)

    with open_scheduler(address) as schedulers:
        control = Run(scheduler=schedulers, finished=kill)
        quantize(Request(source, recipe, FEW_TOKENS), tmp_path / "there", control)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_killed_worker_costs_its_tasks_alone(address: str, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    tasks = [(tmp_path / "marks", number) for number in range(8)]
    with open_scheduler(address) as schedulers:
        assert list(schedulers(tmp_path).map(cluster_tasks.die_once, tasks)) == list(range(8))
    assert [path.name for path in (tmp_path / "marks").iterdir()] == ["killed"]


def test_without_workers_a_job_ends_and_keeps_what_is_done(
    cluster: LocalCluster, here: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_dask, "WORKER_SECONDS", 2.0)

    def lose(unit: Unit) -> None:
        if unit.name == "embedding package":
            cluster.scale(0)

    with open_scheduler(address) as schedulers:
        control = Run(scheduler=schedulers, finished=lose)
        words = "no worker has taken a task for 2 seconds: all are gone"
        with pytest.raises(TasksLost, match=words) as raised:
            lower(LowerRequest(here / "checkpoint", SIZES), tmp_path / "packages", control)
    assert raised.value.exit_code == RESOURCE and "goes on where it stopped" in raised.value.remedy
    notes: list[str] = []
    lower(LowerRequest(here / "checkpoint", SIZES), tmp_path / "packages", Run(note=notes.append))
    assert ["the last is '" in note for note in notes] == [True]
    assert contents(tmp_path / "packages") == contents(here / "packages")


# Names


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("slurm", USAGE, "there is no scheduler 'slurm'"),
        ("dask://127.0.0.1:1", RESOURCE, "no dask scheduler answers at '127.0.0.1:1'"),
        ("dask://nowhere", RESOURCE, "no dask scheduler answers at 'nowhere'"),
        ("dask://", RESOURCE, "no dask scheduler answers at ''"),
    ],
)
def test_a_scheduler_that_is_none(
    name: str, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_dask, "CONNECT_SECONDS", 2.0)
    begun = time.monotonic()
    result = invoke("quantize", BUNDLED_MODEL, "-o", tmp_path / "out", "--scheduler", name)
    assert (result.exit_code, list(tmp_path.iterdir())) == (code, []), result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
    assert time.monotonic() - begun < DISTRIBUTED_WAITS


def test_without_dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    result = invoke("quantize", BUNDLED_MODEL, "-o", tmp_path / "out", "--scheduler", "dask://127.0.0.1:1")
    assert result.exit_code == USAGE and "pip install 'anequant[cluster]'" in result.stderr
    assert replace(Run(), note=print).scheduler is local
