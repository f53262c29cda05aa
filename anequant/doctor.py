"""Whether this machine can run anequant: one small probe for each thing that is known to go wrong.

A probe takes what it looks at as arguments, whose defaults are this machine, and gives Checks. Nothing
heavy is imported before a probe needs it, so a broken torch or coremltools is a line and not a traceback.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from anequant.errors import first_line
from anequant.jobs.machine import Memory, memory, torch_threads, usable_cores
from anequant.lower_options import LowerOptions
from anequant.targets.coreai.installed import PACKAGE, VERSION, Problem, find_problem
from anequant.units import format_bytes

OK, WARNING, FAILURE = "ok", "warning", "failure"
MEGABYTE, GIGABYTE = 10**6, 10**9
LEAST_MEMORY = 4 * GIGABYTE
"""A model of half a billion weights in float32, which verification holds, and the interpreter beside it."""

LEAST_ROOM = 4 * GIGABYTE
"""The float model of half a billion weights, its quantized checkpoint (1 GB each), and packages."""

LEAST_TEMPORARY = 2 * LowerOptions().max_chunk_mb * MEGABYTE
"""coremltools builds a package in the temporary folder, and copies it once there."""

OLDEST_MACOS, SCALED_TABLES_MACOS = 15, 26
"""Packages are for iOS 18 and macOS 15. From 26 on, weights that are scales times a lookup table were seen to
fail when the engine loads them (apple/coremltools 2688)."""

Run = Callable[[Sequence[str]], str | None]


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, and what to do about it unless it is ok."""

    name: str
    status: str
    detail: str
    remedy: str = ""


def diagnose() -> list[Check]:
    """Run every probe in turn, on this machine."""
    return [check for probe in PROBES for check in probe()]


def has_failure(checks: Sequence[Check]) -> bool:
    return any(check.status == FAILURE for check in checks)


def describe_checks(checks: Sequence[Check]) -> list[tuple[str, str]]:
    """Return a row of (label, text) for each check, its remedy below it, and the sum at the end."""
    width = max(len(check.name) for check in checks)
    rows = []
    for check in checks:
        rows.append((check.status, f"{check.name:<{width}}  {check.detail}"))
        if check.remedy:
            rows.append(("", f"{'':<{width}}  do: {check.remedy}"))
    counts = [
        f"{count} {word}{'' if count == 1 else 's'}"
        for word in (FAILURE, WARNING)
        if (count := sum(check.status == word for check in checks))
    ]
    return [*rows, ("", ", ".join(counts) or "nothing is wrong")]


def check_python(
    version: str = platform.python_version(), required: str | None = None, executable: str = sys.executable
) -> Iterator[Check]:
    """Check this Python against `required`, a version specifier; None for the one in anequant's metadata."""
    if required is None:
        required = importlib.metadata.metadata("anequant")["Requires-Python"]
    detail = f"{version} at {executable}"
    if SpecifierSet(required).contains(version, prereleases=True):
        yield Check("python", OK, detail)
    else:
        remedy = f"use a Python {required}: coremltools has no native library for another (its issue 2695)"
        yield Check("python", FAILURE, f"{detail}, needed is {required}", remedy)


def check_packages(
    requirements: Sequence[str] | None = None,
    installed: Callable[[str], str] = importlib.metadata.version,
) -> Iterator[Check]:
    """Check what anequant requires, one line each; optional extras are left out."""
    for text in importlib.metadata.requires("anequant") or [] if requirements is None else requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted = requirement.name, str(requirement.specifier)
        remedy = f"pip install '{name}{wanted}'"
        try:
            version = installed(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, FAILURE, f"not installed, needed is {wanted}", remedy)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Check(name, OK, f"{version}, needed is {wanted}")
        else:
            yield Check(name, FAILURE, f"{version}, needed is {wanted}", remedy)


def check_coreai(find: Callable[[], Problem | None] = find_problem) -> Iterator[Check]:
    """Check for Core AI's package, an extra: only a version that does not fit is to be changed."""
    problem = find()
    if problem is None:
        yield Check(PACKAGE, OK, f"{VERSION}, needed for assets of Core AI is {VERSION}")
        return
    told = problem.what.removeprefix(f"{PACKAGE} ").removeprefix("is ")
    if problem.misfit:
        yield Check(PACKAGE, WARNING, told, problem.remedy)
    else:
        yield Check(PACKAGE, OK, f"{told}; only assets of Core AI need it ({problem.remedy})")


def check_torch(load: Callable[[str], Any] = importlib.import_module) -> Iterator[Check]:
    """Check that torch loads. It is installed more often than it works: its libraries must fit the
    system's."""
    try:
        load("torch")
    except Exception as error:
        remedy = "install torch again in a fresh environment: https://pytorch.org/get-started/locally"
        yield Check("torch library", FAILURE, f"torch cannot be imported: {first_line(error)}", remedy)
        return
    yield Check("torch library", OK, "loads")


def check_native_library(load: Callable[[str], Any] = importlib.import_module) -> Iterator[Check]:
    """Check coremltools' native library. Where there is no wheel it installs without, and fails at the very
    end with "BlobWriter not loaded" (apple/coremltools 2361, 2617, 2695)."""
    name = "coremltools library"
    remedy = (
        "use Python 3.10 to 3.13 on Linux or macOS (x86-64 or arm64), and `pip install --force-reinstall "
        "--no-cache-dir coremltools`"
    )
    try:
        load("anequant.targets.coreml.toolkit")
        storage = load("coremltools.libmilstoragepython")
        load("coremltools.libmodelpackage")
    except Exception as error:
        yield Check(name, FAILURE, f"no package can be written: {first_line(error)}", remedy)
        return
    missing = [part for part in ("_BlobStorageReader", "_BlobStorageWriter") if not hasattr(storage, part)]
    if missing:
        yield Check(name, FAILURE, f"libmilstoragepython has no {', '.join(missing)}", remedy)
    else:
        yield Check(name, OK, "reads and writes packages")


def check_compiled_loops(load: Callable[[str], Any] = importlib.import_module) -> Iterator[Check]:
    """Check where numba keeps what it compiles: beside the module or below HOME; it can do without."""
    name = "compiled loops"
    try:
        folder = load("anequant.quantization.kernels").cache_folder()
    except Exception as error:
        remedy = "pip install --force-reinstall numba, once torch loads"
        yield Check(name, FAILURE, f"nothing can be rounded: {first_line(error)}", remedy)
        return
    if folder is None:
        remedy = "set NUMBA_CACHE_DIR to a folder that can be written to"
        yield Check(name, WARNING, "every run compiles them again, no folder for them is writable", remedy)
    else:
        yield Check(name, OK, f"kept in {folder}")


def check_cores(
    usable: int | None = None, present: int | None = None, threads: int | None = None
) -> Iterator[Check]:
    """Check that threads do not outnumber cores: they wait for each other, which costs more than missing
    cores."""
    usable = usable_cores() if usable is None else usable
    present = (os.cpu_count() or 1) if present is None else present
    threads = torch_threads(usable) if threads is None else threads
    detail = f"{usable} usable" + (f" of {present}" if present > usable else "") + f", {threads} threads"
    if threads > usable:
        yield Check("cores", WARNING, detail, f"set OMP_NUM_THREADS={usable}")
    else:
        yield Check("cores", OK, detail)


def check_memory(found: Memory | None = None) -> Iterator[Check]:
    found = memory() if found is None else found
    if found.available is None:
        yield Check("memory", OK, format_bytes(found.total))
        return
    detail = f"{format_bytes(found.available)} free of {format_bytes(found.total)}"
    if found.available < LEAST_MEMORY:
        remedy = f"close other programs; {format_bytes(LEAST_MEMORY)} suffice for half a billion weights"
        yield Check("memory", WARNING, detail, remedy)
    else:
        yield Check("memory", OK, detail)


def check_disk(
    working: Path | None = None,
    temporary: Path | None = None,
    free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
) -> Iterator[Check]:
    """Check for room in the working folder and where coremltools builds packages."""
    working = Path.cwd() if working is None else working
    temporary = Path(tempfile.gettempdir()) if temporary is None else temporary
    for name, folder, least, other in (
        ("working folder", working, LEAST_ROOM, "work in a folder on another disk"),
        ("temporary folder", temporary, LEAST_TEMPORARY, "set TMPDIR to a folder on another disk"),
    ):
        detail = f"{format_bytes(free(folder))} free in {folder}"
        if not os.access(folder, os.W_OK):
            yield Check(name, WARNING, f"{folder} cannot be written to", other)
        elif free(folder) < least:
            yield Check(name, WARNING, detail, f"free {format_bytes(least)}, or {other}")
        else:
            yield Check(name, OK, detail)


def check_mac(
    system: str = platform.system(), version: str = platform.mac_ver()[0], run: Run | None = None
) -> Iterator[Check]:
    """Check what `profile` and `--backend coreml` need; all else runs on any system."""
    if system != "Darwin":
        detail = f"{system}: packages are made and verified here, and run on a Mac or an iPhone"
        yield Check("Neural Engine", OK, detail)
        return
    run = _output if run is None else run
    release = int(version.partition(".")[0] or 0)
    if release < OLDEST_MACOS:
        remedy = f"run them on macOS {OLDEST_MACOS} or iOS 18, or later"
        yield Check("macOS", WARNING, f"{version} cannot load packages", remedy)
    elif release >= SCALED_TABLES_MACOS:
        remedy = "check packages of a recipe with activation_bits = 8 or scales = 'group' with `profile`"
        known = "weights that are scales times a lookup table may not load (apple/coremltools 2688)"
        yield Check("macOS", WARNING, f"{version}: {known}", remedy)
    else:
        yield Check("macOS", OK, version)
    translated = run(["sysctl", "-in", "sysctl.proc_translated"]) == "1"
    if translated or run(["uname", "-m"]) != "arm64":
        what = "this Python runs translated by Rosetta" if translated else "an Intel processor"
        remedy = "install a Python for arm64" if translated else "run packages on a Mac with an Apple chip"
        yield Check("Neural Engine", WARNING, f"{what}: no Neural Engine", remedy)
    else:
        yield Check("Neural Engine", OK, "an Apple chip")
    compiler = run(["xcrun", "--find", "coremlcompiler"])
    if compiler:
        yield Check("coremlcompiler", OK, compiler)
    else:
        remedy = "install Xcode, then `sudo xcode-select --switch /Applications/Xcode.app/Contents/Developer`"
        yield Check("coremlcompiler", WARNING, "not found, ANEMLL's Swift runtime needs its output", remedy)


PROBES: tuple[Callable[[], Iterator[Check]], ...] = (
    check_python,
    check_packages,
    check_coreai,
    check_torch,
    check_native_library,
    check_compiled_loops,
    check_cores,
    check_memory,
    check_disk,
    check_mac,
)


def _output(command: Sequence[str]) -> str | None:
    """Return what a command prints, None when it is not there or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
