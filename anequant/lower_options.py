"""What lowering is told beside the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from anequant.errors import UsageError, quote


@dataclass(frozen=True)
class LowerOptions:
    """What is fixed in the packages that a checkpoint is lowered to.

    context        positions the state holds
    batch          positions that prefill takes at once
    chunks         decoder packages; None: as few as keep every package within `max_chunk_mb`
    max_chunk_mb   millions of bytes
    argmax         the head ends in the best token of each part instead of logits
    prefix         of the file names; None: ANEMLL's for the architecture
    """

    context: int = 512
    batch: int = 64
    chunks: int | None = None
    max_chunk_mb: int = 950
    argmax: bool = False
    prefix: str | None = None


@dataclass(frozen=True)
class AssetOptions:
    """What is fixed in the Core AI asset that a checkpoint is lowered to.

    context  positions the caches hold: 256, or doubled as often as wanted
    ladder   positions that functions take at once, ascending
    kv       state: the asset keeps keys and values; functional: the host does
    """

    context: int = 512
    ladder: tuple[int, ...] = (8, 16, 64)
    kv: str = "state"


KV_FORMS = ("state", "functional")
COREML, COREAI, BOTH = "coreml", "coreai", "both"
"""What a model can be converted to; a checkpoint is lowered to one of the first two."""

FORMS = {"lowering": COREML, "asset": COREAI}
"""The target of each kind of options, by what a request calls them."""


def choose_targets(target: str, lowering: LowerOptions, asset: AssetOptions) -> dict[str, Any]:
    """Return the options of what is asked for, by FORMS.

    Raises UsageError for an unknown target, and for an option that none of the target's kinds has.
    """
    if target not in (COREML, COREAI, BOTH):
        raise UsageError(f"there is no target {quote(target)}", remedy=f"use {COREML}, {COREAI} or {BOTH}")
    given: dict[str, Any] = {"lowering": lowering, "asset": asset}
    chosen = {name: options for name, options in given.items() if target in (FORMS[name], BOTH)}
    for name in FORMS.keys() - chosen.keys():
        for item in fields(given[name]):
            if item.name != "context" and getattr(given[name], item.name) != item.default:
                flag = item.name.replace("_", "-")
                raise UsageError(
                    f"--{flag} says nothing to --target {target}",
                    remedy=f"leave it out, or use --target {FORMS[name]}",
                )
    return chosen


def choose_one(chosen: dict[str, Any]) -> LowerOptions | AssetOptions:
    """Return the only options that were chosen; raises UsageError where there are both."""
    if len(chosen) > 1:
        raise UsageError(
            "a checkpoint is lowered to one target", remedy=f"lower it twice, to {COREML} and {COREAI}"
        )
    (options,) = chosen.values()
    assert isinstance(options, (LowerOptions, AssetOptions))
    return options
