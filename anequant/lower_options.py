"""What lowering is told beside the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields

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


@dataclass(frozen=True)
class Targets:
    """What is asked for: packages of Core ML, an asset of Core AI, or both; None for what is not."""

    lowering: LowerOptions | None = None
    asset: AssetOptions | None = None

    @property
    def names(self) -> tuple[str, ...]:
        asked = ((COREML, self.lowering), (COREAI, self.asset))
        return tuple(name for name, options in asked if options is not None)

    @property
    def only(self) -> LowerOptions | AssetOptions:
        """The one that is asked for; raises UsageError where both are."""
        if self.lowering is not None and self.asset is not None:
            remedy = f"lower it twice, to {COREML} and {COREAI}"
            raise UsageError("a checkpoint is lowered to one target", remedy=remedy)
        options = self.lowering or self.asset
        assert options is not None
        return options


def choose_targets(target: str, lowering: LowerOptions, asset: AssetOptions) -> Targets:
    """Return the options of what is asked for.

    Raises UsageError for an unknown target, and for an option of one that is not asked for.
    """
    if target not in (COREML, COREAI, BOTH):
        raise UsageError(f"there is no target {quote(target)}", remedy=f"use {COREML}, {COREAI} or {BOTH}")
    for name, options in ((COREML, lowering), (COREAI, asset)):
        changed = [
            item.name
            for item in fields(options)
            if item.name != "context" and getattr(options, item.name) != item.default
        ]
        if target not in (name, BOTH) and changed:
            raise UsageError(
                f"--{changed[0].replace('_', '-')} says nothing to --target {target}",
                remedy=f"leave it out, or use --target {name}",
            )
    return Targets(None if target == COREAI else lowering, None if target == COREML else asset)
