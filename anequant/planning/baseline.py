"""What a process holds before a job's own data, and whether a job stays within --max-memory."""

from __future__ import annotations

import torch

from anequant.architectures.spec import EMBEDDING, ModelSpec
from anequant.checkpoints.reader import Checkpoint
from anequant.jobs.process import resident_bytes
from anequant.planning import memory
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.weight_format import WeightFormat
from anequant.recipe import Calibration
from anequant.reference.forward import ReferenceModel

SMALL = 256
"""A weight's rows and columns, enough for every loop to run once."""


def base_bytes(spec: ModelSpec) -> int:
    """Resident bytes of this process once everything that a run imports is there, the model without weights,
    and what libraries keep from their first use: a BLAS's buffers, and compiled loops."""
    ReferenceModel(spec, torch.float32)
    for dtype in (torch.float32, torch.float64):
        square = torch.ones(SMALL, SMALL, dtype=dtype)
        _ = square @ square
    small = torch.linspace(-1, 1, SMALL * SMALL).view(SMALL, SMALL)
    quantize_linear(small, None, WeightFormat(4, "lut", "balanced"), "none")
    return resident_bytes()


def samples_resident(
    checkpoint: Checkpoint, calibration: Calibration, max_memory: int | None, base: int
) -> bool:
    """Whether the model stays in memory while it writes its own calibration text."""
    if max_memory is None:
        return True
    dtype = checkpoint.tensors[f"{EMBEDDING}.weight"].dtype
    return memory.resident(base, memory.sampling(checkpoint.spec, calibration, dtype)) <= max_memory
