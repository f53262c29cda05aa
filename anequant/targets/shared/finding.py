"""What lint finds in whatever a checkpoint was lowered to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anequant.errors import VerificationError

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Finding:
    rule: str
    severity: str
    package: str
    function: str
    op: str
    detail: str
    why: str
    remedy: str


def sort_findings(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings, errors first."""
    return sorted(findings, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.severity))


def select_errors(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity == ERROR]


def require_clean(findings: list[Finding]) -> list[Finding]:
    """Return the findings; raises VerificationError with the first error among them and their number."""
    errors = select_errors(findings)
    if errors:
        first = errors[0]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise VerificationError(
            f"rule {first.rule}: {first.detail}: {first.why}{more}",
            where=f"{first.package}, {first.op}",
            remedy=first.remedy,
        )
    return findings
