"""What `anequant inspect` found of an asset of Core AI, as rows of (label, text)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anequant.inspection.inspect_asset import AssetFacts, AssetFunction
from anequant.report.terminal.inspect_words import (
    describe_kind,
    describe_widths,
    format_count,
    group_by_kind,
    join_alike_ports,
)
from anequant.targets.coreai.listed_weights import LOOKED_UP
from anequant.units import format_bytes

Rows = list[tuple[str, str]]


def describe_asset(facts: AssetFacts) -> Rows:
    """Return the rows of an asset; functions that differ in sizes alone are one, shown by the last."""
    made = [f"{key} {value}" for key, value in facts.metadata.items() if isinstance(value, str)]
    rows: Rows = [("asset", ", ".join([facts.name, *made]))]
    if facts.bundle is not None:
        rows.append(("  bundle", _describe_bundle(facts.bundle)))
    for functions in group_by_kind(facts.functions or (), lambda function: function.name):
        rows += _describe_functions(functions)
    for width in facts.constants or ():
        text = f"{width.count} {width.dtype}: {format_count(width.values)} values in "
        rows.append(("  constants", text + format_bytes(width.bytes)))
    if facts.constants is None:
        rows.append(("  constants", f"{facts.blobs} in {format_bytes(facts.blob_bytes)}"))
    if facts.bits is not None and facts.stored_bits is not None:
        rows.append(("  weights", describe_widths(facts.bits, facts.stored_bits, "tables")))
    rows += _describe_weights(facts)
    rows.append(("  size", _describe_size(facts)))
    rows += [("  not known", f"{what}: {why}") for what, why in facts.missing.items()]
    return rows


def _describe_bundle(bundle: Mapping[str, Any]) -> str:
    told = [f"{key.replace('_', ' ')} {bundle[key]}" for key in ("metadata_version", "kind") if key in bundle]
    language = bundle.get("language")
    if isinstance(language, dict):
        names = {"max_context_length": "context", "vocab_size": "vocabulary"}
        told += [f"{word} {language[key]}" for key, word in names.items() if key in language]
    return ", ".join(told) or "metadata.json says nothing of it"


def _describe_functions(functions: Sequence[AssetFunction]) -> Rows:
    shown = functions[-1]
    rows: Rows = [("  function", describe_kind([function.name for function in functions]))]
    for label, ports in (("in", shown.inputs), ("state", shown.states), ("out", shown.outputs)):
        for names, text in join_alike_ports(ports):
            listed = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            layout = next((port.layout for port in ports if port.name == names[0]), "")
            rows.append(("", f"{label:<5}  {listed}  {text}" + (f", {layout}" if layout else "")))
    if shown.operations is not None:
        operations = ", ".join(f"{count} {kind}" for kind, count in shown.operations.items())
        if operations:
            rows.append(("  operations", f"{sum(shown.operations.values())}: {operations}"))
    return rows


def _describe_weights(facts: AssetFacts) -> Rows:
    """A row for each kind of weight: how many, and the width of each value."""
    kinds = facts.weights or ()
    width = max((len(kind.name) for kind in kinds), default=0)
    rows: Rows = []
    for kind in kinds:
        count = f"{kind.count} of " if kind.count > 1 else ""
        table = ""
        if kind.tables == 1:
            table = f", a table of {kind.entries}"
        elif kind.tables:
            table = f", {kind.tables} tables of {kind.entries}"
        use = f", {kind.use}" if kind.use == LOOKED_UP else ""
        text = f"{count}{kind.bits} bits{table}, {format_count(kind.values)} values{use}"
        rows.append(("", f"{kind.name:<{width}}  {text}"))
    return rows


def _describe_size(facts: AssetFacts) -> str:
    graph = sum(facts.files.values()) - facts.blob_bytes
    text = f"constants {format_bytes(facts.blob_bytes)}, functions {format_bytes(graph)}"
    if not facts.float16_bytes:
        return text
    share = facts.blob_bytes / facts.float16_bytes
    return f"{text}; constants in float16 {format_bytes(facts.float16_bytes)} ({share:.0%})"
