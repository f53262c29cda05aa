"""What a lint rule is, and what it finds in whatever a checkpoint was lowered to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

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


@dataclass(frozen=True)
class Hit:
    """Where a rule is broken and how; `severity` overrides the rule's."""

    op: str
    detail: str
    severity: str | None = None


@dataclass(frozen=True)
class Rule:
    """`why` names the source. `check` yields a Hit for every breach; what it takes is the same for all rules
    of a table."""

    id: str
    severity: str
    why: str
    remedy: str
    check: Callable[..., Iterator[Hit]]


def rule(id: str, severity: str, why: str, remedy: str) -> Callable[[Callable[..., Iterator[Hit]]], Rule]:
    """Make the check below it a Rule."""
    return partial(Rule, id, severity, why, remedy)


def make_finding(rule: Rule, package: str, function: str, hit: Hit) -> Finding:
    """The finding of a breach; `function` is "" for one of a whole package."""
    severity = hit.severity or rule.severity
    return Finding(rule.id, severity, package, function, hit.op, hit.detail, rule.why, rule.remedy)


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
