"""Other people's 4-bit rounding of a model's projections, to compare with.

Each takes a float model folder, whose files have been checked, and writes a folder of the same form with the
seven projections of every layer rounded (and stored dequantized), everything else as it was. The whole model
is in memory meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anequant.architectures.spec import ModelSpec
from anequant.checkpoints.side_files import copy_tokenizer
from anequant.targets.coreml.palettizers import palettize_by_kmeans, palettize_by_sensitivity

BITS, GROUP, FLOAT = 4, 32, 16
ENTRIES = 16
HEAD = "lm_head"


@dataclass(frozen=True)
class Peer:
    """`extra` counts the bits of scales, zero points and codebook of a weight [rows, columns] beside its
    codes; `package` is what has to be installed; `on_ane`: whether the Neural Engine runs its weights."""

    name: str
    run: Callable[[Path, Path], None]
    extra: Callable[[int, int], int]
    package: str | None = None
    on_ane: bool = True

    @property
    def missing(self) -> str | None:
        """Why it cannot run here; None when it can."""
        if self.package is None or find_spec(self.package) is not None:
            return None
        return f"not installed: pip install {self.package}"


def affine_groups(model: Path, output: Path) -> None:
    """Nearest rounding to 4-bit integers with a scale and a zero point for every 32 inputs of a row."""

    def round_weight(weight: Tensor) -> Tensor:
        groups = weight.view(len(weight), -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = ((high - low) / 15).clamp_min(1e-10).half().float()
        zero = (-low / step).round()
        codes = (groups / step + zero).round().clamp(0, 15)
        return ((codes - zero) * step).view_as(weight)

    _rewrite(model, output, round_weight)


def torchao_groups(model: Path, output: Path) -> None:
    """IntxWeightOnlyConfig of `torchao`: 4-bit integers with a scale and a zero point for every 32 inputs."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=PerGroup(GROUP),
        mapping_type=MappingType.ASYMMETRIC,
    )

    def round_weight(weight: Tensor) -> Tensor:
        linear = _linear(weight)
        quantize_(linear, config)
        values: Tensor = linear.weight.dequantize()
        return values

    _rewrite(model, output, round_weight)


def hqq_groups(model: Path, output: Path) -> None:
    """HQQ (Badri and Shaji 2023), 4 bits in groups of 32, from the package `hqq`."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=BITS, group_size=GROUP, axis=1)

    def round_weight(weight: Tensor) -> Tensor:
        quantized = HQQLinear(_linear(weight), config, compute_dtype=torch.float32, device="cpu")
        values: Tensor = quantized.dequantize()
        return values.view_as(weight)

    _rewrite(model, output, round_weight)


def coremltools_kmeans(model: Path, output: Path) -> None:
    """PostTrainingPalettizer of coremltools: k-means with 16 entries per tensor."""
    _save(palettize_by_kmeans(_load(model)), model, output)


def coremltools_scaled_kmeans(model: Path, output: Path) -> None:
    """The same, with a scale for every row."""
    _save(palettize_by_kmeans(_load(model), channel_scale=True), model, output)


def coremltools_sensitive_kmeans(model: Path, output: Path, windows: Tensor) -> None:
    """SKMPalettizer of coremltools: weighted by the diagonal of the Fisher information on the windows."""

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        value: Tensor = module(input_ids=batch, labels=batch).loss
        return value

    _save(palettize_by_sensitivity(_load(model), windows, loss), model, output)


def _codebook(rows: int, columns: int) -> int:
    return FLOAT * ENTRIES


def _scaled_codebook(rows: int, columns: int) -> int:
    return FLOAT * (ENTRIES + rows)


def _groups(rows: int, columns: int) -> int:
    """A scale and a zero point for each."""
    return 2 * FLOAT * rows * math.ceil(columns / GROUP)


PEERS = (
    Peer("coremltools k-means", coremltools_kmeans, _codebook),
    Peer("coremltools k-means, row scales", coremltools_scaled_kmeans, _scaled_codebook),
    Peer("affine int4, groups of 32", affine_groups, _groups, on_ane=False),
    Peer("torchao int4, groups of 32", torchao_groups, _groups, "torchao", on_ane=False),
    Peer("HQQ int4, groups of 32", hqq_groups, _groups, "hqq", on_ane=False),
)
"""What runs without labels or gradients; in the order in which they are shown."""


def projection_bits(peer: Peer, spec: ModelSpec) -> int:
    """Bits of all projections, codes with their codebooks and scales."""
    shapes = [spec.shape(linear) for linear in spec.architecture.linears]
    return spec.num_layers * sum(BITS * math.prod(shape) + peer.extra(*shape) for shape in shapes)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return linear


def _load(model: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    fixed = {"trust_remote_code": False, "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **fixed)


def _rewrite(model: Path, output: Path, rounded: Callable[[Tensor], Tensor]) -> None:
    loaded = _load(model)
    with torch.no_grad():
        for name, module in loaded.named_modules():
            if isinstance(module, nn.Linear) and name != HEAD:
                module.weight.copy_(rounded(module.weight.data))
    _save(loaded, model, output)


def _save(loaded: Any, model: Path, output: Path) -> None:
    """The model's own tensors, without what a peer keeps beside them, and the tokenizer."""
    original = _load(model)
    names = original.state_dict().keys()
    original.load_state_dict({name: value for name, value in loaded.state_dict().items() if name in names})
    original.save_pretrained(output)
    copy_tokenizer(model, output)
