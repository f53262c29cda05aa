"""A folder of Core ML packages run as ANEMLL's runtimes run it: by the interpreter, or by Core ML on a Mac.

The order for a prompt of n tokens: whole blocks of B go through the chunks' `prefill`, which only fills
the state; what is left, and always the last token, goes one by one through `infer`, and the last chunk's
output through the head. Every later token is one `infer` and one head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from anequant.errors import InputError
from anequant.jobs.control import Progress
from anequant.reference.windows import require_known
from anequant.runtime.generate import check_fits
from anequant.targets.coreml.device import DevicePackage
from anequant.targets.coreml.interpreter.interpreter import Package
from anequant.targets.coreml.meta import INFER, META, PREFILL, PackageSet, read_meta
from anequant.targets.coreml.meta_check import check_package
from anequant.targets.coreml.storage import damage

OpenPackage = Callable[[Path], Package | DevicePackage]


class PackageModel:
    """The packages that a folder's meta.yaml names, with one state; `position` tokens have been fed."""

    def __init__(self, folder: Path, open_package: OpenPackage = Package.open) -> None:
        self.packages = read_meta(folder)
        self._where = str(folder)
        self._embeddings = _open(folder, self.packages, self.packages.embeddings, open_package)
        self._chunks = [
            _open(folder, self.packages, name, open_package) for name in self.packages.chunk_names
        ]
        self._head = _open(folder, self.packages, self.packages.head, open_package)
        self._mask = _causal_mask(self.packages.context)
        self._vocab_size = self.packages.vocab_size or _count_logits(
            folder / f"{self.packages.head}.mlpackage"
        )
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
        """Append tokens to the context; return logits float32 [vocab] for what follows them.

        Heads that choose the best token of each part themselves tell only those logits, the rest is -inf.
        Raises UsageError when they do not fit into the context, InputError for one without an embedding.
        """
        check_fits(self, len(tokens))
        require_known(tokens, self._vocab_size)
        with damage(self._where):
            return self._feed(tokens)

    def _feed(self, tokens: Sequence[int]) -> Tensor:
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
        """Do as `feed`, one token after the other; return logits float32 [n, vocab] for what follows each."""
        return torch.stack([self.feed([token]) for token in tokens])

    def _forward(self, ids: Tensor, function: str) -> Tensor:
        length, start = len(ids), self.position
        hidden = self._embeddings.run({"input_ids": ids[None]})["hidden_states"]
        for chunk in self._chunks:
            inputs = _decoder_inputs(hidden, start, self._mask)
            hidden = chunk.run(inputs, self.state, function)["output_hidden_states"]
        self.position = start + length
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        return _join_logits(self.packages, self._head.run({"hidden_states": hidden}))


def run_package_by_package(
    folder: Path, tokens: Tensor, prompt: int, progress: Progress, open_package: OpenPackage = Package.open
) -> Tensor:
    """Return what `PackageModel` says of known tokens, with a single package in memory at a time.

    The first `prompt` tokens, whole batches, go through `prefill`, the others one by one: logits
    [1 + len(tokens) - prompt, vocab] from the prompt's end on.
    """
    packages = read_meta(folder)
    ids = tokens.to(torch.int32)
    steps = [(start, packages.batch, PREFILL) for start in range(0, prompt, packages.batch)]
    steps += [(position, 1, INFER) for position in range(prompt - 1, len(tokens))]
    mask = _causal_mask(packages.context)
    embeddings = _open(folder, packages, packages.embeddings, open_package)
    hidden = [
        embeddings.run({"input_ids": ids[None, start : start + length]})["hidden_states"]
        for start, length, _ in steps
    ]
    del embeddings
    state: dict[str, Tensor] = {}
    for number, name in enumerate(packages.chunk_names):
        chunk = _open(folder, packages, name, open_package)
        state = state or chunk.new_state()
        for place, (start, _, function) in enumerate(steps):
            progress(f"{name}, step {place + 1} of {len(steps)}", number / len(packages.chunk_names))
            inputs = _decoder_inputs(hidden[place], start, mask)
            hidden[place] = chunk.run(inputs, state, function)["output_hidden_states"]
        del chunk
    head = _open(folder, packages, packages.head, open_package)
    last = [part for part, (_, _, function) in zip(hidden, steps, strict=True) if function == INFER]
    return torch.stack([_join_logits(packages, head.run({"hidden_states": part})) for part in last])


def _causal_mask(context: int) -> Tensor:
    return torch.full((context, context), float("-inf"), dtype=torch.float16).triu(1)


def _decoder_inputs(hidden: Tensor, start: int, mask: Tensor) -> dict[str, Tensor]:
    """Return what a chunk takes for hidden states [1, S, hidden_size] of the positions from `start` on."""
    positions = torch.arange(start, start + hidden.shape[1], dtype=torch.int32)
    return {
        "hidden_states": hidden,
        "position_ids": positions,
        "causal_mask": mask[None, None, start : start + hidden.shape[1]],
        "current_pos": positions[:1],
    }


def _join_logits(packages: PackageSet, outputs: Mapping[str, Tensor]) -> Tensor:
    """Join a head's outputs to logits float32 [vocab]; -inf where a head that chooses does not tell them."""
    if not packages.argmax:
        parts = [outputs[f"logits{part + 1}"] for part in range(packages.head_parts)]
        return torch.cat(parts, dim=-1).reshape(-1).float()
    sizes = torch.tensor(packages.head_sizes)
    logits = torch.full((int(sizes.sum()),), float("-inf"))
    logits[outputs["argmax_idx"].long() + sizes.cumsum(0) - sizes] = outputs["argmax_val"].float()
    return logits


def _count_logits(head: Path) -> int:
    """Count the logits of all outputs of a head, one a token. Core ML says nothing of a token beyond."""
    package = Package.open(head)
    return sum(output.shape[-1] or 0 for output in package.functions[package.default_function].outputs)


def _open(
    folder: Path, packages: PackageSet, name: str, open_package: OpenPackage
) -> Package | DevicePackage:
    path = folder / f"{name}.mlpackage"
    if not path.is_dir():
        raise InputError(
            f"package '{path.name}' is missing; {packages.keys_of(name)} of {META} name it so",
            where=str(folder),
            remedy="lower it again",
        )
    package = open_package(path)
    check_package(packages, name, package.functions, folder)
    return package
