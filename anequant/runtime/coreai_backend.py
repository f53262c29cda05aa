"""An asset of Core AI as a Decoder: Apple's runtime in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from anequant.checkpoints.manifest import read_manifest
from anequant.errors import InputError
from anequant.jobs.typed import from_plain
from anequant.reference.windows import require_known
from anequant.runtime.generate import check_fits
from anequant.targets.coreai.bundle import find_asset
from anequant.targets.coreai.design import Design
from anequant.targets.coreai.host import Host
from anequant.targets.coreai.runner import Runner


class AssetModel:
    """The asset in a bundle's folder, with one cache.

    Raises InputError for a bundle that anequant did not write, and as `Runner`.
    """

    tells_all_logits = True

    def __init__(self, folder: Path) -> None:
        self._design = read_bundle_design(folder)
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
        return torch.from_numpy(self._host.feed(tokens)).float()

    def feed_each(self, tokens: Sequence[int]) -> Tensor:
        """Do as `feed`, one token after the other; return logits float32 [n, vocab] for what follows each."""
        return torch.stack([self.feed([token]) for token in tokens])


def read_bundle_design(folder: Path) -> Design:
    """Read the design of a bundle's asset from its manifest; raises InputError where there is none."""
    try:
        design: Design = from_plain(Design, read_manifest(folder)["design"])
        return design
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("the manifest does not describe an asset", where=str(folder)) from error
