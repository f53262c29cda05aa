"""A per-tensor checkpoint tested as ANEMLL's users test one: the contract, perplexities, a little text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import ModelSpec, layer_prefix
from anequant.checkpoints.contract import require_contract
from anequant.checkpoints.layers import open_quantized
from anequant.checkpoints.layout import list_projections
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.source import has_tokenizer
from anequant.errors import UsageError, VerificationError
from anequant.evaluation.divergence import measure_quality
from anequant.jobs.control import Progress, silent
from anequant.quantization.online import Online
from anequant.reference.windows import load_tokenizer, read_text_windows
from anequant.runtime.continue_text import TextModel, continue_text, open_text_model, read_stop_tokens
from anequant.runtime.sampling import Sampling
from anequant.runtime.transformers_backend import TransformersModel

SWITCH = "ENABLE_SP_QUANT"
WINDOWS, LENGTH = 2, 128
PROMPT, NEW_TOKENS = "Who are you?", 16
LARGEST_DIFFERENCE = 0.01
ANEMLL, TRANSFORMERS = "anemll", "transformers"


@dataclass(frozen=True)
class SpCheck:
    """`stored` and `rebuilt` are perplexities on the bundled text: of the weights as stock transformers
    reads them, and as ANEMLL's loader rebuilds them. `text` continues a prompt with the latter.

    Perplexities and text are None for a model that comes without a tokenizer.
    """

    projections: int
    stored: float | None
    rebuilt: float | None
    text: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_switch(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UsageError unless ENABLE_SP_QUANT is set as ANEMLL's scripts (true) or its model (1) want it."""
    if environment.get(SWITCH) not in ("true", "1"):
        raise UsageError(
            f"{SWITCH} is not set, ANEMLL reads no per-tensor checkpoint without it",
            remedy=f"set {SWITCH}=true",
        )


def check_sp(folder: Path, *, progress: Progress = silent) -> SpCheck:
    """Test the checkpoint in `folder`.

    Raises VerificationError for a violation of the contract or perplexities more than a hundredth apart,
    InputError for a folder that cannot be read.
    """
    progress("contract", 0.0)
    checkpoint = open_quantized(folder)
    projections = require_contract(folder)
    if not has_tokenizer(folder):
        return SpCheck(projections, None, None, None)
    tokens = read_text_windows(folder, checkpoint.spec.config, count=WINDOWS, length=LENGTH)
    stored = measure_quality(checkpoint, tokens, progress=progress.part("stored weights", 0.1, 0.4))
    rebuilt = measure_quality(
        SnappedWeights(checkpoint), tokens, progress=progress.part("rebuilt weights", 0.4, 0.8)
    )
    if not abs(rebuilt.perplexity / stored.perplexity - 1) <= LARGEST_DIFFERENCE:
        raise VerificationError(
            f"the weights that ANEMLL rebuilds have perplexity {rebuilt.perplexity:.3f}, those in the file "
            f"{stored.perplexity:.3f}",
            where=str(folder),
            remedy="quantize the model again",
        )
    model = _snapped_model(folder)
    text = "".join(continue_text(model, PROMPT, NEW_TOKENS, Sampling()))
    return SpCheck(projections, stored.perplexity, rebuilt.perplexity, text)


def open_published_model(folder: Path, backend: str) -> TextModel:
    """Open a model by ANEMLL's names of backends: `anemll` runs packages by the interpreter and a per-tensor
    checkpoint as the loader rebuilds it, `transformers` any checkpoint as stored.

    Raises VerificationError for a checkpoint that breaks the contract, and what `open_text_model` raises.
    """
    if backend == TRANSFORMERS:
        return open_text_model(folder, backend)
    if not (folder / "config.json").is_file() or (folder / "meta.yaml").is_file():
        return open_text_model(folder, "interpreter")
    open_quantized(folder)
    require_contract(folder)
    return _snapped_model(folder)


def verdict_lines(title: str, description: str, result: SpCheck) -> list[str]:
    """Return the log of a test that passed."""
    lines = [f"Testing: {title}", f"Description: {description}"] if description else [f"Testing: {title}"]
    lines.append(f"Scales, codebooks and biases of {result.projections} projections keep the contract")
    if result.stored is None or result.rebuilt is None:
        lines.append("Perplexity not measured: the model comes without a tokenizer")
    else:
        lines.append(f"Perplexity {result.rebuilt:.3f} as ANEMLL rebuilds it, {result.stored:.3f} as stored")
        lines.append(f"Generated: {result.text}")
    return [*lines, f"{title} test PASSED"]


def _snapped_model(folder: Path) -> TextModel:
    tokenizer = load_tokenizer(folder)
    return TextModel(folder, SnappedModel(folder), tokenizer, read_stop_tokens(folder))


@dataclass(frozen=True)
class SnappedWeights:
    """A Checkpoint whose projections are divided by their scales, snapped to the codebook and scaled back.

    A projection without a codebook is what is stored, since the loader does not snap it.
    """

    checkpoint: Checkpoint

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @property
    def online(self) -> Online:
        return self.checkpoint.online

    @property
    def head_name(self) -> str:
        return self.checkpoint.head_name

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read(name)

    def final_gain(self) -> Tensor:
        return self.checkpoint.final_gain()

    def layer(self, layer: int) -> dict[str, Tensor]:
        names = [layer_prefix(layer) + linear.name for linear in self.spec.architecture.linears]
        snapped = {f"{name.removeprefix(layer_prefix(layer))}.weight": self.weight(name) for name in names}
        return {**self.checkpoint.layer(layer), **snapped}

    def weight(self, name: str) -> Tensor:
        """Return projection `name` as loaded, float32 [out, in]; raises InputError as `load` does."""
        if f"{name}.codebook" not in self.checkpoint.tensors:
            return self.read(f"{name}.weight").float()
        return load(name, self.read, self.checkpoint.tensors).dequantize()


class SnappedModel(TransformersModel):
    """The Decoder over SnappedWeights."""

    def __init__(self, folder: Path) -> None:
        weights = SnappedWeights(open_quantized(folder))
        super().__init__(folder)
        with torch.no_grad():
            for name in list_projections(weights.spec):
                self._model.get_parameter(f"{name}.weight").copy_(weights.weight(name))
