"""Rules about functions and what they take and give, as Apple's runner asks for it.

All sources are in apple/coreai-models: CoreAIStaticShapeEngine.swift runs an asset, ModelStructure.swift
decides on which unit, models/base.py says what the exporter writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from anequant.targets.coreai.design import (
    CACHES,
    EXTEND,
    GATHER,
    GATHERED,
    HIDDEN,
    LOAD,
    LOGITS,
    MASK,
    NEW,
    POSITIONS,
    PREFILL,
    SMALLEST_CONTEXT,
    STEP,
    TABLE,
    TOKENS,
    list_contexts,
)
from anequant.targets.coreai.lint.linted import Linted, Transformer, find_form, show_shape
from anequant.targets.coreai.listing import ListedFunction, Port
from anequant.targets.shared.finding import ERROR, WARNING, Hit, rule

Shape = tuple[int | None, ...]
Wanted = dict[str, tuple[tuple[str, ...], Shape]]
"""By name, the dtypes that a port may have and its shape, None for any size."""

HALF, TABLES = ("float16",), ("float16", "int8")


@rule(
    "CC1",
    WARNING,
    "without extend* and load_embeddings the runner takes the GPU (ModelStructure.swift)",
    "export for iOS, or leave it to the GPU",
)
def _structure(linted: Linted) -> Iterator[Hit]:
    if not linted.static:
        yield Hit(", ".join(sorted(linted.names)[:3]), "no functions for the Neural Engine")


@rule(
    "CC2",
    ERROR,
    "the runner finds functions and tensors by name and fills them in these types (models/base.py, "
    "CoreAIStaticShapeEngine.swift)",
    "write the functions as the contract says",
)
def _ports(linted: Linted) -> Iterator[Hit]:
    if not linted.static:
        return
    parsed = {item.function.name for item in linted.transformers()}
    for name in sorted(linted.names - parsed):
        if name.startswith((EXTEND, PREFILL)):
            yield Hit(name, f"'{name}' tells no context and no window, as in {EXTEND}_512_64")
    for item in linted.transformers():
        for detail in _compare(item.function.inputs, _list_inputs(item)):
            yield Hit(item.function.name, f"input {detail}")
        for detail in _compare(item.function.states, _list_states(item)):
            yield Hit(item.function.name, f"state {detail}")
        for detail in _compare(item.function.outputs, _list_outputs(item)):
            yield Hit(item.function.name, f"output {detail}")
    yield from _embedding_ports(linted)


def _embedding_ports(linted: Linted) -> Iterator[Hit]:
    for function in linted.functions:
        if function.name == LOAD:
            for detail in _compare(function.outputs, {TABLE: (TABLES, (None, 1, None))}):
                yield Hit(LOAD, f"output {detail}")
    for length, function in linted.gathers().items():
        taken: Wanted = {TOKENS: (("int32",), (1, length)), TABLE: (TABLES, (None, 1, None))}
        for detail in _compare(function.inputs, taken):
            yield Hit(function.name, f"input {detail}")
        for detail in _compare(function.outputs, {GATHERED: (HALF, (1, length, 1, None))}):
            yield Hit(function.name, f"output {detail}")


@rule(
    "CC3",
    ERROR,
    "the runner takes the largest size of key_cache for the context, and wants one function of "
    "max_context_length (CoreAIStaticShapeEngine.swift, contextLength)",
    "use a context longer than layers and the width of keys, and name the largest in metadata.json",
)
def _contexts(linted: Linted) -> Iterator[Hit]:
    most = linted.language("max_context_length")
    taken = {}
    for item in linted.transformers():
        form = next((port.form for port in item.caches if port.name == CACHES[0]), None)
        if form is None or not form.shape or None in form.shape:
            continue
        largest = max(size or 0 for size in form.shape)
        taken[item.function.name] = largest
        if largest != item.context:
            shape = show_shape(form.shape)
            yield Hit(item.function.name, f"{CACHES[0]} {shape} counts as a context of {largest}")
    if taken and most is not None and most not in taken.values():
        yield Hit("metadata.json", f"no function has the context {most} that max_context_length says")


@rule(
    "CC4",
    ERROR,
    "the runner takes any context with any window, for prompts and for tokens "
    "(CoreAIStaticShapeEngine.swift, forwardGraph and runGather)",
    "write a function for each pair, and a gather for each window",
)
def _ladder(linted: Linted) -> Iterator[Hit]:
    found = list(linted.transformers())
    if not found or not linted.static:
        return
    contexts, windows = ({getattr(item, key) for item in found} for key in ("context", "length"))
    for kind, context, length in itertools.product((EXTEND, PREFILL), sorted(contexts), sorted(windows)):
        if f"{kind}_{context}_{length}" not in linted.names:
            yield Hit(f"{kind}_{context}_{length}", "the function is missing")
    for length in sorted(windows - linted.gathers().keys()):
        yield Hit(f"{GATHER}_{length}", "the function is missing")
    for context, length in itertools.product(sorted(contexts), sorted(windows)):
        if context % length:
            yield Hit(f"{EXTEND}_{context}_{length}", f"the last window of {length} crosses {context}")
    usual = list_contexts(max(contexts))
    if contexts != set(usual):
        told = ", ".join(map(str, sorted(contexts)))
        detail = f"contexts {told} are not {SMALLEST_CONTEXT} and its doublings, as the exporter's"
        yield Hit(found[0].function.name, detail, WARNING)


@rule(
    "CC5",
    ERROR,
    "functions share caches and the table, and the runner reads vocab_size logits a position "
    "(CoreAIStaticShapeEngine.swift)",
    "make all functions of one model",
)
def _one_model(linted: Linted) -> Iterator[Hit]:
    sizes: dict[str, dict[int, str]] = {}

    def note(what: str, function: ListedFunction, size: int | None) -> None:
        if size is not None:
            sizes.setdefault(what, {}).setdefault(size, function.name)

    for item in linted.transformers():
        function = item.function
        form = find_form(function.inputs, HIDDEN)
        if form is not None and len(form.shape) == 4:
            note("hidden size", function, form.shape[3])
        for port in item.caches:
            if len(port.form.shape) == 5:
                note("layers", function, port.form.shape[0])
                note("width of keys", function, port.form.shape[2])
        form = find_form(function.outputs, LOGITS)
        if item.kind == EXTEND and form is not None and len(form.shape) == 4:
            note("vocabulary", function, form.shape[3])
    for function in linted.functions:
        form = find_form(function.outputs if function.name == LOAD else function.inputs, TABLE)
        if form is not None and len(form.shape) == 3:
            note("vocabulary", function, form.shape[0])
            note("hidden size", function, form.shape[2])
    told = linted.language("vocab_size")
    if told is not None and "vocabulary" in sizes:
        sizes["vocabulary"].setdefault(told, "metadata.json")
    for what, places in sizes.items():
        if len(places) > 1:
            listed = ", ".join(f"{size} in {place}" for size, place in places.items())
            yield Hit(list(places.values())[-1], f"{what}: {listed}")


@rule(
    "CC6",
    WARNING,
    "Apple's runner keeps caches as states and refuses any other (CoreAIStaticShapeEngine.swift); its rules "
    "for the engine want them as inputs (neural_engine_rules.md)",
    "lower with --kv state, or run it by a host that keeps the caches",
)
def _caches(linted: Linted) -> Iterator[Hit]:
    for item in linted.transformers():
        if not item.function.states:
            known = _is_functional(item)
            detail = "caches are inputs" if known else "there are no caches"
            yield Hit(item.function.name, detail, None if known else ERROR)
            return


@rule(
    "CC7",
    ERROR,
    "functions get one buffer for a cache and the table, so all must lay it out alike (models/base.py, "
    "export_hardware_constraints)",
    "apply the same constraints to every function that shares it",
)
def _layouts(linted: Linted) -> Iterator[Hit]:
    found: dict[str, dict[str, str]] = {}
    for function in linted.functions:
        for port in (*function.inputs, *function.states, *function.outputs):
            if function.public and port.name in (TABLE, *CACHES):
                found.setdefault(port.name, {}).setdefault(port.form.layout, function.name)
    for name, places in found.items():
        if len(places) > 1:
            listed = ", ".join(f"{layout or 'as it likes'} in {place}" for layout, place in places.items())
            yield Hit(name, f"'{name}' lies {listed}")


def _is_functional(item: Transformer) -> bool:
    return not item.function.states and bool(item.caches)


def _list_inputs(item: Transformer) -> Wanted:
    context, length = item.context, item.length
    wanted: Wanted = {
        HIDDEN: (HALF, (1, length, 1, None)),
        POSITIONS: (("uint16",), (1, length)),
    }
    if _is_functional(item):
        cache = (HALF, (None, 1, None, 1, context))
        return wanted | {MASK: (HALF, (1, context + length, 1, length))} | dict.fromkeys(CACHES, cache)
    return wanted | {STEP: (("int32",), (1,)), MASK: (HALF, (1, context, 1, length))}


def _list_states(item: Transformer) -> Wanted:
    if not item.function.states:
        return {}
    return dict.fromkeys(CACHES, (HALF, (None, 1, None, 1, item.context)))


def _list_outputs(item: Transformer) -> Wanted:
    logits: Wanted = {LOGITS: (HALF, (1, 1, item.length, None) if item.kind == EXTEND else ())}
    if not _is_functional(item):
        return logits
    new: Wanted = dict.fromkeys(NEW, (HALF, (None, 1, None, 1, item.length)))
    return new | logits if item.kind == EXTEND else new


def _compare(ports: tuple[Port, ...], wanted: Wanted) -> Iterator[str]:
    """How ports differ from those wanted; more of them than wanted are no difference."""
    for name, (dtypes, shape) in wanted.items():
        form = find_form(ports, name)
        if form is None:
            there = ", ".join(port.name for port in ports) or "none"
            yield f"'{name}' is missing, there are: {there}"
        elif form.dtype not in dtypes:
            yield f"'{name}' is {form.dtype}, not {' or '.join(dtypes)}"
        elif not _fits(form.shape, shape):
            yield f"'{name}' is {show_shape(form.shape)}, not {show_shape(shape)}"


def _fits(shape: Shape, wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(
        size in (None, known) or known is None for size, known in zip(wanted, shape, strict=True)
    )


CONTRACT_RULES = (_structure, _ports, _contexts, _ladder, _one_model, _caches, _layouts)
