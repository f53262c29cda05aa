"""Lint of whatever lies at a path: Core ML packages, an asset of Core AI or its bundle, or an output."""

from __future__ import annotations

from pathlib import Path

from anequant.checkpoints.places import find_bundle, has_packages
from anequant.targets.coreai.assemble import PROGRAM
from anequant.targets.coreai.lint.lint_bundle import lint_asset, lint_bundle
from anequant.targets.coreml.lint.lint import lint
from anequant.targets.shared.finding import Finding, sort_findings


def lint_path(path: Path, chip: str = "any") -> list[Finding]:
    """Return every breach in what lies at a path, errors first.

    `chip` is for packages. Raises InputError where there is nothing, or something is damaged, UsageError for
    an unknown chip.
    """
    if (path / PROGRAM).is_file():
        return lint_asset(path)
    bundle = find_bundle(path)
    found = [] if bundle is None else lint_bundle(bundle)
    if bundle is None or has_packages(path):
        found = [*lint(path, chip), *found]
    return sort_findings(found)
