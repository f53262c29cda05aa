"""Rules about how constants are compressed and scaled: lookup tables, integers, and what neither is."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from anequant.quantization.codebook import count_code_bits
from anequant.targets.coreml.graph import BLOCKS, LUT, Graph, Node
from anequant.targets.coreml.lint.chips import Chip
from anequant.targets.coreml.signatures import read_tensor_spec
from anequant.targets.shared.finding import ERROR, NOTE, WARNING, Hit, rule

AFFINE = "constexpr_affine_dequantize"
SPARSE_TABLES = {"constexpr_lut_to_sparse", "constexpr_sparse_blockwise_shift_scale"}
KNOWN = {LUT, BLOCKS, AFFINE, "constexpr_sparse_to_dense", *SPARSE_TABLES}
CHANNELS_A_LUT = 8
LONGEST_VECTOR = 16
VALUES_OF_A_ROW, VALUES_OF_A_TENSOR = 16, 256
"""What 4-bit and 8-bit codes hold: rows within the one in a tensor beyond the other share scaled codes."""


def _lut_shape(graph: Graph, node: Node) -> tuple[list[int], int, int]:
    """Groups along each axis, entries and length of an entry; ([], 1, 1) for the form of iOS 16."""
    sizes = [size or 0 for size in graph.shape(node, "lut")] or [1, 1]
    return sizes[:-2], sizes[-2], sizes[-1]


@rule(
    "W2",
    WARNING,
    "one table a tensor takes 14.8 ms where one a channel takes 59 (Apple, OPT-1.3B)",
    "use one codebook for the tensor",
)
def _lut_groups(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(LUT):
        groups, _, _ = _lut_shape(graph, node)
        rows = node.outputs[0].shape[0] or 0
        if math.prod(groups[1:]) > 1:
            if groups[0] == 1:
                yield Hit(node.name, f"{math.prod(groups)} lookup tables over input channels", ERROR)
        elif groups and groups[0] > 1:
            few = groups[0] <= rows // CHANNELS_A_LUT
            yield Hit(
                node.name, f"{groups[0]} lookup tables for {rows} output channels", None if few else ERROR
            )


@rule(
    "W4",
    ERROR,
    "tables over blocks of both axes fail to compile (CoreML-LLM, ANEC -14)",
    "use one codebook for the tensor",
)
def _lut_blocks(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(LUT):
        groups, _, _ = _lut_shape(graph, node)
        if groups and groups[0] > 1 and math.prod(groups[1:]) > 1:
            yield Hit(node.name, f"{math.prod(groups)} lookup tables over blocks")


@rule(
    "W5",
    ERROR,
    "tables of vectors run along output channels, up to 16 of them, and one a tensor",
    "use one table along axis 0",
)
def _lut_vectors(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(LUT):
        groups, _, length = _lut_shape(graph, node)
        axis = graph.value(node, "vector_axis")
        if length > 1 and (math.prod(groups) > 1 or (isinstance(axis, Tensor) and int(axis) != 0)):
            yield Hit(node.name, "a table of vectors in groups or along the input")
        elif length > LONGEST_VECTOR:
            yield Hit(node.name, f"a table of vectors of {length}, at most {LONGEST_VECTOR} run")


@rule("W3", NOTE, "the hardware reads 3 bits as 4 and 6 as 8", "the file is smaller all the same")
def _widths(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(LUT):
        _, entries, _ = _lut_shape(graph, node)
        if entries in (8, 64):
            bits = count_code_bits(entries)
            yield Hit(node.name, f"{bits} bits are read as {4 if bits == 3 else 8}")


@rule("W6", WARNING, "sparse tables are larger and slower on the engine", "leave weights dense")
def _sparse_tables(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(*SPARSE_TABLES):
        yield Hit(node.name, node.kind)


@rule(
    "W7",
    NOTE,
    "the engine is known to expand float tables, integers with scales and sparse constants only",
    "check the placement on a Mac (anequant profile)",
)
def _unusual_constants(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.nodes:
        if node.kind.startswith("constexpr_") and node.kind not in KNOWN:
            yield Hit(node.name, node.kind)
        elif node.kind == LUT and (source := graph.source(node, "lut")) is not None and source.constant:
            yield Hit(node.name, "a lookup table that is itself quantized")


@rule(
    "W9",
    WARNING,
    "one codebook fits rows of all sizes badly (Apple, OPT-1.3B: perplexity 21.6, scaled 18.7), "
    "and coremltools' fuse_conv_scale folds scales away",
    "keep a scale as a mul after the convolution",
)
def _folded_scales(graph: Graph, chip: Chip) -> Iterator[Hit]:
    """A convolution with one codebook whose result no vector multiplies, or float rows of few values each.

    Of the first, the program cannot say whether a scale was folded in before clustering or never existed.
    """
    for node in graph.of_kind("conv"):
        weight = graph.source(node, "weight")
        if weight is not None and weight.kind == LUT and not _is_scaled(graph, node):
            yield Hit(node.name, "a palettized convolution without an output scale")
        elif weight is not None and weight.kind == "const" and _rows_of_few_values(graph.literal(weight)):
            yield Hit(node.name, "a float convolution of scaled codes: few values a row, many in all")


def _is_scaled(graph: Graph, conv: Node) -> bool:
    shape = (1, conv.outputs[0].shape[1], 1, 1)
    sources = [
        graph.source(user, side)
        for user in graph.consumers(conv)
        if user.kind == "mul"
        for side in ("x", "y")
    ]
    return any(
        source is not None and source.constant and source.outputs[0].shape == shape for source in sources
    )


def _rows_of_few_values(weight: Tensor | str) -> bool:
    """Weight [out, in, ...], too short a row telling nothing. One row of many values ends the search."""
    if isinstance(weight, str) or weight.ndim < 2 or weight[0].numel() < 4 * VALUES_OF_A_ROW:
        return False
    seen: set[float] = set()
    for row in weight.flatten(1):
        values = set(row.tolist())
        if len(values) > VALUES_OF_A_ROW:
            return False
        seen |= values
    return len(seen) > VALUES_OF_A_TENSOR


@rule(
    "W10",
    ERROR,
    "palettize_weights' global_config also rounds scale vectors",
    "palettize convolutions only (op_type_configs)",
)
def _palettized_scales(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("mul", "add", "layer_norm"):
        for names in node.inputs.values():
            source = graph.producer.get(names[0] or "")
            if source is not None and source.kind == LUT:
                yield Hit(node.name, f"a palettized operand of {node.kind}")


@rule("W11", WARNING, "this weight is four times as large as its neighbours", "quantize it")
def _dense_among_palettized(graph: Graph, chip: Chip) -> Iterator[Hit]:
    kinds = {
        node.name: source.kind
        for node in graph.of_kind("conv")
        if (source := graph.source(node, "weight")) is not None
    }
    if LUT in kinds.values():
        for name, kind in kinds.items():
            if kind == "const" and not _is_hadamard(graph.value(graph.producer[name], "weight")):
                yield Hit(name, "a float16 convolution among palettized ones")


def _is_hadamard(weight: Tensor | str | None) -> bool:
    """Whether entries have one magnitude and rows are orthogonal, in the first group at least."""
    if not isinstance(weight, Tensor) or not bool((weight.abs() == weight.abs().max()).all()):
        return False
    signs = weight.flatten(1)[: weight.shape[1]].float().sign()
    return torch.equal(signs @ signs.T, signs.shape[1] * torch.eye(len(signs)))


def _one_scale_a_row(rows: int | None, scale: tuple[int | None, ...]) -> bool:
    return all(size == 1 for size in scale[1:]) and (not scale or scale[0] in (1, rows))


@rule(
    "W1",
    ERROR,
    "scales inside a constant may vary over output channels only, else the operation leaves the engine "
    "(Apple, opt-quantization-perf; cadamcat, coreml-grouped-scale-cpu)",
    "multiply explicitly, or run it on the GPU",
)
def _scale_axes(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(BLOCKS):
        scale = graph.shape(node, "scale")
        if not _one_scale_a_row(node.outputs[0].shape[0], scale):
            yield Hit(node.name, f"scales of shape {list(scale)}, neither one nor one an output channel")
    for node in graph.of_kind(AFFINE):
        attributes = node.proto.attributes
        axis = attributes["axis"].immediateValue.tensor.ints.values[0]
        if read_tensor_spec("scale", attributes["scale"].type).shape and axis != 0:
            yield Hit(node.name, f"scales along axis {axis} of a weight")


def _is_integer_weight(graph: Graph, weight: Node) -> bool:
    """Whether a weight is integers times one scale and multiplies 8-bit inputs only (W8A8, W4A8)."""
    source = graph.source(weight, "data")
    integers = source is None or source.outputs[0].dtype == "int8"
    one = all(size == 1 for size in graph.shape(weight, "scale"))
    users = graph.consumers(weight)
    inputs = [graph.source(user, "x") for user in users if user.kind == "conv"]
    rounded = [node for node in inputs if node is not None and node.kind == "dequantize"]
    return integers and one and len(rounded) == len(users)


@rule(
    "W8",
    NOTE,
    "direct integers beat float16 on M5 (cadamcat) and ran on the CPU on M4 (kasper0406)",
    "measure there, or use a lookup table",
)
def _integers(graph: Graph, chip: Chip) -> Iterator[Hit]:
    if chip.integers:
        return
    for node in graph.of_kind("conv", "linear"):
        weight = graph.source(node, "weight")
        if weight is None or weight.kind != BLOCKS or graph.source(weight, "data") is not None:
            continue
        rows, scale = weight.outputs[0].shape[0], graph.shape(weight, "scale")
        if _one_scale_a_row(rows, scale) and not _is_integer_weight(graph, weight):
            yield Hit(node.name, "an integer weight without a lookup table")


@rule(
    "N4",
    WARNING,
    "the engine may sum before it scales (ANEMLL Forge); slower than float16 on M5 (cadamcat)",
    "multiply after the convolution",
)
def _scaled_codebooks(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(BLOCKS):
        source = graph.source(node, "data")
        if source is not None and source.kind == LUT and not _is_integer_weight(graph, node):
            yield Hit(node.name, "a scale on a lookup table inside a constant")


WEIGHT_RULES = (
    _lut_groups,
    _widths,
    _lut_blocks,
    _lut_vectors,
    _sparse_tables,
    _unusual_constants,
    _folded_scales,
    _palettized_scales,
    _dense_among_palettized,
    _scaled_codebooks,
    _scale_axes,
    _integers,
)
