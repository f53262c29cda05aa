"""Rules about the sums of a convolution, which the engine holds in fixed point.

The accumulator is Q15.16: a partial sum of 32768 or more is lost, whatever would follow (measured on M4 and
M6). In any order of the inputs a row's partial sums stay below sum |w| * max |x| + |bias|, so inputs of up
to (32768 - |bias|) / sum |w| are safe. RMSNorm gives inputs whose root mean square is one, so some are at
least one: where less than that is safe, nothing guards even a normalised input, and that is a finding. Above
it the data decides (see `headroom.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from anequant.targets.coreml.graph import BLOCKS, LUT, Graph, Node
from anequant.targets.coreml.interpreter.operators import OPERATORS
from anequant.targets.coreml.lint.chips import Chip
from anequant.targets.coreml.storage import Palettized
from anequant.targets.shared.finding import WARNING, Hit, rule
from anequant.targets.shared.headroom import LARGEST_SUM

LEAST_INPUT = 1.0


def read_weight(graph: Graph, node: Node) -> Tensor | None:
    """The float32 values of a const or of a constexpr over codes or blocks; None for any other."""
    if node.kind == "const":
        value = graph.literal(node)
        return value.float() if isinstance(value, Tensor) else None
    if node.kind not in (LUT, BLOCKS) or not node.inputs:
        return None
    arguments = {}
    for name in node.inputs:
        source = graph.source(node, name)
        operand = graph.value(node, name) if source is None else read_weight(graph, source)
        if not isinstance(operand, Tensor):
            return None
        arguments[name] = int(operand) if name == "vector_axis" else operand
    values = OPERATORS[node.kind](**arguments)
    return values.dense(torch.float32) if isinstance(values, Palettized) else values.float()


def _largest_row(graph: Graph, node: Node, room: float) -> float:
    """The largest sum of magnitudes in a row of a convolution's weight; 0.0 for an unknown weight.

    Where the codebook's largest entry alone shows that no sum fills the `room`, this is that bound.
    """
    weight = graph.source(node, "weight")
    if weight is None or not weight.constant:
        return 0.0
    if weight.kind == LUT and isinstance(table := graph.value(weight, "lut"), Tensor):
        bound = float(table.abs().max()) * math.prod(size or 1 for size in weight.outputs[0].shape[1:])
        if bound * LEAST_INPUT < room:
            return bound
    values = read_weight(graph, weight)
    return 0.0 if values is None else float(values.flatten(1).abs().sum(1).max())


@rule(
    "N1",
    WARNING,
    "the accumulator is fixed point and overflows at 32768, in any partial sum (M4, M6)",
    "move a power of two from codebook to scales",
)
def _accumulators(graph: Graph, chip: Chip) -> Iterator[Hit]:
    for node in graph.of_kind("conv"):
        bias = graph.value(node, "bias")
        room = LARGEST_SUM - (float(bias.abs().max()) if isinstance(bias, Tensor) else 0.0)
        largest = _largest_row(graph, node, room)
        if largest * LEAST_INPUT >= room:
            safe = f"inputs up to {room / largest:.2g} are safe" if room > 0 else "the bias leaves no room"
            yield Hit(node.name, f"a row of magnitudes adds up to {largest:.0f}: {safe}")


SUM_RULES = (_accumulators,)
