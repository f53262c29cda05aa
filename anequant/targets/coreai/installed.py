"""Whether Core AI's Python package is there, in the one version that this code was tried with."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from anequant.errors import UnsupportedError

PACKAGE, VERSION = "coreai-core", "1.0.0b3"
OLDEST_PYTHON = (3, 11)
EXTRA = "pip install 'anequant[coreai]'"
PLATFORMS: Mapping[str, str] = {"Linux": "x86_64", "Darwin": "arm64"}
"""The systems that Apple builds the package for, and their processors."""


@dataclass(frozen=True)
class Problem:
    """Why Core AI cannot be used here, and what to do; `misfit` where it is installed in another version."""

    what: str
    remedy: str
    misfit: bool = False


def find_problem(
    system: str | None = None,
    processor: str | None = None,
    python: str | None = None,
    installed: Callable[[str], str] | None = None,
) -> Problem | None:
    """Say why Core AI cannot be used, here or elsewhere; None where it can. Nothing of it is imported."""
    system, processor = system or platform.system(), processor or platform.machine()
    python, installed = python or platform.python_version(), installed or importlib.metadata.version
    elsewhere = "use Linux on x86_64 or macOS on arm64, or --target coreml"
    if PLATFORMS.get(system) != processor:
        return Problem(f"{PACKAGE} is not built for {system} on {processor}", elsewhere)
    if tuple(map(int, python.split(".")[:2])) < OLDEST_PYTHON:
        return Problem(f"{PACKAGE} needs Python 3.11, this is {python}", "use Python 3.11 or newer")
    try:
        found = installed(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return Problem(f"{PACKAGE} is not installed", EXTRA)
    if found != VERSION:
        what = f"{PACKAGE} is {found}, {VERSION} is needed: betas differ in API and format"
        return Problem(what, EXTRA, misfit=True)
    return None


def require_installed() -> None:
    """Raises UnsupportedError where Core AI cannot be used."""
    problem = find_problem()
    if problem is not None:
        raise UnsupportedError(problem.what, remedy=problem.remedy)
