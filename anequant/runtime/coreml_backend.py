"""A folder of Core ML packages run as ANEMLL's runtimes run it: by the interpreter, or by Core ML on a Mac.

The order for a prompt of n tokens: whole blocks of B go through the chunks' `prefill`, which only fills
the state; what is left, and always the last token, goes one by one through `infer`, and the last chunk's
output through the head. Every later token is one `infer` and one head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from anequant.coreml.decoder import INFER, PREFILL
from anequant.coreml.device import DevicePackage
from anequant.coreml.interpreter import Package
from anequant.coreml.meta import read_meta
from anequant.errors import InputError
from anequant.runtime.generate import check_fits

OpenPackage = Callable[[Path], Package | DevicePackage]


class PackageModel:
    """The packages that a folder's meta.yaml names, with one state; `position` tokens have been fed."""

    def __init__(self, folder: Path, open_package: OpenPackage = Package.open) -> None:
        self.packages = read_meta(folder)
        if self.packages.argmax and not self.packages.head_sizes:
            raise InputError("arg-max heads need 'vocab_size' in meta.yaml", where=str(folder))
        self._embeddings = _open(folder, self.packages.embeddings, open_package)
        self._chunks = [_open(folder, name, open_package) for name in self.packages.chunk_names]
        self._head = _open(folder, self.packages.head, open_package)
        context = self.packages.context
        self._mask = torch.full((context, context), float("-inf"), dtype=torch.float16).triu(1)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.position = 0
        self.state = self._chunks[0].new_state()

    @property
    def context(self) -> int:
        return self.packages.context

    @property
    def tells_all_logits(self) -> bool:
        return not self.packages.argmax

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens to the context; logits float32 [vocab] for what follows them.

        Heads that choose the best token of each part themselves tell only those logits, the rest is -inf.
        Raises UsageError when they do not fit into the context.
        """
        check_fits(self, len(tokens))
        batch = self.packages.batch
        ids = torch.tensor(tokens, dtype=torch.int32)
        blocks = len(tokens) // batch
        for block in range(blocks):
            self._forward(ids[block * batch : (block + 1) * batch], PREFILL)
        rest = ids[blocks * batch :]
        if not len(rest):
            self.position -= 1
            rest = ids[-1:]
        for token in rest:
            hidden = self._forward(token[None], INFER)
        return self._logits(hidden)

    def feed_each(self, tokens: Sequence[int]) -> Tensor:
        """As `feed`, one token after the other: logits float32 [n, vocab] for what follows each."""
        return torch.stack([self.feed([token]) for token in tokens])

    def _forward(self, ids: Tensor, function: str) -> Tensor:
        length, start = len(ids), self.position
        hidden = self._embeddings.run({"input_ids": ids[None]})["hidden_states"]
        positions = torch.arange(start, start + length, dtype=torch.int32)
        for chunk in self._chunks:
            inputs = {
                "hidden_states": hidden,
                "position_ids": positions,
                "causal_mask": self._mask[None, None, start : start + length],
                "current_pos": positions[:1],
            }
            hidden = chunk.run(inputs, self.state, function)["output_hidden_states"]
        self.position = start + length
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        outputs = self._head.run({"hidden_states": hidden})
        if self.packages.argmax:
            return self._best_logits(outputs["argmax_idx"].long(), outputs["argmax_val"].float())
        parts = [outputs[f"logits{part + 1}"] for part in range(self.packages.head_parts)]
        return torch.cat(parts, dim=-1).reshape(-1).float()

    def _best_logits(self, choices: Tensor, values: Tensor) -> Tensor:
        sizes = torch.tensor(self.packages.head_sizes)
        logits = torch.full((int(sizes.sum()),), float("-inf"))
        logits[choices + sizes.cumsum(0) - sizes] = values
        return logits


def _open(folder: Path, name: str, open_package: OpenPackage) -> Package | DevicePackage:
    path = folder / f"{name}.mlpackage"
    if not path.is_dir():
        raise InputError(f"package '{path.name}' is missing", where=str(folder), remedy="lower it again")
    return open_package(path)
