"""`anequant doctor`: every probe on machines that are not this one, and the command on this one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running import execute_python, invoke

from anequant import doctor
from anequant.doctor import (
    FAILURE,
    LEAST_MEMORY,
    LEAST_ROOM,
    LEAST_TEMPORARY,
    OK,
    WARNING,
    Check,
    describe_checks,
    diagnose,
    has_failure,
)
from anequant.jobs.machine import Memory, memory, usable_cores
from anequant.targets.coreai.installed import find_problem

GB = 10**9


def one(checks: Any) -> Check:
    (check,) = checks
    assert isinstance(check, Check)
    assert bool(check.remedy) == (check.status != OK)
    return check


@pytest.mark.parametrize(
    ("version", "status"),
    [("3.9.18", FAILURE), ("3.10.0", OK), ("3.13.9", OK), ("3.13.0rc1", OK), ("3.14.0", FAILURE)],
)
def test_python(version: str, status: str) -> None:
    check = one(doctor.check_python(version, ">=3.10,<3.14", "/usr/bin/python3"))
    assert check.status == status
    assert version in check.detail and "/usr/bin/python3" in check.detail
    if status == FAILURE:
        assert ">=3.10,<3.14" in check.remedy


def versions(**known: str) -> Callable[[str], str]:
    def installed(name: str) -> str:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    return installed


def test_packages_in_range_out_of_range_and_missing() -> None:
    requirements = ["torch>=2.6", "transformers>=5.17,<6", "safetensors>=0.5", 'x; extra == "eval"']
    installed = versions(torch="2.13.0+cpu", transformers="4.57.6")
    good, old, missing = doctor.check_packages(requirements, installed)
    assert (good.name, good.status, good.remedy) == ("torch", OK, "")
    assert "2.13.0+cpu" in good.detail
    assert (old.name, old.status) == ("transformers", FAILURE)
    assert "4.57.6" in old.detail and old.remedy == "pip install 'transformers<6,>=5.17'"
    assert (missing.name, missing.status, missing.remedy) == (
        *("safetensors", FAILURE),
        "pip install 'safetensors>=0.5'",
    )


@pytest.mark.parametrize(
    ("machine", "status", "told"),
    [
        (("Linux", "x86_64", "3.12.1", "1.0.0b3"), OK, "1.0.0b3, needed for assets of Core AI is 1.0.0b3"),
        (("Darwin", "arm64", "3.14.0", "1.0.0b3"), OK, "1.0.0b3, needed for assets of Core AI is 1.0.0b3"),
        (("Linux", "x86_64", "3.12.1", "1.0.0b2"), WARNING, "1.0.0b2, 1.0.0b3 is needed: betas differ"),
        (("Linux", "x86_64", "3.11.0", None), OK, "not installed; only assets of Core AI need it (pip"),
        (("Linux", "x86_64", "3.10.9", None), OK, "needs Python 3.11, this is 3.10.9; only assets"),
        (("Linux", "aarch64", "3.12.1", None), OK, "not built for Linux on aarch64; only assets"),
        (("Windows", "AMD64", "3.12.1", None), OK, "not built for Windows on AMD64; only assets"),
    ],
)
def test_core_ai_is_an_extra(machine: tuple[str, str, str, str | None], status: str, told: str) -> None:
    system, processor, python, version = machine
    installed = versions(**({"coreai-core": version} if version else {}))
    check = one(doctor.check_coreai(partial(find_problem, system, processor, python, installed)))
    assert (check.name, check.status) == ("coreai-core", status) and check.detail.startswith(told)
    assert status == OK or check.remedy == "pip install 'anequant[coreai]'"


def test_packages_of_other_pythons_are_not_asked_for() -> None:
    other = 'tomli>=2.0; python_version < "3.0"'
    assert list(doctor.check_packages([other])) == []


def failing(*names: str, error: Exception | None = None) -> Callable[[str], Any]:
    def load(name: str) -> Any:
        if name in names:
            raise error or ModuleNotFoundError(f"No module named '{name}'\nand more")
        return SimpleNamespace(_BlobStorageReader=object, _BlobStorageWriter=object)

    return load


def test_a_torch_that_cannot_be_loaded() -> None:
    broken = OSError("libc10.so: cannot open shared object file")
    check = one(doctor.check_torch(failing("torch", error=broken)))
    assert check.status == FAILURE and "libc10.so" in check.detail
    assert one(doctor.check_torch(failing())).status == OK


@pytest.mark.parametrize(
    "missing",
    ["anequant.targets.coreml.toolkit", "coremltools.libmilstoragepython", "coremltools.libmodelpackage"],
)
def test_coremltools_without_its_native_library(missing: str) -> None:
    check = one(doctor.check_native_library(failing(missing)))
    assert check.status == FAILURE
    assert check.detail == f"no package can be written: No module named '{missing}'"
    assert "coremltools" in check.remedy


def test_a_native_library_that_cannot_write() -> None:
    def load(name: str) -> Any:
        return SimpleNamespace(_BlobStorageReader=object)

    check = one(doctor.check_native_library(load))
    assert check.status == FAILURE and "_BlobStorageWriter" in check.detail
    assert one(doctor.check_native_library(failing())).status == OK


def test_more_threads_than_cores() -> None:
    check = one(doctor.check_cores(2, 64, 32))
    assert (check.status, check.remedy) == (WARNING, "set OMP_NUM_THREADS=2")
    assert check.detail == "2 usable of 64, 32 threads"
    assert one(doctor.check_cores(8, 8, 4)).detail == "8 usable, 4 threads"
    assert one(doctor.check_cores(8, 8, 4)).status == OK


def test_little_memory() -> None:
    assert one(doctor.check_memory(Memory(8 * GB, LEAST_MEMORY))).status == OK
    low = one(doctor.check_memory(Memory(8 * GB, LEAST_MEMORY - 1)))
    assert low.status == WARNING and low.detail.endswith("free of 8 GB")
    assert one(doctor.check_memory(Memory(8 * GB, None))).detail == "8 GB"


def test_little_room(tmp_path: Path) -> None:
    other = tmp_path / "tmp"
    other.mkdir()
    room = {tmp_path: LEAST_ROOM, other: LEAST_TEMPORARY}
    assert [check.status for check in doctor.check_disk(tmp_path, other, room.__getitem__)] == [OK, OK]
    room = {folder: free - 1 for folder, free in room.items()}
    working, temporary = doctor.check_disk(tmp_path, other, room.__getitem__)
    assert (working.status, temporary.status) == (WARNING, WARNING)
    assert "TMPDIR" in temporary.remedy and str(tmp_path) in working.detail


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)
    other = tmp_path / "tmp"
    working, temporary = doctor.check_disk(tmp_path, other, lambda folder: 10**12)
    assert working.status == WARNING and "cannot be written" in working.detail
    assert temporary.status == OK


COMPILER = "/Applications/Xcode.app/Contents/Developer/usr/bin/coremlcompiler"


def mac(version: str, **answers: str) -> dict[str, Check]:
    """The checks on a Mac where `uname`, `sysctl` and `xcrun` answer so, or fail."""

    def run(command: Sequence[str]) -> str | None:
        return answers.get(command[0])

    return {check.name: check for check in doctor.check_mac("Darwin", version, run)}


def test_a_mac_with_all_that_it_takes() -> None:
    checks = mac("15.6", uname="arm64", sysctl="0", xcrun=COMPILER)
    assert {name: check.status for name, check in checks.items()} == {
        "macOS": OK,
        "Neural Engine": OK,
        "coremlcompiler": OK,
    }
    assert checks["coremlcompiler"].detail == COMPILER


def test_macs_that_lack_something() -> None:
    old = mac("14.7.1", uname="x86_64")
    assert [check.status for check in old.values()] == [WARNING] * 3
    assert "Intel" in old["Neural Engine"].detail and "Xcode" in old["coremlcompiler"].remedy
    translated = mac("15.6", uname="x86_64", sysctl="1", xcrun=COMPILER)
    assert "Rosetta" in translated["Neural Engine"].detail
    assert "arm64" in translated["Neural Engine"].remedy
    assert "2688" in mac("26.1", uname="arm64", xcrun=COMPILER)["macOS"].detail


def test_other_systems_need_no_mac() -> None:
    assert one(doctor.check_mac("Linux")).status == OK


def test_a_tool_that_is_not_there_or_fails() -> None:
    assert doctor._output(["anequant-no-such-tool"]) is None
    assert doctor._output([sys.executable, "-c", "raise SystemExit(1)"]) is None
    assert doctor._output([sys.executable, "-c", "print(' x ')"]) == "x"


# What the machine lets a process use


def test_cores_of_a_container(tmp_path: Path) -> None:
    every = usable_cores(tmp_path)
    assert every >= 1
    for content, cores in (("max 100000", every), ("100000 100000", 1), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(content)
        assert usable_cores(tmp_path) == cores


def test_memory_of_a_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000 kB\nMemFree: 10 kB\nMemAvailable: 1500 kB\n")
    assert memory(tmp_path, meminfo) == Memory(2000 * 1024, 1500 * 1024)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory(tmp_path, meminfo) == Memory(2000 * 1024, 1500 * 1024)
    (tmp_path / "memory.max").write_text("1024000\n")
    (tmp_path / "memory.current").write_text("24000\n")
    assert memory(tmp_path, meminfo) == Memory(1024000, 1000000)
    assert memory(tmp_path, tmp_path / "nothing").total == 1024000


# The command


def test_this_machine_runs_the_tests_and_so_has_no_failure() -> None:
    checks = diagnose()
    assert not has_failure(checks)
    names = [check.name for check in checks]
    required = {"python", "torch", "coremltools", "transformers", "safetensors", "coremltools library"}
    assert required | {"cores", "memory", "working folder", "temporary folder"} <= set(names)
    assert len(names) == len(set(names))
    result = invoke("doctor", "--json")
    assert result.exit_code == 0
    printed = json.loads(result.stdout)["checks"]
    assert [check["name"] for check in printed] == names
    assert all(check.keys() == {"name", "status", "detail", "remedy"} for check in printed)


def test_a_failure_is_exit_code_4_and_a_warning_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    warning = Check("disk", WARNING, "full", "empty it")
    failure = Check("torch", FAILURE, "not installed", "pip install torch")
    for checks, code, total in (
        ([warning], 0, "1 warning"),
        ([warning, failure, failure], 4, "2 failures, 1 warning"),
    ):
        monkeypatch.setattr(doctor, "PROBES", (lambda found=checks: iter(found),))
        result = invoke("doctor")
        assert result.exit_code == code
        lines = [line.split() for line in result.stdout.splitlines()]
        assert lines[:2] == [["warning", "disk", "full"], ["do:", "empty", "it"]]
        assert " ".join(lines[-1]) == total


def test_the_sum_of_no_complaints() -> None:
    assert describe_checks([Check("a", OK, "b")])[-1] == ("", "nothing is wrong")


def test_it_runs_where_torch_and_coremltools_are_broken() -> None:
    """A reader that refuses both: the command must still come to its end and say so."""
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "coremltools", "transformers"):
            raise ImportError(f"{name} is broken")
sys.meta_path.insert(0, Refuse())
from anequant.cli import main
main(["doctor"])
"""
    ran = execute_python(script)
    assert (ran.exit_code, ran.stderr) == (4, "")
    assert "torch cannot be imported: torch is broken" in ran.stdout
    assert "no package can be written" in ran.stdout
    assert "nothing can be rounded: torch is broken" in ran.stdout
    assert "3 failures" in ran.stdout
