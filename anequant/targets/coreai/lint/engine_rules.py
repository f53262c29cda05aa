"""Rules about operations and weights that the Neural Engine gets wrong, or leaves to another unit."""

from __future__ import annotations

import math
from collections.abc import Iterator

from anequant.targets.coreai.lint.linted import show_shape
from anequant.targets.coreai.listing import CONSTANT, ListedFunction, Operation
from anequant.targets.shared.finding import ERROR, NOTE, WARNING, Hit, rule

LONGEST_AXIS = 16384
TABLE, SCALED, CONVOLUTION, PRODUCT = "lut_to_dense", "blockwise_shift_scale", "conv2d", "batch_matmul"
WEIGHTS = {CONSTANT, TABLE, SCALED, "dequantize", "sparse_with_bitmask_to_dense"}
MOVED = {"reshape", "transpose", "cast", "expand_dims", "shrink_dims", "broadcast_to", "broadcast_in_dims"}


@rule(
    "CO1",
    ERROR,
    "argmax is wrong on an iPhone 17 Pro, without an error (apple/coreai-torch, issue 116)",
    "give logits, and choose in the host",
)
def _argmax(function: ListedFunction) -> Iterator[Hit]:
    for operation in function.of_kind("argmax", "reduce_index"):
        yield Hit(function.call(operation), operation.kind)


@rule(
    "CO2",
    WARNING,
    "a selection by sort and gather was wrong on an iPhone 17 Pro (apple/coreai-torch, issue 115)",
    "sort in the host",
)
def _sorting(function: ListedFunction) -> Iterator[Hit]:
    for operation in function.of_kind("sort", "argsort"):
        yield Hit(function.call(operation), operation.kind)


@rule(
    "CO3",
    WARNING,
    "the engine fuses no heads (apple/coreai-models, neural_engine_rules.md)",
    "emit a pair of products a head",
)
def _heads(function: ListedFunction) -> Iterator[Hit]:
    for operation in function.of_kind(PRODUCT):
        form = function.result(operation)
        together = math.prod(size or 1 for size in form.shape[:-2]) if form is not None else 1
        if together > 1:
            yield Hit(function.call(operation), f"a batch of {together} products at once")


@rule(
    "CO4",
    WARNING,
    "linears run best as 1x1 convolutions (apple/coreai-models, neural_engine_rules.md)",
    "emit conv2d",
)
def _linears(function: ListedFunction) -> Iterator[Hit]:
    for operation in function.of_kind(PRODUCT):
        if any(_is_weight(function, function.source(operation, place)) for place in (0, 1)):
            yield Hit(function.call(operation), f"{PRODUCT} with a constant weight")


@rule(
    "CO5",
    WARNING,
    "a kernel of Metal runs on the GPU (apple/coreai-torch, docs/guides/custom-metal-kernels)",
    "use the dialect's operations",
)
def _kernels(function: ListedFunction) -> Iterator[Hit]:
    for operation in function.of_kind("metal4_kernel"):
        yield Hit(function.call(operation), operation.kind)


@rule(
    "CS4",
    WARNING,
    "engines up to H15 hold axes of 16384 (hal_analysis of the H13 to H16 engines)",
    "split the rows, as into parts of the head",
)
def _axes(function: ListedFunction) -> Iterator[Hit]:
    for operation in function.of_kind(CONVOLUTION, PRODUCT):
        forms = [function.forms[number] for number in (*operation.operands[:2], *operation.results)]
        longest = max((size or 0 for form in forms for size in form.shape), default=0)
        if longest > LONGEST_AXIS:
            yield Hit(function.call(operation), f"{operation.kind} with an axis of {longest}")


@rule(
    "CW1",
    WARNING,
    "one table a tensor takes 14.8 ms where one a channel takes 59 (Apple, OPT-1.3B)",
    "use one table for the tensor",
)
def _tables(function: ListedFunction) -> Iterator[Hit]:
    for operation in function.of_kind(TABLE):
        form = function.operand(operation, 1)
        count = math.prod(size or 1 for size in form.shape[:-2]) if form is not None else 1
        if count > 1:
            yield Hit(function.call(operation), f"{count} tables")


@rule(
    "CW2",
    ERROR,
    "integers with a scale a block are wrong on the engine: a cosine of 0.367 where tables have 0.998 "
    "(apple/coreai-models, issue 279)",
    "use tables, and scales of output channels",
)
def _blocks(function: ListedFunction) -> Iterator[Hit]:
    for operation in function.of_kind(SCALED):
        weight, scale = function.operand(operation, 0), function.operand(operation, 1)
        if weight is None or scale is None or _is_made_of_table(function, operation, 0):
            continue
        if _in_blocks(scale.shape, weight.shape):
            yield Hit(function.call(operation), f"{weight.dtype} with scales {show_shape(scale.shape)}")


@rule(
    "CW3",
    ERROR,
    "scales of groups are mis-indexed where the weight is a table's (apple/coreai-torch, issue 93)",
    "multiply explicitly, before or after the convolution",
)
def _scaled_tables(function: ListedFunction) -> Iterator[Hit]:
    """A table's weight that is scaled inside; scales of output channels alone are a warning."""
    for operation in function.of_kind(SCALED, "mul", "dequantize"):
        weight = next((place for place in (0, 1) if _is_made_of_table(function, operation, place)), None)
        if weight is None or not _feeds_product(function, operation):
            continue
        form, scale = function.operand(operation, weight), function.operand(operation, 1 - weight)
        if form is None or scale is None:
            continue
        found = f"a table's weight with scales {show_shape(scale.shape)} inside"
        severe = None if _in_blocks(scale.shape, form.shape) else WARNING
        yield Hit(function.call(operation), found, severe)


@rule(
    "CW4",
    NOTE,
    "tables of vectors need newer engines (apple/coreai-models, neural_engine_rules.md)",
    "measure there",
)
def _vectors(function: ListedFunction) -> Iterator[Hit]:
    for operation in function.of_kind(TABLE):
        form = function.operand(operation, 1)
        if form is not None and form.shape and (form.shape[-1] or 1) > 1:
            yield Hit(function.call(operation), f"a table of vectors of {form.shape[-1]}")


def _is_weight(function: ListedFunction, source: Operation | None) -> bool:
    """Whether a value is a constant that only was moved or expanded."""
    while source is not None and source.kind in MOVED:
        source = function.source(source, 0)
    return source is not None and source.kind in WEIGHTS


def _is_made_of_table(function: ListedFunction, operation: Operation, place: int) -> bool:
    source = function.source(operation, place)
    while source is not None and source.kind in MOVED:
        source = function.source(source, 0)
    return source is not None and source.kind == TABLE


def _feeds_product(function: ListedFunction, operation: Operation) -> bool:
    """Whether a weight goes into a product, moved at most; a table of embeddings does not."""
    waiting = [user for number in operation.results for user in function.consumers.get(number, [])]
    while waiting:
        user = waiting.pop()
        if user.kind in (CONVOLUTION, PRODUCT):
            return True
        if user.kind in MOVED:
            waiting += [later for number in user.results for later in function.consumers.get(number, [])]
    return False


def _in_blocks(scale: tuple[int | None, ...], weight: tuple[int | None, ...]) -> bool:
    """Whether scales vary over blocks: over two axes of the weight, or fewer times than one is long."""
    varying = [(size or 1, whole) for size, whole in zip(scale, weight, strict=False) if (size or 1) > 1]
    return len(varying) > 1 or any(size != whole for size, whole in varying)


ENGINE_RULES = (
    _argmax,
    _sorting,
    _heads,
    _linears,
    _kernels,
    _axes,
    _tables,
    _blocks,
    _scaled_tables,
    _vectors,
)
