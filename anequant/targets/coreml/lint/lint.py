"""What a package does that the Neural Engine cannot run, or runs slowly: rules that a program can be held to.

The rules and their sources are in the modules `*_rules.py`. Not among them:

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

from pathlib import Path

from anequant.checkpoints.places import find_packages
from anequant.errors import InputError, UsageError, did_you_mean
from anequant.targets.coreml.graph import read_graphs
from anequant.targets.coreml.lint.chips import CHIPS
from anequant.targets.coreml.lint.file_rules import PACKAGE_RULES
from anequant.targets.coreml.lint.operation_rules import GRAPH_RULES
from anequant.targets.coreml.lint.shape_rules import SHAPE_RULES
from anequant.targets.coreml.lint.state_rules import STATE_RULES
from anequant.targets.coreml.lint.sum_rules import SUM_RULES
from anequant.targets.coreml.lint.weight_rules import WEIGHT_RULES
from anequant.targets.coreml.storage import damage
from anequant.targets.shared.finding import Finding, make_finding, sort_findings

FUNCTION_RULES = (*SHAPE_RULES, *GRAPH_RULES, *WEIGHT_RULES, *SUM_RULES, *STATE_RULES)


def lint_package(package: Path, chip: str = "any") -> list[Finding]:
    """Return every breach in an .mlpackage, errors first.

    Raises UsageError for an unknown chip, InputError for a damaged package.
    """
    if chip not in CHIPS:
        raise UsageError(f"unknown chip '{chip}'", remedy=did_you_mean(chip, CHIPS))
    graphs = read_graphs(package)
    findings = []
    with damage(str(package)):
        for graph in graphs:
            for rule in FUNCTION_RULES:
                hits = rule.check(graph, CHIPS[chip])
                findings += [make_finding(rule, package.name, graph.function, hit) for hit in hits]
        for whole in PACKAGE_RULES:
            findings += [make_finding(whole, package.name, "", hit) for hit in whole.check(graphs, package)]
    return sort_findings(findings)


def lint(path: Path, chip: str = "any") -> list[Finding]:
    """Return every breach in an .mlpackage, a folder of them, or an output of convert.

    Raises InputError when there is none or one is damaged, UsageError for an unknown chip.
    """
    if (path / "Manifest.json").is_file():
        return lint_package(path, chip)
    packages = sorted(find_packages(path).glob("*.mlpackage"))
    if not packages:
        raise InputError(f"'{path}' holds no packages", remedy="name an .mlpackage or a folder of them")
    return [finding for package in packages for finding in lint_package(package, chip)]
