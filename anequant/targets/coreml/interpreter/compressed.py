"""The compressed constants of a package as they are on disk: codes, what they mean, and where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from anequant.targets.coreml.interpreter.constants import Constant
from anequant.targets.coreml.storage import Palettized


@dataclass(frozen=True)
class CompressedWeight:
    """A constant that is codes into a codebook, integers, or either of them times scales.

    codes     uint8, or where there is no codebook, the integers
    codebook  (.., entries, width) in its own type, or None
    scale     one for each block of codes, or None
    place     of the codes in the weight file, or None where they are so few that the model file holds them
    """

    codes: np.ndarray[Any, Any]
    codebook: np.ndarray[Any, Any] | None
    scale: np.ndarray[Any, Any] | None
    place: int | None


def compressed_constants(
    block: Any, constants: Mapping[str, Constant]
) -> Iterator[tuple[str, CompressedWeight]]:
    """(name of its value, content) of every such constant of a MIL_pb2.Block, read from disk each time.

    A lookup table's result that is scaled is part of the scaled constant, not one of its own.
    """
    made = {operation.outputs[0].name: operation for operation in block.operations if operation.outputs}
    blocks = [operation for operation in made.values() if operation.type == "constexpr_blockwise_shift_scale"]
    scaled = {operation.inputs["data"].arguments[0].name for operation in blocks}
    for name, operation in made.items():
        table = operation.type == "constexpr_lut_to_dense" and name not in scaled
        if not table and operation not in blocks:
            continue
        parts = constants[name].parts
        value = (constants[name] if table else parts["data"]).load()
        scale = None if table else parts["scale"].load()
        assert isinstance(value, (Tensor, Palettized))
        codes, codebook = (value.codes, value.codebook) if isinstance(value, Palettized) else (value, None)
        yield (
            name,
            CompressedWeight(
                codes.numpy(),
                None if codebook is None else codebook.numpy(),
                scale.numpy() if isinstance(scale, Tensor) else None,
                _place(operation, made),
            ),
        )


def _place(operation: Any, made: Mapping[str, Any]) -> int | None:
    key = "indices" if operation.type == "constexpr_lut_to_dense" else "data"
    binding = operation.inputs[key].arguments[0]
    if binding.WhichOneof("binding") == "name":
        return _place(made[binding.name], made)
    return binding.value.blobFileValue.offset if binding.value.HasField("blobFileValue") else None
