"""What every written checkpoint takes over from its source, and says of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.calibration.shares import count_shares
from anequant.checkpoints.side_files import find_custom_code
from anequant.checkpoints.source import Source
from anequant.jobs.output_folder import hash_files
from anequant.recipe import Calibration


def source_record(source: Source, files: list[str]) -> dict[str, Any]:
    """Return the source by name, revision, the hashes of its `files` and the code that was ignored; no folder
    is named."""
    return {
        "name": source.name,
        "repo": source.repo,
        "revision": source.revision,
        "ignored": list(find_custom_code(source.folder)),
        "files": hash_files(source.folder, files),
    }


def calibration_record(calibration: Calibration, tokens: Tensor | None) -> dict[str, Any] | None:
    """Return what the manifest says of the tokens, None for a recipe that needs none; no folder is named.

    The threads belong to it: sums over tokens round differently when more of them share the work.
    """
    if tokens is None:
        return None
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    names = [Path(source).name for source in calibration.sources]
    shares = count_shares(calibration) if len(names) > 1 else (len(tokens),)
    weights = calibration.weights or (1.0,) * len(names)
    return {
        "source": ", ".join(names),
        "sources": [
            {"name": name, "weight": weight, "windows": share}
            for name, weight, share in zip(names, weights, shares, strict=True)
        ],
        **{key: getattr(calibration, key) for key in ("samples", "length", "seed", "chat")},
        "windows": len(tokens),
        "tokens_sha256": digest,
        "threads": torch.get_num_threads(),
    }
