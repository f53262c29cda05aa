"""The architectures that anequant knows, one table per model_type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anequant.architectures.config import build_spec, resolve_config
from anequant.architectures.llama import LLAMA
from anequant.architectures.mistral import MISTRAL
from anequant.architectures.qwen2 import QWEN2
from anequant.architectures.qwen3 import QWEN3
from anequant.architectures.settings import check_settings
from anequant.architectures.spec import ModelSpec
from anequant.errors import UnsupportedError, quote

ARCHITECTURES = {table.model_type: table for table in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def read_spec(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Return the ModelSpec of a parsed config.json, read as transformers does; `where` names the file in
    errors.

    Raises UnsupportedError for an unknown model_type (listing the known ones), and what `check_settings`,
    `resolve_config` and `build_spec` raise.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedError(
            f"unknown architecture: model_type {quote(model_type)}",
            where=where,
            remedy=f"known: {', '.join(ARCHITECTURES)}",
        )
    check_settings(config, where)
    return build_spec(ARCHITECTURES[model_type], resolve_config(config, model_type, where), where)
