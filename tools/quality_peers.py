"""Other people's 4-bit rounding of a model's projections: the peers of `compare_quality.py`.

Each takes a float model folder and writes a folder of the same form with the seven projections of every layer
rounded (and stored dequantized), everything else as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anequant.checkpoints.source import TOKENIZER_FILES

GROUP = 32


def affine_groups(model: Path, output: Path, windows: Tensor) -> None:
    """Nearest rounding to 4-bit integers with a scale and a zero point for every 32 inputs of a row."""

    def rounded(weight: Tensor) -> Tensor:
        groups = weight.view(len(weight), -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = ((high - low) / 15).clamp_min(1e-10).half().float()
        zero = (-low / step).round()
        codes = (groups / step + zero).round().clamp(0, 15)
        return ((codes - zero) * step).view_as(weight)

    _rewrite(model, output, rounded)


def hqq_groups(model: Path, output: Path, windows: Tensor) -> None:
    """HQQ (Badri and Shaji 2023), 4 bits in groups of 32, from the package `hqq`."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)

    def rounded(weight: Tensor) -> Tensor:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        quantized = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        values: Tensor = quantized.dequantize()
        return values.view_as(weight)

    _rewrite(model, output, rounded)


def coremltools_kmeans(model: Path, output: Path, windows: Tensor) -> None:
    """PostTrainingPalettizer of coremltools: k-means with 16 entries per tensor."""
    from coremltools.optimize.torch import palettization

    loaded = _load(model)
    config = palettization.PostTrainingPalettizerConfig.from_dict(_palettizer_settings("per_tensor"))
    _save(palettization.PostTrainingPalettizer(loaded, config).compress(num_kmeans_workers=1), model, output)


def coremltools_sensitive_kmeans(model: Path, output: Path, windows: Tensor) -> None:
    """SKMPalettizer of coremltools: the same, weighted by the diagonal of the Fisher information."""
    from coremltools.optimize.torch import palettization

    loaded = _load(model)
    config = palettization.SKMPalettizerConfig.from_dict(_palettizer_settings("per_tensor"))

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        value: Tensor = module(input_ids=batch, labels=batch).loss
        return value

    palettizer = palettization.SKMPalettizer(loaded, config)
    _save(palettizer.compress(list(windows[:, None]), loss, num_kmeans_workers=1), model, output)


PEERS: dict[str, Callable[[Path, Path, Tensor], None]] = {
    "affine_groups": affine_groups,
    "hqq_groups": hqq_groups,
    "coremltools_kmeans": coremltools_kmeans,
    "coremltools_sensitive_kmeans": coremltools_sensitive_kmeans,
}


def _palettizer_settings(granularity: str) -> dict[str, Any]:
    return {
        "global_config": {"n_bits": 4, "granularity": granularity},
        "module_name_configs": {"lm_head": None, "model.embed_tokens": None},
    }


def _load(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)


def _rewrite(model: Path, output: Path, rounded: Callable[[Tensor], Tensor]) -> None:
    loaded = _load(model)
    with torch.no_grad():
        for name, module in loaded.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(rounded(module.weight.data))
    _save(loaded, model, output)


def _save(loaded: Any, model: Path, output: Path) -> None:
    """The model's own tensors, without what a peer keeps beside them, and the tokenizer."""
    original = _load(model)
    names = original.state_dict().keys()
    original.load_state_dict({name: value for name, value in loaded.state_dict().items() if name in names})
    original.save_pretrained(output)
    for name in TOKENIZER_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, output / name)
