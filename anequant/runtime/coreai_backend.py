"""An asset of Core AI as a Decoder: Apple's runtime in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from anequant.reference.windows import require_known
from anequant.runtime.generate import check_fits
from anequant.targets.coreai.bundle import find_asset, read_design
from anequant.targets.coreai.host import Host
from anequant.targets.coreai.runner import Runner


class AssetModel:
    """The asset in a bundle's folder, with one cache.

    Raises InputError for a bundle that anequant did not write, and as `Runner`.
    """

    tells_all_logits = True

    def __init__(self, folder: Path) -> None:
        self._design, _ = read_design(folder)
        self._host = Host(Runner(find_asset(folder)), self._design)

    def reset(self) -> None:
        """Forget all tokens."""
        self._host.reset()

    @property
    def context(self) -> int:
        return self._design.context

    @property
    def position(self) -> int:
        return len(self._host.tokens)

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens to the context; return logits float32 [vocab] for what follows them.

        Raises UsageError when they do not fit into the context, InputError for one without an embedding.
        """
        check_fits(self, len(tokens))
        require_known(tokens, self._design.sizes.vocabulary)
        return torch.tensor(self._host.feed(tokens), dtype=torch.float32)

    def feed_each(self, tokens: Sequence[int]) -> Tensor:
        """Do as `feed`, one token after the other; return logits float32 [n, vocab] for what follows each."""
        return torch.stack([self.feed([token]) for token in tokens])
