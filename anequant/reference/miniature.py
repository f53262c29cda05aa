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
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from anequant.architectures.config import UNREAD, settle_rope, translate_errors
from anequant.architectures.spec import HEAD, ModelSpec
from anequant.checkpoints.header import read_header
from anequant.checkpoints.online_config import INDEX_SUFFIX, SUFFIX
from anequant.checkpoints.reader import Checkpoint, read_config
from anequant.errors import InputError, ResourceError

WHOLE = "whole"
"""The folder in a miniature with the model's own config.json, but for what is not read."""

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
    apply to queries and keys; `masks` [TOKENS, TOKENS] say for each layer which tokens (columns) every token
    (rows) sees, where sliding windows are WINDOW long.
    """

    config: Mapping[str, Any]
    origins: Mapping[str, Stored | None]
    cos: Tensor
    sin: Tensor
    masks: tuple[Tensor, ...]


def read_as_stock(checkpoint: Checkpoint) -> StockReading:
    """Have stock transformers open the miniature of a folder that was opened here.

    Raises InputError for a folder that transformers does not open, ResourceError where there is no room for
    the miniature.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="anequant-miniature-") as place, _quiet():
        _write_configs(checkpoint, Path(place))
        stored = _write_tensors(checkpoint, Path(place))
        where = str(checkpoint.folder)
        with translate_errors(where):
            config = AutoConfig.from_pretrained(Path(place) / WHOLE, trust_remote_code=False)
        with translate_errors(where, "the files of the model together"):
            model = AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
            ).eval()
            cos, sin, masks = _record_layer_arguments(model)
        origins = {name: _origin(tensor, stored) for name, tensor in model.state_dict().items()}
    return StockReading(settle_rope(config.to_dict()), origins, cos, sin, masks)


def _write_configs(checkpoint: Checkpoint, place: Path) -> None:
    """Write the model's own config.json, but for what is not read, below WHOLE, and the small one."""
    raw = {key: value for key, value in read_config(checkpoint.folder).items() if key not in UNREAD}
    widths = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "head_dim": checkpoint.spec.head_dim}
    small = {**raw, **widths, "num_attention_heads": 1, "num_key_value_heads": 1}
    if raw.get("sliding_window") is not None or checkpoint.spec.window is not None:
        small["sliding_window"] = WINDOW
    if checkpoint.online.active:
        small["transformers_weights"] = checkpoint.files[1]
    for folder, config in ((place / WHOLE, raw), (place, small)):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_tensors(checkpoint: Checkpoint, place: Path) -> list[Stored]:
    """Write small tensors for all that the folder stores; the number that fills one is its index in what is
    returned."""
    shapes = _shapes(checkpoint.spec)
    stored: list[Stored] = []
    for file in sorted(path for path in checkpoint.folder.iterdir() if path.is_file()):
        if file.name.endswith(INDEX_SUFFIX):
            shutil.copyfile(file, place / file.name)
        elif file.name.endswith(SUFFIX):
            tensors = {}
            for name in _names(file):
                shape = shapes.get(name) or shapes.get(f"model.{name}") or shapes.get(name[len("model.") :])
                tensors[name] = torch.full(shape or (1,), float(len(stored)))
                stored.append(Stored(file.name, name))
            try:
                save_file(tensors, place / file.name, {"format": "pt"})
            except SafetensorError as error:
                raise ResourceError(
                    f"a miniature of the model cannot be written: {error}",
                    where=str(place),
                    remedy="free disk space there, or name another folder in TMPDIR",
                ) from error
    return stored


def _names(file: Path) -> list[str]:
    """Return the tensors in a file; none in one that is damaged, which transformers then must not need."""
    try:
        return list(read_header(file))
    except InputError:
        return []


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the miniature's tensors: vocabulary and head size are the model's, every other width is
    small."""
    small = replace(spec, hidden_size=WIDTH, intermediate_size=WIDTH, num_heads=1, num_key_value_heads=1)
    return {f"{HEAD}.weight": (spec.vocab_size, WIDTH), **small.tensors()}


def _origin(tensor: Tensor, stored: list[Stored]) -> Stored | None:
    first = float(tensor.flatten()[0])
    whole = first.is_integer() and 0 <= first < len(stored) and bool((tensor == first).all())
    return stored[int(first)] if whole else None


def _record_layer_arguments(model: Any) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return cos and sin, and every layer's mask: what is given beside the hidden states."""
    given: list[dict[str, Any]] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, positional, keywords: given.append(keywords), with_kwargs=True
        )
    with torch.no_grad():
        model(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False)
    cos, sin = given[0]["position_embeddings"]
    masks = [
        _as_booleans(keywords["attention_mask"], keywords.get("is_causal", layer.self_attn.is_causal))
        for keywords, layer in zip(given, model.model.layers, strict=True)
    ]
    return cos, sin, tuple(masks)


def _as_booleans(mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return a mask of sdpa's, boolean or to be added, as booleans [TOKENS, TOKENS]; without one a causal
    layer sees what came before, and any other sees all."""
    if mask is None:
        everything = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
        return everything.tril() if is_causal else everything
    return mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0


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
