"""What an asset does that the Neural Engine cannot run, or runs slowly, and what Apple's runner refuses.

The rules and their sources are in the modules `*_rules.py`; they hold for any asset, whoever wrote it. Not
among them:

    placement             decided by Apple's compiler on the device
    layout of buffers     what the exporter asks for (IOSurface, interleaved) is a matter of speed, of which
                          no source says what it costs to leave it out
    high-level norms      Apple's rules prefer them to their parts, and the dialect has no operation for one
"""

from __future__ import annotations

from pathlib import Path

from anequant.errors import InputError
from anequant.targets.coreai.assemble import PROGRAM
from anequant.targets.coreai.bundle import find_asset
from anequant.targets.coreai.lint.bundle_rules import BLOB_RULES, DAMAGE, FILE_RULES
from anequant.targets.coreai.lint.contract_rules import CONTRACT_RULES
from anequant.targets.coreai.lint.engine_rules import ENGINE_RULES
from anequant.targets.coreai.lint.linted import Linted
from anequant.targets.coreai.lint.value_rules import VALUE_RULES
from anequant.targets.coreai.listing import read_listing
from anequant.targets.shared.finding import ERROR, Finding, make_finding, sort_findings

FUNCTION_RULES = (*VALUE_RULES, *ENGINE_RULES)
ASSET_RULES = (*CONTRACT_RULES, *BLOB_RULES)


def lint_bundle(folder: Path) -> list[Finding]:
    """Return every breach in a bundle's asset and in what lies around it, errors first.

    Raises InputError for a bundle without an asset, and as `lint_asset`.
    """
    return lint_asset(find_asset(folder), folder)


def lint_asset(asset: Path, bundle: Path | None = None) -> list[Finding]:
    """Return every breach in an .aimodel, errors first; `bundle` is the folder that it lies in, if it is one.

    Of a program that does not match its hash, no functions are looked at. Raises InputError for a folder that
    is no asset or that Apple's parser does not read, UnsupportedError where Core AI is not installed.
    """
    if not (asset / PROGRAM).is_file():
        raise InputError(f"'{PROGRAM}' is missing", where=str(asset), remedy="name an .aimodel or a bundle")
    files = Linted(asset, bundle)
    found = [make_finding(rule, asset.name, "", hit) for rule in FILE_RULES for hit in rule.check(files)]
    if any(finding.rule == DAMAGE and finding.severity == ERROR for finding in found):
        return sort_findings(found)
    return sort_findings([*found, *lint_functions(Linted(asset, bundle, read_listing(asset)))])


def lint_functions(linted: Linted) -> list[Finding]:
    """Return every breach of the rules that look at functions."""
    name, found = linted.asset.name, []
    for function in linted.functions:
        for rule in FUNCTION_RULES:
            found += [make_finding(rule, name, function.name, hit) for hit in rule.check(function)]
    for rule in ASSET_RULES:
        found += [make_finding(rule, name, "", hit) for hit in rule.check(linted)]
    return found
