"""What an asset does that the Neural Engine cannot run, or runs slowly."""

from __future__ import annotations

from pathlib import Path

from anequant.targets.shared.finding import Finding


def lint_bundle(folder: Path) -> list[Finding]:
    """Return every breach in a bundle's asset, errors first."""
    return []
