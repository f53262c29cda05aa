"""An upload as rows of (label, text) for a terminal."""

from __future__ import annotations

from anequant.checkpoints.license import CARD
from anequant.outputs.push import Upload


def uploaded(upload: Upload) -> list[tuple[str, str]]:
    sent = upload.url is not None
    seen = "private" if upload.private else "public"
    what = f"{len(upload.files)} files of a {upload.kind}, {upload.bytes:,} bytes, to {upload.repo} ({seen})"
    rows = [("uploaded" if sent else "would upload", what)]
    if not sent:
        rows += [("", f"{name}  {size:,}") for name, size in upload.files.items()]
    if CARD not in upload.files:
        rows.append(("card", f"none: this folder has no {CARD}"))
    rows.append(("address", upload.url) if upload.url else ("", "nothing was sent: add --yes"))
    return rows
