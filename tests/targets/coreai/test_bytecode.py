"""MLIR bytecode, read and written without Apple's package.

References: a writer of the documented format in this file, Apple's own writer where it is installed, and
numpy's `packbits` for codes.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anequant.errors import InputError
from anequant.targets.coreai.bytecode import (
    BLOB_LIST,
    BLOBS,
    STRINGS,
    _Reader,
    fill_blobs,
    read_bytecode,
    write_number,
)
from anequant.targets.coreai.constant_file import pack_codes, split_rows, unpack_codes
from anequant.targets.coreai.design import WIDTHS
from anequant.targets.coreai.installed import find_problem

Blobs = dict[str, tuple[int, bytes]]


def varint(value: int) -> bytes:
    """MLIR's prefix varint, written from its description."""
    for size in range(1, 9):
        if value < 1 << 7 * size:
            return ((value * 2 + 1) << (size - 1)).to_bytes(size, "little")
    return b"\0" + value.to_bytes(8, "little")


def make_file(blobs: Blobs, *, foreign: int = 0) -> bytes:
    """A file with a section that nobody knows, the strings, and blobs of (alignment, bytes) by name."""
    strings = b"".join(name.encode() + b"\0" for name in blobs)
    lengths = [varint(len(name.encode()) + 1) for name in reversed(blobs)]
    listed, held = varint(foreign) + varint(0) + varint(len(blobs)), b""
    sections = {9: b"kept", STRINGS: varint(len(blobs)) + b"".join(lengths) + strings}
    for number, (alignment, data) in enumerate(blobs.values()):
        entry = varint(alignment) + varint(len(data))
        entry += b"\xcb" * (-(len(held) + len(entry)) % alignment) + data
        listed += varint(number) + varint(len(entry)) + b"\0"
        held += entry
    sections |= {BLOB_LIST: listed, BLOBS: held}
    most = max((alignment for alignment, _ in blobs.values()), default=1)
    out = b"ML\xefR" + varint(6) + b"MLIR22\0"
    for kind, content in sections.items():
        plain = bytes([kind]) + varint(len(content))
        if kind != BLOBS or (len(out) + len(plain)) % most == 0:
            out += plain + content
        else:
            out += bytes([kind | 0x80]) + varint(len(content)) + varint(most)
            out += b"\xcb" * (-len(out) % most) + content
    return out


names = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=12)
blobs = st.dictionaries(
    names, st.tuples(st.sampled_from([1, 2, 16, 64]), st.binary(max_size=300)), min_size=1, max_size=6
)


@given(st.integers(0, 2**64 - 1))
def test_numbers_are_prefix_varints(value: int) -> None:
    data = write_number(value)
    assert data == varint(value)
    assert _Reader(data + b"more", 0, len(data)).number() == value


@given(blobs)
def test_blobs_are_found_where_they_lie(tmp_path_factory: pytest.TempPathFactory, given_blobs: Blobs) -> None:
    path = tmp_path_factory.mktemp("file") / "main.mlirb"
    path.write_bytes(make_file(given_blobs))
    data = path.read_bytes()
    found = {blob.name: blob for blob in read_bytecode(path).blobs}
    assert {name: data[blob.start : blob.start + blob.size] for name, blob in found.items()} == {
        name: content for name, (_, content) in given_blobs.items()
    }
    assert all(blob.start % blob.alignment == 0 for blob in found.values())


@given(blobs, st.data())
def test_filling_is_writing_with_other_bytes(
    tmp_path_factory: pytest.TempPathFactory, given_blobs: Blobs, data: st.DataObject
) -> None:
    """A file that is filled is the one that would have been written with those bytes."""
    folder = tmp_path_factory.mktemp("file")
    (folder / "template").write_bytes(make_file(given_blobs))
    fresh = {name: data.draw(st.binary(max_size=300)) for name in given_blobs}
    kept = data.draw(st.sampled_from(sorted(given_blobs)))
    del fresh[kept]
    sizes = {name: len(content) for name, content in fresh.items()}
    digest = fill_blobs(
        folder / "template", folder / "filled", sizes, lambda name: [fresh[name][:3], fresh[name][3:]]
    )
    whole = {name: (alignment, fresh.get(name, old)) for name, (alignment, old) in given_blobs.items()}
    assert (folder / "filled").read_bytes() == make_file(whole)
    assert digest == hashlib.sha256(make_file(whole)).hexdigest()


@given(blobs, st.data())
def test_damage_is_an_error_or_another_file(
    tmp_path_factory: pytest.TempPathFactory, given_blobs: Blobs, data: st.DataObject
) -> None:
    """Cut short or with a byte changed, a file is refused as damaged, or is a sound one."""
    whole = make_file(given_blobs)
    path = tmp_path_factory.mktemp("file") / "main.mlirb"
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = data.draw(st.one_of(st.none(), st.binary(min_size=1, max_size=1)))
    path.write_bytes(whole[:place] + (b"" if changed is None else changed + whole[place + 1 :]))
    try:
        found = read_bytecode(path)
    except InputError as error:
        assert "MLIR bytecode" in error.what and error.where == str(path)
    else:
        assert all(0 <= blob.start <= blob.start + blob.size <= len(whole) for blob in found.blobs)


def test_what_is_none_is_said(tmp_path: Path) -> None:
    for name, content in (
        ("empty", b""),
        ("text", b"not bytecode at all"),
        ("head", b"ML\xefR"),
        ("foreign", make_file({"a": (1, b"x")}, foreign=1)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="is no whole MLIR bytecode"):
            read_bytecode(tmp_path / name)
    with pytest.raises(InputError, match="is no whole MLIR bytecode"):
        read_bytecode(tmp_path / "missing")


@given(st.sampled_from(sorted(WIDTHS)), st.integers(1, 200), st.integers(0, 2**32))
def test_codes_are_packed_as_numpy_packs_bits(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    spread: Any = (codes[:, None] >> np.arange(bits)) & 1
    expected = np.packbits(spread.reshape(-1).astype(np.uint8), bitorder="little")
    packed = pack_codes(codes, bits)
    assert np.array_equal(packed, expected)
    assert np.array_equal(unpack_codes(packed, bits, count), codes)


@given(st.integers(1, 300_000))
def test_parts_of_the_head_are_even(rows: int) -> None:
    parts = split_rows(rows)
    sizes = [part.stop - part.start for part in parts]
    assert [part.start for part in parts] == [0, *np.cumsum(sizes)[:-1]] and sum(sizes) == rows
    assert max(sizes) <= 16384 and max(sizes) - min(sizes) <= 1
    assert len(parts) == -(-rows // 16384)


APPLES_WRITER = """
import hashlib, os, sys
from pathlib import Path
import numpy as np
from anequant.targets.coreai.program.builder import make_type
from anequant.targets.coreai.coreai_toolkit import AIProgram, ConstantOp, DenseResourceElementsAttr, GraphOp
from anequant.targets.coreai.coreai_toolkit import Module, ops
whole, target = sys.argv[1] == "whole", Path(sys.argv[2])
rng = np.random.default_rng(0)
module = Module.create()
with module._block_context():
    graph = GraphOp("main", [make_type("float16", (1, 64, 1, 4))], [], input_names=["x"])
    with graph.block:
        y = graph.arguments[0]
        for layer in range(3):
            parts = {
                f"codes{layer}": ("uint4", (64, 64, 1, 1), rng.integers(0, 256, 2048).astype(np.uint8)),
                f"table{layer}": ("float16", (1, 1, 1, 1, 16, 1), rng.normal(size=16).astype(np.float16)),
                f"scale{layer}": ("float16", (1, 64, 1, 1), rng.normal(size=64).astype(np.float16)),
            }
            values = []
            for name, (dtype, shape, content) in parts.items():
                (target.parent / name).write_bytes(content.tobytes())
                few = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], np.uint8)
                held = content if whole else few
                attribute = DenseResourceElementsAttr.get_from_buffer(held, name, make_type(dtype, shape), 64)
                values.append(ConstantOp(value=attribute).result)
            one = np.array([1, 1], np.uint32)
            weight = ops.lut_to_dense(values[0], values[1], ops.constant(np.array(0, np.int16)))
            y = ops.broadcasting_mul(ops.conv2d(y, weight, one, one, np.array(1, np.uint32)), values[2])
        graph.set_outputs_spec_from_dict({"y": y})
AIProgram(module).save_asset(target)
os._exit(0)
"""


@pytest.mark.skipif(find_problem() is not None, reason="needs coreai-core")
def test_a_filled_template_is_what_apples_writer_writes(tmp_path: Path) -> None:
    for kind in ("whole", "template"):
        target = tmp_path / f"{kind}.aimodel"
        subprocess.run([sys.executable, "-c", APPLES_WRITER, kind, str(target)], check=True)
    whole, template = (tmp_path / f"{kind}.aimodel" / "main.mlirb" for kind in ("whole", "template"))
    assert whole.stat().st_size > 2 * template.stat().st_size
    sizes = {blob.name: blob.size for blob in read_bytecode(whole).blobs}
    digest = fill_blobs(template, tmp_path / "filled", sizes, lambda name: [(tmp_path / name).read_bytes()])
    assert (tmp_path / "filled").read_bytes() == whole.read_bytes()
    assert bytes.fromhex(digest) == (whole.parent / "main.hash").read_bytes()
