"""Hashes that are computed beside the steps of a job."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from anequant.checkpoints.manifest import hash_checkpoint
from anequant.checkpoints.reader import Checkpoint


def begin_hashing(checkpoint: Checkpoint, files: ExitStack) -> Future[dict[str, str]]:
    """Begin to hash a checkpoint in a thread that ends with `files`."""
    return files.enter_context(ThreadPoolExecutor(1)).submit(hash_checkpoint, checkpoint)
