"""What all tests share: the folder of models and texts beside the repository, and tiny random models."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from anequant.checkpoints.source import BUNDLED_MODEL, Source
from anequant.cli import console
from anequant.pipeline import rounder
from anequant.pipeline.quantize import quantize
from anequant.pipeline.quantizing import QuantizeResult
from anequant.quantization.calibrated import Rounding, quantize_calibrated
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.statistics import InputStatistics
from anequant.quantization.weight_format import WeightFormat
from anequant.recipe import Calibration, Recipe
from anequant.recipe_files import load_recipe
from anequant.request import Request

settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")

torch.set_num_threads(1)
"""Tiny tensors gain nothing from threads, and lose much where cores are shared."""

pytest_plugins = ("damage",)

FEW_TOKENS = Calibration(("self",), samples=6, length=64)

REPOSITORY = Path(__file__).parent.parent
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
"""Widths that blocks of 64 divide, and two query heads per key-value head."""

OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "qwen2": {},
    "qwen3": {"attention_bias": True, "head_dim": 64},
    "mistral": {"head_dim": 32, "sliding_window": None},
}
"""Every bias an architecture can have; for qwen3 a head size that is not hidden_size / heads."""


SLOWEST = ("test_quality", "test_resume", "test_cli", "test_packages", "test_recipes_end_to_end")
"""Files that take longest. They start first, so that no worker is left alone with one in the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that are named run in the order of their names (`make test-orders`)."""
    if all(Path(argument.partition("::")[0]).is_file() for argument in config.args):
        return
    items.sort(key=lambda item: SLOWEST.index(name) if (name := item.path.stem) in SLOWEST else len(SLOWEST))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with models and texts that are not part of the repository."""
    folder = Path(os.environ.get("ANEQUANT_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the folder '{folder}' (set ANEQUANT_SHARED to where it is)")
    return folder


@pytest.fixture(scope="session")
def tiny_qwen2() -> Path:
    return BUNDLED_MODEL


@pytest.fixture(scope="session")
def qwen2_29m(shared: Path) -> Path:
    return present(shared / "models" / "qwen2-29m")


@pytest.fixture(scope="session")
def eval_text(shared: Path) -> Path:
    return present(shared / "text" / "eval-books.txt")


@pytest.fixture(scope="session")
def calibration_text(shared: Path) -> Path:
    return present(shared / "text" / "calibration-books.txt")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """`make_model(folder, model_type, tied, **config)`: see `write_model`."""
    return write_model


@pytest.fixture(scope="module")
def no_progress() -> Iterator[None]:
    """Whatever takes longer than two seconds today shows no progress, so that stderr is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "SHOW_AFTER", 3600.0)
        yield


@dataclass(frozen=True)
class Quantized:
    """A quantized checkpoint and what the pipeline decided while it wrote it."""

    folder: Path
    source: Path
    recipe: Recipe
    result: QuantizeResult
    weights: dict[str, Tensor]
    chosen: dict[str, QuantizedLinear]


@pytest.fixture(scope="session")
def quantize_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Quantized]:
    """`quantize_model(source folder, recipe name, **overrides)`: runs the pipeline once per combination,
    calibrated on a few short windows that the model writes itself."""

    @cache
    def run(source: Path, recipe_name: str, **overrides: Any) -> Quantized:
        recipe = load_recipe(recipe_name, overrides)
        folder = tmp_path_factory.mktemp("quantized") / "model"
        weights: dict[str, Tensor] = {}
        chosen: dict[str, QuantizedLinear] = {}

        def spy(
            weight: Tensor,
            bias: Tensor | None,
            format_: WeightFormat,
            name: str,
            input_scale: Tensor | None = None,
        ) -> QuantizedLinear:
            weights[name] = weight
            chosen[name] = quantize_linear(weight, bias, format_, name, input_scale)
            return chosen[name]

        def calibrated_spy(
            weight: Tensor,
            bias: Tensor | None,
            statistics: InputStatistics,
            rounding: Rounding,
            name: str,
            input_scale: Tensor | None = None,
        ) -> tuple[QuantizedLinear, float | None]:
            weights[name] = weight
            chosen[name], damping = quantize_calibrated(weight, bias, statistics, rounding, name, input_scale)
            return chosen[name], damping

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rounder, "quantize_linear", spy)
            patch.setattr(rounder, "quantize_calibrated", calibrated_spy)
            result = quantize(Request(Source(source, source.name), recipe, FEW_TOKENS), folder)
        return Quantized(folder, source, recipe, result, weights, chosen)

    return run


def present(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"needs '{path}'")
    return path


def write_model(
    folder: Path, model_type: str, tied: bool, *, seed: int = 0, max_shard_size: str = "5GB", **config: Any
) -> Path:
    """Save a tiny random float32 model in which nothing is left at a value that hides a mistake.

    transformers starts biases at 0 and gains at 1; here gains (those of the heads too) are uniform in
    [0.5, 2], biases of unit size, and weights keep the size of what they multiply.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**SIZES, **OWN[model_type], "tie_word_embeddings": tied, **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0, generator=generator)
            else:
                parameter.normal_(generator=generator)
                if parameter.ndim == 2 and "embed_tokens" not in name:
                    parameter /= parameter.shape[1] ** 0.5
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
