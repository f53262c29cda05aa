"""What `anequant inspect` found, as rows of (label, text)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anequant.checkpoints.stored_bits import PARTS_OF_LINEAR, WHOLE, PartBits
from anequant.evaluation.distribution import Distribution
from anequant.inspection.inspect import CodeUse, Inspection, TensorFacts
from anequant.inspection.inspect_checkpoint import CheckpointFacts, TensorFiles
from anequant.inspection.inspect_package import FunctionFacts, PackageFacts
from anequant.recipe import Recipe
from anequant.report.terminal.asset_rows import describe_asset
from anequant.report.terminal.inspect_words import (
    describe_widths,
    format_count,
    format_shape,
    join_alike_ports,
    show_sizes,
)
from anequant.units import format_bytes

Rows = list[tuple[str, str]]
MAIN_KEYS = ("r1", "r2", "codebook", "scales", "rounding", "bits")
VECTORS = tuple(f".{part}" for part in PARTS_OF_LINEAR if part != "weight")
BAR = 24
"""Characters of the longest bar of a histogram."""


def describe_inspection(found: Inspection) -> Rows:
    """Return what `inspect` found, parts of a set of packages under their names."""
    rows: Rows = [("what", found.kind)]
    if found.file is not None:
        rows += _files(found.file)
    if found.checkpoint is not None:
        rows += _checkpoint(found.checkpoint, alone=not found.packages and found.asset is None)
    if found.set is not None:
        rows += _set(found.set)
    for package in found.packages:
        rows += _package(package)
    if len(found.packages) > 1:
        rows += _total(found.packages)
    if found.asset is not None:
        rows += describe_asset(found.asset)
    return rows


def _checkpoint(facts: CheckpointFacts, *, alone: bool) -> Rows:
    sizes = facts.sizes
    rows: Rows = [] if alone else [("checkpoint", facts.kind)]
    if facts.made_by is not None:
        rows.append(("made by", facts.made_by))
    elif facts.scales:
        rows.append(("made by", "not anequant, or its anequant.json is gone"))
    rows += [
        (
            "model",
            f"{sizes['model_type']}, {sizes['layers']} layers, width {sizes['hidden_size']}, feed-forward "
            f"{sizes['intermediate_size']}, {sizes['heads']} heads of {sizes['head_dim']} and "
            f"{sizes['key_value_heads']} for keys and values, vocabulary {sizes['vocab_size']}"
            + (", head tied to the embedding" if sizes["tied"] else ""),
        ),
    ]
    if facts.recipe is not None:
        rows.append(("recipe", describe_recipe(facts.recipe)))
    rows += [(part, _bits(bits)) for part, bits in facts.bits.items()]
    for kind in facts.scales:
        given = f"{kind.input_range[0]:.3g} to {kind.input_range[1]:.3g}"
        out = f"{kind.output_range[0]:.3g} to {kind.output_range[1]:.3g}"
        text = f"{kind.kind} in {kind.linears} linears: input scales {given}, output scales {out}"
        rows.append(("scales", text))
    for book in facts.codebooks:
        ends = f"{book.range[0]:.3g} to {book.range[1]:.3g}"
        rows.append(("codebooks", f"{book.count} {book.kind} of {book.entries} entries, {ends}"))
    rows += [("at run time", text) for text in _online(facts.online)]
    return rows + _files(facts.tensors, facts.bits.get(WHOLE))


def describe_recipe(recipe: Mapping[str, Any]) -> str:
    """Return the keys that say most, then those that are not as in a recipe without any key."""
    defaults = {item.name: item.default for item in dataclasses.fields(Recipe)}
    told = [key for key in defaults if key in MAIN_KEYS or recipe.get(key, defaults[key]) != defaults[key]]
    return ", ".join(f"{key} {recipe[key]}" for key in told if key in recipe)


def _bits(part: PartBits) -> str:
    count = f"{format_count(part.weights)} weights"
    if part.bits is None or part.stored_bits is None:
        return f"{count}, width unknown: the file holds no codebooks (--tensor finds one linear's)"
    return f"{count} of {describe_widths(part.bits, part.stored_bits, 'scales and codebooks')}"


def _online(online: Mapping[str, Any]) -> Iterator[str]:
    for name in ("r3", "r4"):
        if name in online:
            size, order = online[name]["size"], online[name]["hadamard_order"]
            blocks = "" if order == size else f" in blocks of {order}"
            yield f"{name.upper()}, a Hadamard rotation of {size} values{blocks}"
    if "activations" in online:
        own = online["activations"]
        widths = ", ".join(f"{bits} bits in {count}" for bits, count in own["bits"].items() if count)
        ends = own["scale_range"]
        span = f" {ends[0]:.3g} to {ends[1]:.3g}" if ends else ""
        form = "symmetric" if own["symmetric"] else "asymmetric"
        yield f"linears' inputs rounded: {widths}; {own['scales']} scales{span}, {form}"
    if "kv_bits" in online:
        yield f"KV cache of {online['kv_bits']} bits"
    if "float_prefix" in online:
        yield f"the first {online['float_prefix']} positions stay in float"


def _files(files: TensorFiles, whole: PartBits | None = None) -> Rows:
    dtypes = ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in files.dtypes.items())
    rows: Rows = [("tensors", f"{files.tensors}: {dtypes}")]
    vectors = [kind for kind in files.kinds if kind.name.endswith(VECTORS)]
    listed = [kind for kind in files.kinds if kind not in vectors]
    width = max((len(kind.name) for kind in listed), default=0)
    for kind in listed:
        rows.append(("", f"{kind.name:<{width}}  {kind.count:>3} {kind.dtype:<4} {format_shape(kind.shape)}"))
    if vectors:
        count = sum(kind.count for kind in vectors)
        rows.append(("", f"{'scales and codebooks of linears':<{width}}  {count:>3}"))
    sizes = list(files.files.items())
    names = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes[:2])
    more = f", and {len(sizes) - 2} more" if len(sizes) > 2 else ""
    total = sum(files.files.values())
    rows.append(("files", f"{format_bytes(total)}: {names}{more}"))
    if whole is not None and whole.stored_bits is not None and whole.stored_bits < 16:
        small, plain = whole.weights * whole.stored_bits / 8, whole.weights * 2
        packed = f"{format_bytes(small)} of weights once packed"
        rows.append(("size", f"{packed}, {format_bytes(plain)} in float16 ({small / plain:.0%})"))
    else:
        rows.append(("size", f"{format_bytes(files.float16_bytes)} in float16"))
    return rows


def _set(values: Mapping[str, Any]) -> Rows:
    text = (
        f"{values['model']}, {values['architecture']}: context {values['context']}, prefill of "
        f"{values['batch']}, decoder in {values['chunks']}, head in {values['head_parts']} parts"
    )
    return [("meta.yaml", text + (", arg-max in the head" if values["argmax"] else ""))]


def _package(facts: PackageFacts) -> Rows:
    rows: Rows = [("package", f"{facts.name}, mlProgram, specification {facts.specification}")]
    for function in facts.functions:
        rows += _function(function)
    for kind in facts.constants:
        table = f", {kind.tables} tables of {kind.entries} entries" if kind.tables else ""
        text = f"{kind.count} {kind.kind} {kind.dtype}{table}: {format_count(kind.values)} values in "
        rows.append(("  constants", text + format_bytes(kind.bytes)))
    if facts.bits is not None and facts.stored_bits is not None:
        widths = describe_widths(facts.bits, facts.stored_bits, "tables")
        rows.append(("  weights", f"{format_count(facts.weights)} of {widths}"))
    rows.append(("  size", _package_size(facts)))
    if facts.metadata:
        pairs = [f"{key.rpartition('.')[2]} {value}" for key, value in facts.metadata.items()]
        rows.append(("  metadata", ", ".join(pairs)))
    return rows


def _package_size(facts: PackageFacts) -> str:
    weights = sum(size for name, size in facts.files.items() if "/weights/" in name)
    rest = sum(facts.files.values()) - weights
    share = f" ({weights / facts.float16_bytes:.0%})" if facts.float16_bytes else ""
    return (
        f"weights {format_bytes(weights)}, graph {format_bytes(rest)}; constants in float16 "
        f"{format_bytes(facts.float16_bytes)}{share}"
    )


def _function(function: FunctionFacts) -> Rows:
    rows: Rows = [("  function", function.name + (" (default)" if function.default else ""))]
    for label, specs in (("in", function.inputs), ("state", function.states), ("out", function.outputs)):
        for names, text in join_alike_ports(specs):
            allowed = function.enumerated.get(names[0], ())
            shapes = f", only {' or '.join(show_sizes(shape) for shape in allowed)}" if allowed else ""
            listed = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            rows.append(("", f"{label:<5}  {listed}  {text}{shapes}"))
    operations = ", ".join(f"{count} {kind}" for kind, count in function.operations.items())
    rows.append(("  operations", f"{sum(function.operations.values())}: {operations}"))
    return rows


def _total(packages: Sequence[PackageFacts]) -> Rows:
    size = sum(sum(facts.files.values()) for facts in packages)
    plain = sum(facts.float16_bytes for facts in packages)
    text = f"{len(packages)} packages, {format_bytes(size)}; constants in float16 {format_bytes(plain)}"
    return [("total", text + (f" ({size / plain:.0%})" if plain else ""))]


def describe_tensor(facts: TensorFacts) -> Rows:
    """Return statistics of one tensor, its histogram, and its codes."""
    own = facts.distribution
    rows: Rows = [
        ("tensor", facts.name),
        ("in", facts.place),
        ("dtype", facts.dtype),
        ("shape", format_shape(facts.shape)),
    ]
    if own.not_finite:
        rows.append(("not finite", f"{own.not_finite} values, left out below"))
    for label, value in (
        ("min", own.low),
        ("max", own.high),
        ("mean", own.mean),
        ("std", own.std),
        ("rms", own.rms),
        ("max/rms", own.peak),
    ):
        rows.append((label, "none" if value is None else f"{value:.6g}"))
    rows.append(("kurtosis", "none" if own.kurtosis is None else f"{own.kurtosis:.3f} (normal values: 3)"))
    rows.append(("zeros", "none" if own.zeros is None else f"{own.zeros:.2%}"))
    rows += _histogram(own)
    if facts.codes is not None:
        rows += _codes(facts.codes)
    elif facts.tables:
        rows.append(("tables", f"{facts.tables} lookup tables"))
    return rows


def _histogram(own: Distribution) -> Rows:
    """Return a bar for each bin, as long as its share of the fullest."""
    if own.low is None or own.high is None:
        return []
    if own.low == own.high:
        return [("histogram", f"all values are {own.low:.6g}")]
    step = (own.high - own.low) / len(own.counts)
    rows: Rows = [("histogram", f"from {own.low:.4g} to {own.high:.4g}, bins {step:.3g} wide")]
    for number, count in enumerate(own.counts):
        start = own.low + number * step
        rows.append(("", f"{start:>10.3g} {count:>9}  {_bar(count, max(own.counts))}"))
    return rows


def _codes(codes: Sequence[CodeUse]) -> Rows:
    total, most = sum(use.count for use in codes), max(use.count for use in codes)
    used = sum(use.count > 0 for use in codes)
    rows: Rows = [("codebook", f"{len(codes)} entries, {used} of them used")]
    for use in codes:
        share = f"{use.count / total:6.2%}" if total else ""
        rows.append(("", f"{use.entry:>10.4g} {share:>9}  {_bar(use.count, most)}"))
    return rows


def _bar(count: int, most: int) -> str:
    """Return a bar with at least one mark for what is not zero."""
    return "#" * math.ceil(BAR * count / most) if most else ""
