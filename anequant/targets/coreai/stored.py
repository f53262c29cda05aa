"""An asset on disk, without Apple's runtime: its hash, its constants, and assets made of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anequant.errors import InputError, VerificationError
from anequant.jobs.output_folder import hash_files
from anequant.targets.coreai.assemble import HASH, PROGRAM, author_asset
from anequant.targets.coreai.bytecode import Blob, read_bytecode, read_range
from anequant.targets.coreai.constant_file import unpack_codes
from anequant.targets.coreai.design import Constant, Design


class StoredAsset:
    """The blobs of an asset's program, by name. Raises InputError for a program that is damaged."""

    def __init__(self, asset: Path) -> None:
        self.path = asset / PROGRAM
        self.blobs: dict[str, Blob] = {}
        for blob in read_bytecode(self.path).blobs:
            if blob.name in self.blobs:
                raise InputError(f"'{blob.name}' is there twice", where=str(self.path))
            self.blobs[blob.name] = blob

    def read(self, name: str) -> Iterator[bytes]:
        """The bytes of a constant, in pieces."""
        blob = self.blobs[name]
        return read_range(self.path, blob.start, blob.size)

    def load(self, name: str, constant: Constant) -> Tensor:
        """A constant in its shape: codes as uint8, numbers in their type.

        Raises VerificationError where it has not the bytes that its shape asks for.
        """
        data = b"".join(self.read(name))
        if len(data) != constant.nbytes:
            problem = f"'{name}' has {len(data)} bytes, its shape {constant.shape} needs {constant.nbytes}"
            raise VerificationError(problem, where=str(self.path))
        raw = np.frombuffer(data, np.uint8)
        if constant.dtype.startswith("uint"):
            count = int(np.prod(constant.shape))
            return torch.from_numpy(unpack_codes(raw, constant.bits, count).copy()).view(constant.shape)
        values = np.frombuffer(data, np.dtype(constant.dtype)).copy()
        return torch.from_numpy(values).view(constant.shape)


def verify_hash(asset: Path) -> None:
    """Raises VerificationError unless main.hash is the sha256 of the program."""
    digest = hash_files(asset, [PROGRAM])[PROGRAM]
    if (asset / HASH).read_bytes() != bytes.fromhex(digest):
        raise VerificationError(f"'{HASH}' is not the hash of '{PROGRAM}'", where=str(asset))


def derive_asset(source: Path, design: Design, asset: Path) -> None:
    """Write the new asset `asset` of another design, with the constants that lie in the asset `source`."""
    author_asset(design, asset, StoredAsset(source).read)
