"""A model as Core ML programs: embeddings and head here, decoder chunks in `decoder.py`.

Inputs, outputs, functions and the state are ANEMLL's, so its runtimes run the packages unchanged
(H hidden size, C context, B prefill batch, V vocab):

    embeddings  input_ids int32 [1, 1] or [1, B]                      hidden_states [1, S, H]
    chunk       hidden_states [1, S, H], position_ids int32 [S],      output_hidden_states [1, S, H]
                causal_mask [1, 1, S, C], current_pos int32 [1],
                state (2 * layers, kv heads, C, head_dim)
    head        hidden_states [1, 1, H]                               logits1 ... N [1, 1, V / N],
                                                                      or argmax_idx int32 [N] within each
                                                                      part and argmax_val [N]

A chunk has two functions over one state and one copy of the weights: `infer` (S = 1) and `prefill`
(S = B). Only the last chunk's `infer` ends in the final norm, and its `prefill` returns one position,
because after prefill only the state matters.
"""

from __future__ import annotations

import numpy as np

from anequant.architectures.spec import EMBEDDING, HEAD, ModelSpec
from anequant.quantization.linear import FloatTable, QuantizedLinear
from anequant.targets.coreml.program.linears import (
    StoredLinear,
    float_linear,
    linear,
    name_head_part,
    pack_codes,
    palettize_weight,
)
from anequant.targets.coreml.program.program import (
    Var,
    build_program,
    float16_constant,
    identifier,
    to_channels,
)
from anequant.targets.coreml.program.streaming import stream_constant
from anequant.targets.coreml.toolkit import TARGET, Function, Program, ct, get_new_symbol, mb, types
from anequant.targets.shared.packed_codes import take_rows


def embeddings_program(table: QuantizedLinear | FloatTable, batch: int) -> Program:
    """Token ids to hidden states: a gather from a float16 [V, H] or palettized table."""
    length = get_new_symbol()
    tokens = mb.placeholder((1, length), dtype=types.int32)
    with Function({"input_ids": tokens}, opset_version=TARGET) as function:
        ids = function.inputs["input_ids"]
        name = identifier(EMBEDDING)
        if isinstance(table, QuantizedLinear):
            weight = palettize_weight(pack_codes(table), table.codebook, name, name)
            rows = mb.gather(x=weight, indices=ids, axis=0, validate_indices=False, name=f"{name}_rows")
            scales = float16_constant(table.output_scale, (len(table.output_scale), 1), f"{name}_scales")
            scale = mb.gather(x=scales, indices=ids, axis=0, validate_indices=False, name=f"{name}_row_scale")
            hidden = mb.mul(x=rows, y=scale, name="hidden_states")
        else:
            weight = stream_constant(table.shape, table.blocks, f"{name}_weight")
            hidden = mb.gather(x=weight, indices=ids, axis=0, validate_indices=False, name="hidden_states")
        function.set_outputs([hidden])
    shapes = ct.EnumeratedShapes([[1, 1], [1, batch]], default=[1, 1])
    function.input_types = [ct.TensorType("input_ids", shape=shapes, dtype=np.int32)]
    return build_program({"main": function})


def head_program(spec: ModelSpec, head: QuantizedLinear | FloatTable, parts: int, *, argmax: bool) -> Program:
    """Final hidden state to logits, in `parts` equal convolutions, or to the best token of each part."""
    rows = spec.vocab_size // parts
    with Function(
        {"hidden_states": mb.placeholder((1, 1, spec.hidden_size), dtype=types.fp16)}, opset_version=TARGET
    ) as function:
        x = to_channels(function.inputs["hidden_states"])
        logits = []
        name = identifier(HEAD)
        codes = pack_codes(head) if isinstance(head, QuantizedLinear) else None
        for part in range(parts):
            rows_of_part = slice(part * rows, (part + 1) * rows)
            label = name_head_part(part + 1)
            if isinstance(head, QuantizedLinear):
                assert codes is not None
                piece = take_rows(head, rows_of_part)
                y = linear(x, StoredLinear(piece, codes[rows_of_part], label, name))
            else:
                y = float_linear(x, head.part(rows_of_part), label)
            logits.append(mb.reshape(x=y, shape=[1, 1, rows], name=f"logits{part + 1}"))
        function.set_outputs(_best_of_parts(logits) if argmax else logits)
    return build_program({"main": function})


def _best_of_parts(logits: list[Var]) -> list[Var]:
    """argmax_idx int32 [N] and argmax_val float16 [N] of N parts (1, 1, rows)."""
    choices, values = [], []
    for part in logits:
        choice = mb.reduce_argmax(x=part, axis=2, keep_dims=False, name=f"{part.name}_choice")
        choices.append(mb.squeeze(x=choice, axes=[0], name=f"{part.name}_index"))
        value = mb.reduce_max(x=part, axes=[2], keep_dims=False, name=f"{part.name}_best")
        values.append(mb.squeeze(x=value, axes=[0], name=f"{part.name}_value"))
    return [
        mb.concat(values=choices, axis=0, name="argmax_idx"),
        mb.concat(values=values, axis=0, name="argmax_val"),
    ]
