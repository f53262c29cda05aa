"""What a package does that the Neural Engine cannot run, or runs slowly: rules that a program can be held to.

The rules and their sources are in the modules `lint_*.py`. Not among them:

    placement, load time   Core ML decides on the device (`anequant profile` asks it on a Mac), and copies
                           of weights that loaded functions hold (coremltools 2351) are not in the file
    size of activations    known only from data (`lower` measures them, see `headroom.py`); with it how far
                           softmax, silu and tiny products are off, of which the program shows the form only
    last axis of one       padded 32-fold, but decoding has no other shape; so S3 looks at longer ones
    history + new tokens   of at most 65536 is a consequence of S4: together they are an axis of the scores
    query of one or two    fails under Core AI, which does not read these packages
    cost of a long state   grows with it; no length is a mistake
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
    """`axis` is the longest axis of a tensor, `w8a8` whether 8-bit activations are faster than float16, and
    `integers` whether direct integer weights were measured to be."""

    name: str
    axis: int
    w8a8: bool = False
    integers: bool = False


CHIPS = {
    chip.name: chip
    for chip in (
        *(Chip(name, 16384) for name in ("any", "a14", "a15", "a16", "m1", "m2", "m3")),
        Chip("a17", 16384, w8a8=True),
        *(Chip(name, 65536, w8a8=True) for name in ("a18", "a19", "m4", "m6")),
        Chip("m5", 65536, w8a8=True, integers=True),
    )
}
"""By generation of the engine (H13 to H15: 16384; H16 on: 65536). `any` is the strictest. The a17 is not
placed by the source for axes and so counts as the older one; 8-bit activations pay off from it on (Apple)."""


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
    from anequant.coreml.lint_shapes import SHAPE_RULES
    from anequant.coreml.lint_states import STATE_RULES
    from anequant.coreml.lint_sums import SUM_RULES
    from anequant.coreml.lint_weights import WEIGHT_RULES

    if chip not in CHIPS:
        raise UsageError(f"unknown chip '{chip}'", remedy=did_you_mean(chip, CHIPS))
    rules = (*SHAPE_RULES, *GRAPH_RULES, *WEIGHT_RULES, *SUM_RULES, *STATE_RULES)
    graphs = package_graphs(package)
    findings = [
        _finding(rule, package, graph.function, hit)
        for graph in graphs
        for rule in rules
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
