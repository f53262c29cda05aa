"""Rules about the values of a function: their shapes, their types, and numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Iterator

from anequant.quantization.nearest import LARGEST_FLOAT16
from anequant.targets.coreai.lint.linted import show_shape
from anequant.targets.coreai.listing import CONSTANT, ListedFunction
from anequant.targets.shared.finding import ERROR, WARNING, Hit, rule

MOST_AXES = 5
ROW = 64
"""Bytes that a last axis is padded to."""

WIDE = {"float32", "float64", "bfloat16", "complex64", "int64", "uint64"}
WHOLE = {"int32", "uint32"}
POSITIONS = {
    *("cast", "reshape", "expand_dims", "shrink_dims", "concat", "slice", "add", "sub", "mul", "gather_nd"),
    *("gather_along_axis", "transpose", "get_shape", "output", "copy_with_constraints"),
    *("copy_discarding_constraints", "broadcast_to", "split", "where"),
}
"""What token ids, positions and places in caches go through, not on the engine in any case."""


@rule(
    "CS1",
    ERROR,
    "values of more than five axes are refused (apple/coreai-models, neural_engine_rules.md)",
    "reshape axes of one away",
)
def _rank(function: ListedFunction) -> Iterator[Hit]:
    for operation in function.computing():
        rank = max((len(function.forms[number].shape) for number in operation.results), default=0)
        if rank > MOST_AXES:
            yield Hit(function.call(operation), f"{operation.kind} of rank {rank}")


@rule(
    "CS2",
    ERROR,
    "shapes must be static, one function for each (apple/coreai-models, neural_engine_rules.md)",
    "specialize the function (AIProgram.set_static_shape_config)",
)
def _static(function: ListedFunction) -> Iterator[Hit]:
    """The first open value; what follows from it is open too. A helper may be a form of static copies: where
    one is called as it is, values of the caller are open."""
    if not function.public:
        return
    for port in (*function.inputs, *function.states, *function.outputs):
        if None in port.form.shape:
            yield Hit(port.name, f"an axis of any length in {show_shape(port.form.shape)}")
            return
    for operation in function.operations:
        for number in operation.results:
            if None in function.forms[number].shape:
                shape = show_shape(function.forms[number].shape)
                yield Hit(function.call(operation), f"{operation.kind} of {shape}, computed from values")
                return


@rule(
    "CS3",
    WARNING,
    "a last axis of one is padded to 64 bytes (apple/coreai-models, neural_engine_rules.md)",
    "transpose a longer axis to the end",
)
def _last_axis(function: ListedFunction) -> Iterator[Hit]:
    for port in (*function.inputs, *function.states, *function.outputs):
        shape = port.form.shape
        if len(shape) > 1 and shape[-1] == 1 and port.form.values > 1:
            held = ROW * 8 // max(port.form.bits, 1)
            yield Hit(port.name, f"{show_shape(shape)}, held as {held} times as much")


@rule(
    "CS5",
    ERROR,
    "an axis of zero aborts the load on the GPU and the engine (ultralytics/ultralytics, pull 25926)",
    "leave the part out",
)
def _empty(function: ListedFunction) -> Iterator[Hit]:
    for operation in function.computing():
        for number in operation.results:
            if 0 in function.forms[number].shape:
                shape = show_shape(function.forms[number].shape)
                yield Hit(function.call(operation), f"{operation.kind} of {shape}")


@rule(
    "CD1",
    ERROR,
    "the engine computes in float16, int8 and int16 (apple/coreai-models, neural_engine_rules.md)",
    "make constants and casts float16",
)
def _types(function: ListedFunction) -> Iterator[Hit]:
    for port in (*function.inputs, *function.states):
        if port.form.dtype in WIDE:
            yield Hit(port.name, f"{port.form.dtype}, which a GPU or the CPU takes")
    for operation in function.operations:
        for number in operation.results:
            form = function.forms[number]
            if form.dtype in WIDE:
                yield Hit(function.call(operation), f"{operation.kind} in {form.dtype}")
            elif form.dtype in WHOLE and operation.kind not in (*POSITIONS, CONSTANT):
                yield Hit(function.call(operation), f"{operation.kind} in {form.dtype}", WARNING)


@rule(
    "CD2",
    ERROR,
    "the engine's softmax takes no infinity (apple/coreai-models, neural_engine_rules.md)",
    "use -40000",
)
def _infinities(function: ListedFunction) -> Iterator[Hit]:
    """Constants of the program itself; CF5 has those among the blobs."""
    for operation in function.of_kind(CONSTANT):
        form = function.result(operation)
        if operation.given is None or operation.given.ends is None or form is None:
            continue
        if form.dtype not in ("float16", "float32"):
            continue
        low, high = operation.given.ends
        if not (math.isfinite(low) and math.isfinite(high)):
            yield Hit(function.call(operation), f"a constant from {low:g} to {high:g}")
        elif low <= -LARGEST_FLOAT16:
            detail = f"a constant of {low:g}, infinite with any score below it"
            yield Hit(function.call(operation), detail, WARNING)


VALUE_RULES = (_rank, _static, _last_axis, _empty, _types, _infinities)
