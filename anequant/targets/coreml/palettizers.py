"""coremltools' own palettization of a torch model, to compare with: k-means with 16 entries per tensor.

Its bars and log lines are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from torch import Tensor, nn

from anequant.targets.coreml.toolkit import quiet_logging

BITS = 4
KEPT = ("lm_head", "model.embed_tokens")


def palettize_by_kmeans(model: Any, *, channel_scale: bool = False) -> Any:
    """PostTrainingPalettizer of coremltools on every linear of a transformers model; the model palettized.

    `channel_scale`: the rows are brought to one range first, and keep a scale each.
    """
    from coremltools.optimize.torch import palettization

    settings = _settings()
    settings["global_config"]["enable_per_channel_scale"] = channel_scale
    config = palettization.PostTrainingPalettizerConfig.from_dict(settings)
    with quiet_logging(), redirect_stderr(StringIO()):
        return palettization.PostTrainingPalettizer(model, config).compress(num_kmeans_workers=1)


def palettize_by_sensitivity(model: Any, windows: Tensor, loss: Callable[[nn.Module, Tensor], Tensor]) -> Any:
    """SKMPalettizer of coremltools: the same, weighted by the diagonal of the Fisher information of `loss` on
    token windows [n, length]."""
    from coremltools.optimize.torch import palettization

    config = palettization.SKMPalettizerConfig.from_dict(_settings())
    palettizer = palettization.SKMPalettizer(model, config)
    with quiet_logging(), redirect_stderr(StringIO()):
        return palettizer.compress(list(windows[:, None]), loss, num_kmeans_workers=1)


def _settings() -> dict[str, Any]:
    return {
        "global_config": {"n_bits": BITS, "granularity": "per_tensor"},
        "module_name_configs": dict.fromkeys(KEPT),
    }
