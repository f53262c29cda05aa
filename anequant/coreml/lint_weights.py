"""Rules about constants, scales and states."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from anequant.coreml.graph import Graph, Node
from anequant.coreml.lint import ERROR, NOTE, WARNING, Chip, Hit, Rule

LUT = "constexpr_lut_to_dense"
BLOCKS = "constexpr_blockwise_shift_scale"
SPARSE = {"constexpr_sparse_to_dense", "constexpr_lut_to_sparse", "constexpr_sparse_blockwise_shift_scale"}
CHANNELS_A_LUT = 8
MOST_STATES = 2
STATE_ALIGNMENT = 32
LARGEST_SUM = 32768.0
UPDATES = {"write_state", "coreml_update_state"}


def _lut_shape(graph: Graph, node: Node) -> tuple[int, ...]:
    return tuple(size or 0 for size in graph.shape(node, "lut"))


def _lut_groups(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(LUT):
        *groups, _, width = _lut_shape(graph, node) or (1, 1)
        shape = node.outputs[0].shape
        others = math.prod(groups[1:])
        if others > 1:
            what = "blocks" if groups[0] > 1 else "input channels"
            yield Hit(node.name, f"{math.prod(groups)} lookup tables over {what}", ERROR)
        elif groups and groups[0] > 1:
            few = groups[0] <= (shape[0] or 0) // CHANNELS_A_LUT
            yield Hit(
                node.name, f"{groups[0]} lookup tables for {shape[0]} output channels", None if few else ERROR
            )
        if width > 1 and math.prod(groups) > 1:
            yield Hit(node.name, "a vector table in groups", ERROR)


def _widths(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(LUT):
        entries = (_lut_shape(graph, node) or (0, 1))[-2]
        if entries in (8, 64):
            bits = entries.bit_length() - 1
            yield Hit(node.name, f"{bits} bits are read as {4 if bits == 3 else 8}")


def _scale_axes(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(BLOCKS):
        shape = graph.shape(node, "scale")
        if any((size or 0) > 1 for size in shape[1:]):
            yield Hit(node.name, f"scales of shape {list(shape)} along the input: it leaves the engine")


def _sparse(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind(*SPARSE):
        yield Hit(node.name, node.kind)


def _folded_scales(graph: Graph, chip: Chip) -> Iterator[Hit]:
    """A convolution with one codebook whose result no vector multiplies."""
    for node in graph.of_kind("conv"):
        weight = graph.source(node, "weight")
        if weight is None or weight.kind != LUT:
            continue
        scaled = any(
            user.kind == "mul" and _vector(graph, user, node.outputs[0].shape[1])
            for user in graph.consumers(node)
        )
        if not scaled:
            yield Hit(node.name, "a palettized convolution without an output scale")


def _vector(graph: Graph, node: Node, channels: int | None) -> bool:
    return any(
        (source := graph.source(node, side)) is not None
        and source.constant
        and source.outputs[0].shape == (1, channels, 1, 1)
        for side in ("x", "y")
    )


def _palettized_scales(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("mul", "add", "layer_norm"):
        for names in node.inputs.values():
            source = graph.producer.get(names[0] or "")
            if source is not None and source.kind == LUT:
                yield Hit(node.name, f"a palettized operand of {node.kind}")


def _dense_among_palettized(graph: Graph, chip: Chip) -> Iterator[Hit]:
    kinds = {
        node.name: source.kind
        for node in graph.of_kind("conv")
        if (source := graph.source(node, "weight")) is not None
    }
    if LUT in kinds.values():
        for name, kind in kinds.items():
            if kind == "const":
                yield Hit(name, "a float16 convolution among palettized ones")


def _accumulators(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("conv"):
        weight = graph.source(node, "weight")
        if weight is None or weight.kind != LUT:
            continue
        table = graph.value(weight, "lut")
        shape = weight.outputs[0].shape
        if isinstance(table, Tensor):
            bound = float(table.abs().max()) * math.prod(size or 1 for size in shape[1:])
            if bound > LARGEST_SUM:
                yield Hit(node.name, f"inputs of one may add up to {bound:.0f} of {LARGEST_SUM:.0f}")


def _states(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for state in graph.spec.states:
        if state.dtype != "fp16" or None in state.shape:
            yield Hit(state.name, f"a state in {state.dtype} of shape {list(state.shape)}")
    if len(graph.spec.states) > MOST_STATES:
        yield Hit(graph.function, f"{len(graph.spec.states)} states")


def _state_alignment(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for state in graph.spec.states:
        if (state.shape[-1] or 0) % STATE_ALIGNMENT:
            yield Hit(state.name, f"a last axis of {state.shape[-1]}")


def _state_updates(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.nodes:
        if node.kind in UPDATES:
            source = graph.source(node, "data") or graph.source(node, "value")
            if source is not None and source.kind == "concat":
                yield Hit(node.name, "a state shifted by concat")


WEIGHT_RULES = (
    Rule(
        "W1",
        ERROR,
        "scales inside a constant may vary over output channels only",
        "multiply explicitly",
        _scale_axes,
    ),
    Rule(
        "W2",
        WARNING,
        "one table a tensor takes 14.8 ms where one a channel takes 59 (Apple, OPT-1.3B)",
        "use one codebook for the tensor",
        _lut_groups,
    ),
    Rule(
        "W3", NOTE, "the hardware reads 3 bits as 4 and 6 as 8", "the file is smaller all the same", _widths
    ),
    Rule(
        "W6",
        WARNING,
        "sparse tables are larger and slower on the engine",
        "leave weights dense",
        _sparse,
    ),
    Rule(
        "W8",
        WARNING,
        "fuse_conv_scale folds an output scale into the weight, which then needs another codebook",
        "keep the scale as a mul after the convolution",
        _folded_scales,
    ),
    Rule(
        "W9",
        ERROR,
        "palettize_weights' global_config also rounds scale vectors",
        "palettize convolutions only (op_type_configs)",
        _palettized_scales,
    ),
    Rule(
        "W10",
        WARNING,
        "this weight is four times as large as its neighbours",
        "quantize it",
        _dense_among_palettized,
    ),
    Rule(
        "N1",
        WARNING,
        "the accumulator is fixed point and overflows at 32768, in any partial sum (M4, M6)",
        "move a power of two from codebook to scales",
        _accumulators,
    ),
    Rule(
        "T1",
        ERROR,
        "states are float16, static, and at most two a function",
        "use one state for all layers",
        _states,
    ),
    Rule(
        "T2",
        WARNING,
        "a state's last axis must divide by 32 (coremltools 2631)",
        "pad the head size",
        _state_alignment,
    ),
    Rule(
        "T3",
        ERROR,
        "shifting a state by concat fails to compile",
        "write a slice at the position",
        _state_updates,
    ),
)
