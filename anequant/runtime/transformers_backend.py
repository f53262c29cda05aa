"""A checkpoint opened as a transformers model, and run with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.checkpoints.reader import open_checkpoint
from anequant.reference.windows import require_known
from anequant.runtime.cache import make_cache


def load(folder: str | Path, **options: Any) -> Any:
    """Open the transformers model of a checkpoint folder, float or quantized, as `from_pretrained` gives it
    after `import anequant`: with online rotations, rounded activations and cache where it says so.

    `options` go to `from_pretrained`; weights keep the dtype they are stored in unless there is a `dtype`.
    Files are checked before transformers reads them, and no code of the checkpoint is run.
    Raises what `open_checkpoint` raises.
    """
    from transformers import AutoModelForCausalLM

    open_checkpoint(Path(folder))
    fixed = {"trust_remote_code": False, "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(str(folder), **{"dtype": "auto", **options, **fixed}).eval()


class TransformersModel:
    """A Decoder over the folder of a float or quantized checkpoint; the whole model in float32.

    Fed tokens that it has no embedding for, it raises InputError.
    """

    tells_all_logits = True

    def __init__(self, folder: Path) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._model = load(folder, dtype=torch.float32)
        self.context = int(self._model.config.max_position_embeddings)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.position = 0
        self._cache = make_cache(self._model.config)

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens to the context; return logits float32 [vocab] for what follows them."""
        return self._run(tokens, 1)[0]

    def feed_each(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens to the context; return logits float32 [n, vocab] for what follows each of them."""
        return self._run(tokens, len(tokens))

    @torch.no_grad()
    def _run(self, tokens: Sequence[int], last: int) -> Tensor:
        require_known(tokens, self._model.config.vocab_size)
        output = self._model(
            torch.tensor([list(tokens)]), past_key_values=self._cache, use_cache=True, logits_to_keep=last
        )
        self.position += len(tokens)
        logits: Tensor = output.logits[0].float()
        return logits
