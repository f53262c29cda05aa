"""The checks of `anequant doctor` as rows. Apart from the other results, for it must not import torch."""

from __future__ import annotations

from collections.abc import Sequence

from anequant.doctor import FAILURE, WARNING, Check


def diagnosed(checks: Sequence[Check]) -> list[tuple[str, str]]:
    """One row a check, its remedy below it, and the sum at the end."""
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
