"""Tokens that a check runs on when nobody names any."""

from __future__ import annotations

import torch
from torch import Tensor

from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.source import SAMPLE_TEXT, has_tokenizer
from anequant.reference.windows import load_tokenizer, model_windows, read_text

SEED = 7
RANGE_TOKENS = 128
"""That magnitudes are looked at on, for what packages have to hold."""

PREFILL_TOKENS, DECODE_TOKENS = 64, 64
"""That packages are compared on, at once and one after the other; at most, and as batch and context allow."""


def probe_tokens(checkpoint: Checkpoint, length: int) -> Tensor:
    """The start of the bundled text, or random tokens for a checkpoint without a tokenizer: [length]."""
    if has_tokenizer(checkpoint.folder):
        text = read_text(SAMPLE_TEXT)
        text *= length // len(text.split()) + 1
        tokenizer = load_tokenizer(checkpoint.folder)
        return model_windows(tokenizer, checkpoint.spec.config, text, count=1, length=length)[0]
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(checkpoint.spec.vocab_size, (length,), generator=generator)
