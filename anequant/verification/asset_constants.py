"""An asset's constants, read from its file without Apple's runtime, against the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from anequant.checkpoints.reader import Checkpoint
from anequant.errors import VerificationError
from anequant.jobs.control import Progress
from anequant.lower_options import AssetOptions
from anequant.targets.coreai.assemble import make_design
from anequant.targets.coreai.constant_file import list_constants
from anequant.targets.coreai.design import Design
from anequant.targets.coreai.stored import StoredAsset
from anequant.targets.shared.headroom import Headroom


def verify_asset_constants(
    asset: Path, design: Design, checkpoint: Checkpoint, headroom: Headroom, progress: Progress
) -> int:
    """Return how many constants are the checkpoint's, bit for bit, as they lie in the asset's file: all.

    Raises VerificationError for one that is not, or is missing or unknown, and for a design that is not this
    checkpoint's.
    """
    stored, known = StoredAsset(asset), {}
    for due in list_constants(checkpoint, headroom, design.context, design.sizes.dtype, progress):
        known[due.name] = due.constant
        if due.name not in stored.blobs:
            raise VerificationError(f"constant '{due.name}' is missing", where=str(asset))
        if not _are_equal(stored.read(due.name), due.content()):
            raise VerificationError(f"'{due.name}' is not the checkpoint's", where=str(stored.path))
    unknown = stored.blobs.keys() - known.keys()
    if unknown:
        raise VerificationError(f"constant '{min(unknown)}' is none of the checkpoint's", where=str(asset))
    options = AssetOptions(design.context, design.ladder, design.kv)
    if design != make_design(checkpoint, options, headroom, design.sizes.dtype, known):
        raise VerificationError("the design is not the checkpoint's", where=str(asset))
    return len(known)


def _are_equal(ours: Iterable[bytes], theirs: Iterable[bytes | memoryview]) -> bool:
    """Whether bytes in pieces of any length are the same."""
    left, right = (piece for piece in ours), (piece for piece in theirs)
    one = other = memoryview(b"")
    while True:
        one = one or memoryview(next(left, b""))
        other = other or memoryview(next(right, b""))
        both = min(len(one), len(other))
        if one[:both] != other[:both]:
            return False
        if not both:
            return len(one) == len(other)
        one, other = one[both:], other[both:]
