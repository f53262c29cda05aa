"""What this process holds, and whether a job stays within --max-memory."""

from __future__ import annotations

import importlib
import os
import resource
import sys
from pathlib import Path

import torch

from anequant.architectures.spec import EMBEDDING, ModelSpec
from anequant.calibration.forward import ReferenceModel
from anequant.checkpoints.reader import Checkpoint
from anequant.pipeline import memory
from anequant.recipe import Calibration

STATM = Path("/proc/self/statm")


def base_bytes(spec: ModelSpec) -> int:
    """Resident bytes of this process once everything that a run imports is there, and the model without
    weights."""

    importlib.import_module("anequant.pipeline.convert")
    ReferenceModel(spec, torch.float32)
    return resident_bytes()


def resident_bytes() -> int:
    """Now; where the system does not tell, the most so far."""
    try:
        return int(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def samples_resident(
    checkpoint: Checkpoint, calibration: Calibration, max_memory: int | None, base: int
) -> bool:
    """Whether the model stays in memory while it writes its own calibration text."""
    if max_memory is None:
        return True
    dtype = checkpoint.tensors[f"{EMBEDDING}.weight"].dtype
    return memory.resident(base, memory.sampling(checkpoint.spec, calibration, dtype)) <= max_memory
