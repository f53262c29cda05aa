"""Keys of published files: what each may say, and the check that names a key or a value that is not known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anequant.errors import UnsupportedError, UsageError, did_you_mean
from anequant.recipe import TYPE_NAMES


@dataclass(frozen=True)
class Word:
    """What one key of a published file may say.

    kind     type of the value; None where something else checks it
    only     the values that have a counterpart here; None for any
    unused   why the value has no effect here; empty where it has one
    granted  the value that anequant follows all the same, so that nobody need be told
    """

    kind: type | None = None
    only: tuple[Any, ...] | None = None
    unused: str = ""
    granted: Any = None


def check_words(values: Mapping[str, Any], words: Mapping[str, Word], path: Path) -> tuple[str, ...]:
    """Check the values of a file; returns a line for every reason why some of them have no effect.

    Raises UsageError for a key that is not in `words` or a value of another type, UnsupportedError for one
    that has no counterpart.
    """
    unused: dict[str, list[str]] = {}
    for key, value in values.items():
        if key not in words:
            raise UsageError(f"unknown key '{key}' in '{path}'", remedy=did_you_mean(key, words))
        word = words[key]
        if word.kind is not None and not _is_a(value, word.kind):
            wanted = TYPE_NAMES[word.kind]
            raise UsageError(f"key '{key}' in '{path}' must be {wanted}, not {value!r}")
        if word.only is not None and value not in word.only:
            known = " or ".join(map(repr, word.only))
            raise UnsupportedError(f"key '{key}' in '{path}' is {value!r}", remedy=f"only {known} is known")
        if word.unused and (word.granted is None or value != word.granted):
            unused.setdefault(word.unused, []).append(key)
    return tuple(f"{reason}: no use for {', '.join(keys)}" for reason, keys in unused.items())


def _is_a(value: Any, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


LLMC_QUAROT, LLMC_GPTQ = "Quarot", "GPTQ"
ELSEWHERE = "evaluation is `anequant eval`"
CHECKPOINT = "the checkpoint decides"
INTERNAL = "an inner matter of LLMC's kernels"
CHOSEN = "every tensor chooses its own damping"
WIDER = "rotations are computed in float32 or wider"
OFFSETS = "the cache has a lowest value per token and head"

LLMC_WORDS: Mapping[str, Word] = {
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
    "quant.method": Word(only=(LLMC_QUAROT, LLMC_GPTQ)),
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
LLMC_REQUIRED = ("model.path", "quant.method", "quant.weight.bit", "save.save_path")

SEARCH = "rotations are fixed Hadamard matrices in float64"
QUARK_WORDS: Mapping[str, Word] = {
    "name": Word(only=("quarot",)),
    "online-had": Word(bool),
    "backbone": Word(only=("model",)),
    "model_decoder_layers": Word(only=("model.layers",)),
    "self_attn": Word(only=("self_attn",)),
    "mlp": Word(only=("mlp",)),
    **{f"{name}_proj": Word(only=(f"self_attn.{name}_proj",)) for name in "qkvo"},
    **{f"{name}_proj": Word(only=(f"mlp.{name}_proj",)) for name in ("gate", "up", "down")},
    "block_size": Word(),
    "seed": Word(),
    "r_matrix_dim": Word(int),
    "use_random_had": Word(only=(True,)),
    "r_config_path": Word(str),
    **dict.fromkeys(
        ("override_dtype", "codebook_bits", "search_iters", "lr", "grad_clip", "ortho_loss_weight"),
        Word(unused=SEARCH),
    ),
}
"""Keys of a QuaRot file; the last six belong to ANEMLL's search for rotations."""
