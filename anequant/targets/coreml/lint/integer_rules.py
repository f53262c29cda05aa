"""Rules about constants that are integers times scales."""

from __future__ import annotations

from collections.abc import Iterator

from anequant.targets.coreml.graph import BLOCKS, LUT, Graph, Node
from anequant.targets.coreml.lint.rule import ERROR, NOTE, WARNING, Chip, Hit, Rule
from anequant.targets.coreml.signatures import tensor_spec

AFFINE = "constexpr_affine_dequantize"


def _one_scale_a_row(rows: int | None, scale: tuple[int | None, ...]) -> bool:
    return all(size == 1 for size in scale[1:]) and (not scale or scale[0] in (1, rows))


def _scale_axes(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(BLOCKS):
        scale = graph.shape(node, "scale")
        if not _one_scale_a_row(node.outputs[0].shape[0], scale):
            yield Hit(node.name, f"scales of shape {list(scale)}, neither one nor one an output channel")
    for node in graph.of_kind(AFFINE):
        attributes = node.proto.attributes
        axis = attributes["axis"].immediateValue.tensor.ints.values[0]
        if tensor_spec("scale", attributes["scale"].type).shape and axis != 0:
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


def _scaled_codebooks(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(BLOCKS):
        source = graph.source(node, "data")
        if source is not None and source.kind == LUT and not _is_integer_weight(graph, node):
            yield Hit(node.name, "a scale on a lookup table inside a constant")


INTEGER_RULES = (
    Rule(
        "N4",
        WARNING,
        "the engine may sum before it scales (ANEMLL Forge); slower than float16 on M5 (cadamcat)",
        "multiply after the convolution",
        _scaled_codebooks,
    ),
    Rule(
        "W1",
        ERROR,
        "scales inside a constant may vary over output channels only, else the operation leaves the engine "
        "(Apple, opt-quantization-perf; cadamcat, coreml-grouped-scale-cpu)",
        "multiply explicitly, or run it on the GPU",
        _scale_axes,
    ),
    Rule(
        "W8",
        NOTE,
        "direct integers beat float16 on M5 (cadamcat) and ran on the CPU on M4 (kasper0406)",
        "measure there, or use a lookup table",
        _integers,
    ),
)
