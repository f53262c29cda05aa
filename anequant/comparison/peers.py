"""Other people's 4-bit rounding of a model's projections, to compare with.

Each takes a float model folder, whose files have been checked, and writes a folder of the same form with the
seven projections of every layer rounded (and stored dequantized), everything else as it was. The whole model
is in memory meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from anequant.architectures.spec import ModelSpec
from anequant.checkpoints.side_files import copy_tokenizer
from anequant.comparison import coreai_kmeans
from anequant.targets.coreml.palettizers import palettize_by_kmeans, palettize_by_sensitivity

BITS, FLOAT, INT8 = 4, 16, 8
ENTRIES = 1 << BITS
GROUPS = (32, 64)
"""Numbers of inputs that share a scale, in the peers that have groups."""

TABLE_ROWS = (32, 8)
"""Numbers of rows that share a table, in the 4-bit recipes for iOS of Apple's coreai-models."""

SMALLEST_HALF = 2.0**-24
HEAD = "lm_head"


class GroupRun(Protocol):
    """Takes a model folder, the folder to write and how many inputs share a scale."""

    def __call__(self, model: Path, output: Path, size: int) -> None: ...


@dataclass(frozen=True)
class Peer:
    """`extra` counts the bits of scales, zero points and codebook of a weight [rows, columns] beside its
    codes; `package` is what has to be installed, and `problem` says what else it needs and is not there;
    `on_ane`: whether the Neural Engine runs its weights."""

    name: str
    run: Callable[[Path, Path], None]
    extra: Callable[[int, int], int]
    package: str | None = None
    on_ane: bool = True
    problem: Callable[[], str | None] = lambda: None

    @property
    def missing(self) -> str | None:
        """Why it cannot run here; None when it can."""
        problem = self.problem()
        if problem is None and self.package is not None and find_spec(self.package.replace("-", "_")) is None:
            return f"not installed: pip install {self.package}"
        return problem


def affine_groups(model: Path, output: Path, size: int) -> None:
    """Nearest rounding to 4-bit integers with a scale and a zero point for every `size` inputs of a row.

    The range of a group holds zero, so that its zero point is one of the 16 codes.
    """

    def round_weight(weight: Tensor) -> Tensor:
        groups = weight.view(len(weight), -1, size)
        low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
        step = ((high - low) / (ENTRIES - 1)).clamp_min(SMALLEST_HALF).half().float()
        zero = (-low / step).round()
        codes = (groups / step + zero).round().clamp(0, ENTRIES - 1)
        return ((codes - zero) * step).view_as(weight)

    _rewrite(model, output, round_weight)


def torchao_groups(model: Path, output: Path, size: int) -> None:
    """IntxWeightOnlyConfig of `torchao`: 4-bit integers with a scale and a zero point for every `size`
    inputs."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=PerGroup(size),
        mapping_type=MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
    )

    def round_weight(weight: Tensor) -> Tensor:
        linear = _linear(weight)
        quantize_(linear, config)
        values: Tensor = linear.weight.dequantize()
        return values

    _rewrite(model, output, round_weight)


def hqq_groups(model: Path, output: Path, size: int) -> None:
    """HQQ (Badri and Shaji 2023), 4 bits in groups of `size`, from the package `hqq`.

    Its zero points are no integers. On a CPU the package keeps them and the scales in float32, on a GPU in
    float16, to which they are rounded here.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=BITS, group_size=size, axis=1)

    def round_weight(weight: Tensor) -> Tensor:
        quantized = HQQLinear(_linear(weight), config, compute_dtype=torch.float32, device="cpu")
        for name in ("scale", "zero"):
            quantized.meta[name] = quantized.meta[name].half().float()
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


def coreai_kmeans_tables(model: Path, output: Path, rows: int | None = None) -> None:
    """KMeansPalettizer of `coreai-opt`: k-means with 16 entries per tensor, or for every `rows` rows."""
    _save(coreai_kmeans.palettize_with_coreai(_load(model), rows=rows), model, output)


def coreai_sensitive_kmeans(model: Path, output: Path, windows: Tensor) -> None:
    """The same per tensor, weighted by squared gradients on the windows."""
    _save(coreai_kmeans.palettize_with_coreai(_load(model), windows=windows), model, output)


def _count_codebook_bits(rows: int, columns: int) -> int:
    return FLOAT * ENTRIES


def _count_scaled_codebook_bits(rows: int, columns: int) -> int:
    return FLOAT * (ENTRIES + rows)


def _count_row_tables_bits(size: int) -> Callable[[int, int], int]:
    """Count a codebook in float16 for every `size` rows."""
    return lambda rows, columns: FLOAT * ENTRIES * math.ceil(rows / size)


def _count_group_bits(size: int, zero: int) -> Callable[[int, int], int]:
    """Count, for every group of `size` inputs, a scale in float16 and a zero point of `zero` bits."""
    return lambda rows, columns: (FLOAT + zero) * rows * math.ceil(columns / size)


def _in_groups(name: str, run: GroupRun, zero: int, package: str | None = None) -> tuple[Peer, ...]:
    """Return a peer for each of GROUPS; none of them runs on the Neural Engine."""
    return tuple(
        Peer(
            f"{name}, groups of {size}",
            partial(run, size=size),
            _count_group_bits(size, zero),
            package,
            on_ane=False,
        )
        for size in GROUPS
    )


_COREAI = partial(Peer, package=coreai_kmeans.PACKAGE, problem=coreai_kmeans.find_problem)

PEERS = (
    Peer("coremltools k-means", coremltools_kmeans, _count_codebook_bits),
    Peer("coremltools k-means, row scales", coremltools_scaled_kmeans, _count_scaled_codebook_bits),
    _COREAI("coreai-opt k-means", coreai_kmeans_tables, _count_codebook_bits),
    *(
        _COREAI(
            f"coreai-opt k-means, a table every {size} rows",
            partial(coreai_kmeans_tables, rows=size),
            _count_row_tables_bits(size),
        )
        for size in TABLE_ROWS
    ),
    *_in_groups("affine int4", affine_groups, BITS),
    *_in_groups("torchao int4", torchao_groups, INT8, "torchao"),
    *_in_groups("HQQ int4", hqq_groups, FLOAT, "hqq"),
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
