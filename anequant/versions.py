"""The versions that decide bytes: of Python and of the packages that compute or write."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("anequant", "torch", "transformers", "coremltools", "safetensors", "numpy", "numba")


def installed_versions() -> dict[str, str]:
    """Return the version of Python and of each of PACKAGES, by name."""
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in PACKAGES
    }
