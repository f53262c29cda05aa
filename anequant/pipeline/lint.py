"""Lint of one package, or of every package in a folder."""

from __future__ import annotations

from pathlib import Path

from anequant.coreml.lint import Finding, errors_of, lint_package
from anequant.errors import InputError, VerificationError
from anequant.pipeline.folders import packages_folder


def lint(path: Path, chip: str = "any") -> list[Finding]:
    """`path` is an .mlpackage, a folder of them, or an output of convert.

    Raises InputError when there is none or one is damaged, UsageError for an unknown chip.
    """
    if (path / "Manifest.json").is_file():
        return lint_package(path, chip)
    packages = sorted(packages_folder(path).glob("*.mlpackage"))
    if not packages:
        raise InputError(f"'{path}' holds no packages", remedy="name an .mlpackage or a folder of them")
    return [finding for package in packages for finding in lint_package(package, chip)]


def require_clean(findings: list[Finding]) -> list[Finding]:
    """The findings; raises VerificationError with the first error among them and their number."""
    errors = errors_of(findings)
    if errors:
        first = errors[0]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise VerificationError(
            f"rule {first.rule}: {first.detail}: {first.why}{more}",
            where=f"{first.package}, {first.op}",
            remedy=first.remedy,
        )
    return findings
