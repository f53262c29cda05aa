"""LLMC's YAML for QuaRot and for GPTQ after it: its keys, and reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from anequant.compat.published_keys import Word, checked_words
from anequant.errors import UnsupportedError, UsageError

QUAROT, GPTQ = "Quarot", "GPTQ"
ELSEWHERE = "evaluation is `anequant eval`"
CHECKPOINT = "the checkpoint decides"
INTERNAL = "an inner matter of LLMC's kernels"
CHOSEN = "every tensor chooses its own damping"
WIDER = "rotations are computed in float32 or wider"
OFFSETS = "the cache has a lowest value per token and head"

WORDS: Mapping[str, Word] = {
    "base.seed": Word(int),
    "model.type": Word(str),
    "model.path": Word(str),
    "model.tokenizer_mode": Word(unused=CHECKPOINT),
    "model.torch_dtype": Word(unused=CHECKPOINT),
    "calib.name": Word(str),
    "calib.download": Word(bool),
    "calib.path": Word(str),
    "calib.n_samples": Word(int),
    "calib.bs": Word(unused=INTERNAL),
    "calib.seq_len": Word(int),
    "calib.preproc": Word(unused="anequant cuts its own windows"),
    "calib.seed": Word(int),
    **{
        f"eval.{key}": Word(unused=ELSEWHERE)
        for key in ("eval_pos", "name", "download", "path", "seq_len", "bs")
    },
    **{f"eval.{key}": Word(unused=ELSEWHERE) for key in ("inference_per_block", "eval_token_consist")},
    "quant.method": Word(only=(QUAROT, GPTQ)),
    "quant.weight.bit": Word(int),
    "quant.weight.symmetric": Word(bool),
    "quant.weight.granularity": Word(only=("per_channel", "per_group", "per_tensor")),
    "quant.weight.group_size": Word(int),
    "quant.weight.calib_algo": Word(only=("minmax", "mse")),
    "quant.weight.qmax_to_tensor": Word(unused=INTERNAL),
    "quant.act.bit": Word(int),
    "quant.act.symmetric": Word(bool),
    "quant.act.granularity": Word(only=("per_token", "per_tensor")),
    "quant.act.static": Word(bool),
    "quant.act.calib_algo": Word(only=("minmax", "mse")),
    "quant.act.qmax_to_tensor": Word(unused=INTERNAL),
    "quant.kvcache.method": Word(only=("Naive",)),
    "quant.kvcache.bit": Word(int),
    "quant.kvcache.symmetric": Word(bool, unused=OFFSETS, granted=False),
    "quant.kvcache.granularity": Word(only=("per_token",)),
    "quant.special.rotate_mode": Word(only=("hadamard", "random")),
    "quant.special.fp32_had": Word(bool, unused=WIDER, granted=True),
    "quant.special.online_rotate": Word(bool),
    "quant.special.actorder": Word(only=(True,)),
    "quant.special.static_groups": Word(only=(True,)),
    "quant.special.true_sequential": Word(only=(True,)),
    "quant.special.percdamp": Word(float, unused=CHOSEN),
    "quant.special.blocksize": Word(int, unused=INTERNAL),
    "quant.quant_out": Word(only=(True,)),
    "save.save_trans": Word(bool),
    "save.save_fake": Word(bool),
    "save.save_path": Word(str),
}
REQUIRED = ("model.path", "quant.method", "quant.weight.bit", "save.save_path")


@dataclass(frozen=True)
class LlmcFile:
    """What a file asks for: `values` by dotted key, and `notes` on what has no effect."""

    path: Path
    values: Mapping[str, Any]
    notes: tuple[str, ...]

    def part(self, name: str) -> dict[str, Any]:
        """The keys below quant.`name`, without that prefix."""
        prefix = f"quant.{name}."
        return {
            key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)
        }

    @property
    def rotates(self) -> bool:
        return bool(self.values["quant.method"] == QUAROT)

    @property
    def online(self) -> bool:
        """Whether R2 and R4 are wanted beside R1."""
        return bool(self.values.get("quant.special.online_rotate", False))

    @property
    def transforms(self) -> bool:
        """Whether the rotated float model is to be written."""
        return bool(self.values.get("save.save_trans", False))

    @property
    def quantizes(self) -> bool:
        """Whether a quantized model is to be written."""
        return bool(self.values.get("save.save_fake", False)) or not self.transforms


def read_llmc(path: Path) -> LlmcFile:
    """Read and check a file. Raises UsageError for a file that cannot be read, an unknown or missing key or a
    value of a wrong type, UnsupportedError for one that has no counterpart."""
    values = _flat(_read_yaml(path), path)
    notes = checked_words(values, WORDS, path)
    for key in REQUIRED:
        if key not in values:
            raise UsageError(f"key '{key}' is missing in '{path}'")
    file = LlmcFile(path, values, notes)
    if file.transforms and not file.rotates:
        raise UnsupportedError(
            f"key 'save.save_trans' in '{path}' is true, and {GPTQ} transforms nothing",
            remedy="save_trans is for method Quarot",
        )
    return file


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"LLMC file '{path}' cannot be read: {reason}") from error
    if not isinstance(values, dict):
        raise UsageError(f"LLMC file '{path}' holds no table of keys and values")
    return values


def _flat(values: Mapping[Any, Any], path: Path, prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, keys joined by dots; raises UsageError for a key without a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if value is None:
            raise UsageError(f"key '{name}' in '{path}' has no value")
        if isinstance(value, dict):
            flat |= _flat(value, path, f"{name}.")
        else:
            flat[name] = value
    return flat
