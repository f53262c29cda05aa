"""The constants of an asset as its functions use them, each counted once, and those that make up a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from anequant.targets.coreai.design import CODEBOOK, CODES, PLAIN, WIDTHS, Constant
from anequant.targets.coreai.listing import CONSTANT, Form, ListedFunction, Operation

MULTIPLIED, LOOKED_UP = "multiplied", "looked up"
PRODUCTS = {"conv2d", "conv3d", "batch_matmul"}
LOOKING = {"gather_nd", "gather_along_axis", "output"}
EXPANDED = {"lut_to_dense", "blockwise_shift_scale", "dequantize", "sparse_with_bitmask_to_dense"}
MOVED = {"reshape", "transpose", "cast", "expand_dims", "shrink_dims", "mul", "copy_with_constraints"}
"""What a weight goes through on its way, unchanged or scaled."""


@dataclass(frozen=True)
class Weight:
    """A weight by the name of what has an entry for each of its values.

    parts   names of all constants that are expanded to it, that one first
    tables  lookup tables, of `entries` each; 0 without
    use     multiplied, or looked up where functions take its rows or give it away
    """

    name: str
    form: Form
    parts: tuple[str, ...]
    tables: int
    entries: int
    use: str

    @property
    def title(self) -> str:
        return self.name.removesuffix(CODES).removesuffix(PLAIN)


def list_forms(functions: Sequence[ListedFunction]) -> dict[str, Form]:
    """The form of every constant among the blobs, by name."""
    found = {}
    for function in functions:
        for operation in function.of_kind(CONSTANT):
            form = function.result(operation)
            if operation.given is not None and operation.given.name and form is not None:
                found[operation.given.name] = form
    return found


def list_weights(functions: Sequence[ListedFunction]) -> list[Weight]:
    """The weights of all functions, in order; what one multiplies by and another looks up is multiplied."""
    found: dict[str, Weight] = {}
    for function in functions:
        for operation in function.operations:
            if operation.kind in PRODUCTS | LOOKING:
                use = MULTIPLIED if operation.kind in PRODUCTS else LOOKED_UP
                for place in range(min(len(operation.operands), 2)):
                    weight = _trace(function, function.source(operation, place), use)
                    if weight is not None and (weight.name not in found or use == MULTIPLIED):
                        found[weight.name] = weight
    return list(found.values())


def list_designed_weights(constants: Mapping[str, Constant]) -> list[Weight]:
    """The weights of an asset that anequant wrote, told by the names of its constants."""
    found = []
    for name, constant in constants.items():
        form = Form(constant.dtype, constant.shape)
        use = LOOKED_UP if len(constant.shape) == 3 else MULTIPLIED
        if name.endswith(CODES):
            parts = (name, name.removesuffix(CODES) + CODEBOOK)
            found.append(Weight(name, form, parts, 1, 1 << constant.bits, use))
        elif name.endswith(PLAIN) and len(constant.shape) > 2 and constant.shape[0] > 1:
            found.append(Weight(name, form, (name,), 0, 0, use))
    return found


def is_readable(form: Form) -> bool:
    """Whether the numbers of a constant can be read: codes, integers of whole bytes and usual floats."""
    return form.dtype in (*WIDTHS.values(), "float16", "float32", "int8", "int16", "int32")


def _trace(function: ListedFunction, source: Operation | None, use: str) -> Weight | None:
    """The weight that a value is, None for one that is computed."""
    while source is not None and source.kind in MOVED:
        sources = [function.source(source, place) for place in range(len(source.operands))]
        source = next((item for item in sources if _is_weight_part(item)), None)
    if source is None:
        return None
    if source.kind == CONSTANT:
        name, form = _name(source), function.result(source)
        large = form is not None and len(form.shape) > 1 and sum((size or 1) > 1 for size in form.shape) > 1
        return Weight(name, form, (name,), 0, 0, use) if name and form is not None and large else None
    parts = tuple(dict.fromkeys(_list_parts(function, source)))
    data = _find_data(function, source)
    if not parts or data is None:
        return None
    tables, entries = _count_tables(function, source)
    return Weight(parts[0], data, parts, tables, entries, use)


def _is_weight_part(operation: Operation | None) -> bool:
    if operation is None:
        return False
    return operation.kind in EXPANDED | MOVED or (operation.kind == CONSTANT and bool(_name(operation)))


def _list_parts(function: ListedFunction, operation: Operation) -> Iterator[str]:
    """Names of the constants that are expanded, those of an inner expansion first."""
    for place in range(len(operation.operands)):
        source = function.source(operation, place)
        if source is not None and source.kind in EXPANDED:
            yield from _list_parts(function, source)
        elif source is not None and _name(source):
            yield _name(source)


def _find_data(function: ListedFunction, operation: Operation) -> Form | None:
    """The form of what has an entry for every value."""
    source = function.source(operation, 0)
    if source is not None and source.kind in EXPANDED:
        return _find_data(function, source)
    return function.operand(operation, 0)


def _count_tables(function: ListedFunction, operation: Operation) -> tuple[int, int]:
    """How many tables there are, and their entries."""
    while operation.kind != "lut_to_dense":
        source = function.source(operation, 0)
        if source is None or source.kind not in EXPANDED:
            return 0, 0
        operation = source
    form = function.operand(operation, 1)
    if form is None or len(form.shape) < 2:
        return 0, 0
    entries, width = form.shape[-2] or 1, form.shape[-1] or 1
    return form.values // (entries * width), entries


def _name(operation: Operation) -> str:
    return operation.given.name if operation.given is not None else ""
