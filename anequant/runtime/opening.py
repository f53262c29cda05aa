"""Opening a checkpoint as a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anequant.checkpoints.reader import open_checkpoint


def load(folder: str | Path, **options: Any) -> Any:
    """The transformers model of a checkpoint folder, float or quantized, as `from_pretrained` gives it after
    `import anequant`: with online rotations and rounded activations and cache where the checkpoint says so.

    `options` go to `from_pretrained`; weights keep the dtype they are stored in unless there is a `dtype`.
    Files are checked before transformers reads them, and no code of the checkpoint is run.
    Raises what `open_checkpoint` raises.
    """
    from transformers import AutoModelForCausalLM

    open_checkpoint(Path(folder))
    fixed = {"trust_remote_code": False, "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(str(folder), **{"dtype": "auto", **options, **fixed}).eval()
