"""What a package does that the Neural Engine cannot run, or runs slowly: rules that a program can be held to.

The rules and their sources are in `lint_shapes.py`, `lint_rules.py`, `lint_weights.py` and `lint_files.py`.
Not decidable from a program, and so not here: where Core ML really places an operation (`anequant profile`
asks it on a Mac), how large activations get (`lower` measures them, see `headroom.py`), what padding of a
last axis of one costs (decoding has no other shape), and what loading takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from anequant.coreml.graph import Graph, package_graphs
from anequant.errors import UsageError, did_you_mean

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Chip:
    """`axis` is the longest axis of a tensor; `w8a8` whether 8-bit activations are faster than float16."""

    name: str
    axis: int
    w8a8: bool


CHIPS = {
    chip.name: chip
    for chip in (
        *(Chip(name, 16384, False) for name in ("any", "a14", "a15", "a16", "m1", "m2", "m3")),
        Chip("a17", 16384, True),
        *(Chip(name, 65536, True) for name in ("a18", "a19", "m4", "m5", "m6")),
    )
}
"""By generation of the engine (H13 to H15: 16384; H16 on: 65536). `any` is the strictest."""


@dataclass(frozen=True)
class Hit:
    """Where a rule is broken and how; `severity` overrides the rule's."""

    op: str
    detail: str
    severity: str | None = None


@dataclass(frozen=True)
class Rule:
    """`why` names the source; `check` yields a Hit for every breach in one function."""

    id: str
    severity: str
    why: str
    remedy: str
    check: Callable[[Graph, Chip], Iterator[Hit]]


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


def lint_package(package: Path, chip: str = "any") -> list[Finding]:
    """Every breach in an .mlpackage, errors first.

    Raises UsageError for an unknown chip, InputError for a damaged package.
    """
    from anequant.coreml.lint_files import PACKAGE_RULES
    from anequant.coreml.lint_rules import GRAPH_RULES
    from anequant.coreml.lint_weights import WEIGHT_RULES

    if chip not in CHIPS:
        raise UsageError(f"unknown chip '{chip}'", remedy=did_you_mean(chip, CHIPS))
    graphs = package_graphs(package)
    findings = [
        _finding(rule, package, graph.function, hit)
        for graph in graphs
        for rule in (*GRAPH_RULES, *WEIGHT_RULES)
        for hit in rule.check(graph, CHIPS[chip])
    ]
    for rule, check in PACKAGE_RULES:
        findings += [_finding(rule, package, "", hit) for hit in check(graphs, package)]
    return sorted(findings, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.severity))


def errors_of(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity == ERROR]


def _finding(rule: Rule, package: Path, function: str, hit: Hit) -> Finding:
    severity = hit.severity or rule.severity
    return Finding(rule.id, severity, package.name, function, hit.op, hit.detail, rule.why, rule.remedy)
