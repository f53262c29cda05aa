"""What stock transformers makes of a model folder, seen without loading the model.

`from_pretrained` decides which files count, which stored tensor becomes which parameter, what is tied to
what and what every layer is given beside its hidden states. So it opens a miniature of the folder:
config.json with the widths cut to one head and two channels, and every safetensors file with the same names
in it, each tensor as small as that config wants it and filled with a number of its own. The number that a
parameter holds afterwards tells where it came from, and the miniature's layers tell what they were given.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from anequant.architectures.config import refusing, settle
from anequant.architectures.spec import HEAD, ModelSpec
from anequant.checkpoints.header import read_header
from anequant.checkpoints.online import SUFFIX
from anequant.checkpoints.reader import Checkpoint, read_config
from anequant.errors import InputError

TOKENS = 32
WIDTH = 2
WINDOW = 16
"""A sliding window in the miniature, short enough to show on its TOKENS."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file of a folder."""

    file: str
    name: str


@dataclass(frozen=True)
class StockReading:
    """What stock transformers made of a model folder.

    `config` is its config.json resolved. `origins` has a stored tensor for every parameter, None where
    transformers found none and made one up. `cos` and `sin` [1, TOKENS, rotary width] are what the layers
    turn queries and keys with, `slides` whether each of them looks back over a window only.
    """

    config: Mapping[str, Any]
    origins: Mapping[str, Stored | None]
    cos: Tensor
    sin: Tensor
    slides: tuple[bool, ...]


def read_as_stock(checkpoint: Checkpoint) -> StockReading:
    """Have stock transformers open the miniature of a folder that was opened here.

    Raises InputError for a folder that transformers does not open.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="anequant-miniature-") as place, _quiet():
        stored = _write_miniature(checkpoint, Path(place))
        with refusing(str(checkpoint.folder)):
            config = settle(AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False).to_dict())
            model = AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, trust_remote_code=False, local_files_only=True
            ).eval()
            cos, sin, slides = _given_to_layers(model)
        origins = {name: _origin(tensor, stored) for name, tensor in model.state_dict().items()}
    return StockReading(config, origins, cos, sin, slides)


def _write_miniature(checkpoint: Checkpoint, place: Path) -> list[Stored]:
    """Write the miniature; the number that fills a tensor is its index in what is returned."""
    raw = read_config(checkpoint.folder)
    widths = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "head_dim": checkpoint.spec.head_dim}
    config = {**raw, **widths, "num_attention_heads": 1, "num_key_value_heads": 1}
    if raw.get("sliding_window") is not None or checkpoint.spec.window is not None:
        config["sliding_window"] = WINDOW
    config.pop("quantization_config", None)
    if checkpoint.online.active:
        config["transformers_weights"] = checkpoint.files[1]
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = _shapes(checkpoint.spec)
    stored: list[Stored] = []
    for file in sorted(checkpoint.folder.iterdir()):
        if file.name.endswith(f"{SUFFIX}.index.json"):
            shutil.copyfile(file, place / file.name)
        elif file.name.endswith(SUFFIX) and file.is_file():
            tensors = {}
            for name in _names(file):
                tensors[name] = torch.full(shapes.get(name, (1,)), float(len(stored)))
                stored.append(Stored(file.name, name))
            save_file(tensors, place / file.name, {"format": "pt"})
    return stored


def _names(file: Path) -> list[str]:
    """The tensors in a file; none in one that is damaged, which transformers then must not need."""
    try:
        return list(read_header(file))
    except InputError:
        return []


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The miniature's tensors: vocabulary and head size are the model's, every other width is small."""
    small = replace(spec, hidden_size=WIDTH, intermediate_size=WIDTH, num_heads=1, num_key_value_heads=1)
    return {f"{HEAD}.weight": (spec.vocab_size, WIDTH), **small.tensors()}


def _origin(tensor: Tensor, stored: list[Stored]) -> Stored | None:
    first = float(tensor.flatten()[0])
    whole = first.is_integer() and 0 <= first < len(stored) and bool((tensor == first).all())
    return stored[int(first)] if whole else None


def _given_to_layers(model: Any) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
    """cos and sin, and for every layer whether its mask hides what lies WINDOW back."""
    given: list[dict[str, Any]] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, positional, keywords: given.append(keywords), with_kwargs=True
        )
    with torch.no_grad():
        model(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False)
    cos, sin = given[0]["position_embeddings"]
    return cos, sin, tuple(_hides_the_first(keywords["attention_mask"]) for keywords in given)


def _hides_the_first(mask: Tensor | None) -> bool:
    """Whether the last token does not see the first; None is the causal mask."""
    if mask is None:
        return False
    value = mask[0, 0, -1, 0]
    return not bool(value) if mask.dtype == torch.bool else float(value) < 0


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports on what it loads, and the miniature's report is nobody's business."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
