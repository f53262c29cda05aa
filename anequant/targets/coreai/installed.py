"""Whether Core AI's Python package is there, in the one version that this code was tried with."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from anequant.errors import UnsupportedError

PACKAGE, VERSION = "coreai-core", "1.0.0b3"
OLDEST_PYTHON = (3, 11)
EXTRA = "pip install 'anequant[coreai]'"
PLATFORMS: Mapping[str, str] = {"Linux": "x86_64", "Darwin": "arm64"}
"""The systems that Apple builds the package for, and their processors."""


@dataclass(frozen=True)
class Problem:
    """Why Core AI cannot be used here, and what to do."""

    what: str
    remedy: str


def find_problem() -> Problem | None:
    """Say why Core AI cannot be used here; None where it can. Nothing of it is imported."""
    here = f"{platform.system()} on {platform.machine()}"
    elsewhere = "use Linux on x86_64 or macOS on arm64, or --target coreml"
    if PLATFORMS.get(platform.system()) != platform.machine():
        return Problem(f"{PACKAGE} is not built for {here}", elsewhere)
    if sys.version_info < OLDEST_PYTHON:
        running = platform.python_version()
        return Problem(f"{PACKAGE} needs Python 3.11, this is {running}", "use Python 3.11 or newer")
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return Problem(f"{PACKAGE} is not installed", EXTRA)
    if found != VERSION:
        return Problem(f"{PACKAGE} is {found}, {VERSION} is needed: betas differ in API and format", EXTRA)
    return None


def require_installed() -> None:
    """Raises UnsupportedError where Core AI cannot be used."""
    problem = find_problem()
    if problem is not None:
        raise UnsupportedError(problem.what, remedy=problem.remedy)
