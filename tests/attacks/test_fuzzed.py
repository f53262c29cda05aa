"""Whatever bytes a reader meets, it ends well or in an AnequantError: the targets of `make fuzz`, damaged.

Three kinds of damage: to bytes, to the values of a JSON file, and to the fields of a protobuf.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fuzz_targets import Target, build_targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anequant.checkpoints.header import BITS, read_header
from anequant.errors import AnequantError
from anequant.targets.coreml.toolkit import Model_pb2

EXAMPLES = {"decoder": 12, "meta": 20, "weights": 20, "tensors": 25, "config": 25}
OTHERS = 60
NAMES = (
    "anequant", "calibration", "config", "decoder", "header", "index", "json", "manifest", "meta", "model",
    "rotations", "safetensors", "tensors", "toml", "weights", "yaml",
)  # fmt: skip
JSON_NAMES = ("anequant", "calibration", "config", "header", "index", "json", "manifest")
PROTOBUF_NAMES = ("model", "decoder")

NUMBERS = st.one_of(st.integers(-3, 3), st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**30]), st.floats())
WORDS = st.one_of(st.text(max_size=6), st.sampled_from(["../x", "/etc/passwd", "\x1b[2J", "a" * 600, "C:x"]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=5,
)
EDIT = st.tuples(
    st.sampled_from(["replace", "insert", "delete", "repeat", "cut"]),
    st.floats(0, 1),
    st.integers(1, 16),
    st.binary(min_size=1, max_size=16),
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Target, bytes]]:
    built = build_targets(tmp_path_factory.mktemp("fuzz"))
    assert tuple(built) == NAMES
    return {name: (target, target.file.read_bytes()) for name, target in built.items()}


def limits(name: str) -> settings:
    health = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=EXAMPLES.get(name, OTHERS), deadline=None, suppress_health_check=health)


@pytest.mark.parametrize("name", NAMES)
def test_the_targets_read_what_is_sound(targets: dict[str, tuple[Target, bytes]], name: str) -> None:
    target, sound = targets[name]
    target.file.write_bytes(sound)
    if name == "anequant":
        with pytest.raises(AnequantError, match="holds an impossible recipe"):
            target.file.write_bytes(sound.replace(b'"bits": 4', b'"bits": 5'))
            target.read()
        target.file.write_bytes(sound)
    target.read()


@pytest.mark.parametrize("name", NAMES)
def test_damaged_bytes(targets: dict[str, tuple[Target, bytes]], name: str) -> None:
    target, sound = targets[name]

    @limits(name)
    @given(st.lists(EDIT, min_size=1, max_size=4))
    def check(edits: list[tuple[str, float, int, bytes]]) -> None:
        content = sound
        for kind, share, length, new in edits:
            begin = int(share * len(content))
            end = begin + (0 if kind == "insert" else length)
            middle = {"delete": b"", "repeat": content[begin:end] * 2, "cut": b""}.get(kind, new)
            content = content[:begin] + middle + (b"" if kind == "cut" else content[end:])
        target(content)

    check()


@pytest.mark.parametrize("name", JSON_NAMES)
def test_damaged_values(targets: dict[str, tuple[Target, bytes]], name: str) -> None:
    target, sound = targets[name]

    @limits(name)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        values = json.loads(sound)
        for _ in range(data.draw(st.integers(1, 2))):
            values = changed(values, data)
        target(json.dumps(values).encode("utf-8", "surrogatepass"))

    check()


@pytest.mark.parametrize("name", PROTOBUF_NAMES)
def test_damaged_protobufs(targets: dict[str, tuple[Target, bytes]], name: str) -> None:
    target, sound = targets[name]

    @limits(name)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        program = Model_pb2.Model()
        program.ParseFromString(sound)
        for _ in range(data.draw(st.integers(1, 3))):
            change_message(program, data)
        target(program.SerializeToString(deterministic=True))

    check()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=8),
        st.tuples(
            st.sampled_from([kind for kind, bits in BITS.items() if bits >= 8]),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        max_size=6,
    )
)
def test_every_sound_header_is_read_as_it_is(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]]
) -> None:
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    found = {name: (info.dtype, list(info.shape)) for name, info in read_header(file).items()}
    assert found == tensors


def changed(value: Any, data: st.DataObject) -> Any:
    """The value with something in it, or all of it, replaced, renamed or removed."""
    keys = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    if not keys or data.draw(st.integers(0, 5)) == 0:
        return data.draw(JSON)
    key, kind = data.draw(st.sampled_from(keys)), data.draw(st.integers(0, 6))
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[data.draw(WORDS)] = value.pop(key)
    else:
        value[key] = changed(value[key], data)
    return value


def change_message(message: Any, data: st.DataObject) -> None:
    """Somewhere below: a field cleared, a part of a list removed or repeated, or another number or word."""
    fields = [field for field, _ in message.ListFields()]
    if not fields:
        return
    field = data.draw(st.sampled_from(fields))
    kind = data.draw(st.integers(0, 7))
    value = getattr(message, field.name)
    if kind == 0:
        message.ClearField(field.name)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        key = data.draw(st.sampled_from(sorted(value)))
        if kind == 1 or field.message_type.fields_by_name["value"].message_type is None:
            del value[key]
        else:
            change_message(value[key], data)
    elif field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED:
        place = data.draw(st.integers(0, len(value) - 1))
        if kind == 1:
            del value[place]
        elif kind == 2:
            value.extend([value[place]])
        elif field.message_type is not None:
            change_message(value[place], data)
        else:
            value[place] = scalar(value[place], data)
    elif field.message_type is not None:
        change_message(value, data)
    else:
        new = scalar(value, data)
        if new is not None:
            setattr(message, field.name, new)


def scalar(value: Any, data: st.DataObject) -> Any:
    """Another value that the field can hold."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return data.draw(st.sampled_from(["", "main", "x", "../x", "infer", value + "_"]))
    if isinstance(value, bytes):
        return data.draw(st.sampled_from([b"", value[:-1], value * 2, b"\xff" * len(value)]))
    if isinstance(value, float):
        return data.draw(st.sampled_from([0.0, -1.0, math.inf, math.nan]))
    return data.draw(
        st.sampled_from([0, 1, 2, 3, 7, 65536, 2**31 - 1, *([value + 1] if value < 2**31 - 1 else [])])
    )
