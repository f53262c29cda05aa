"""Programs become .mlpackage folders with the same bytes for the same program."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from anequant.targets.coreml.program.streaming import streaming
from anequant.targets.coreml.toolkit import (
    TARGET,
    ConverterRegistry,
    Model_pb2,
    PassPipelineManager,
    Program,
    _mil_convert,
    ct,
    quiet_logging,
)

NO_SPACE = 1_000_000
"""Free bytes below which writing fails for want of space."""

MODEL_FILE = "Data/com.apple.CoreML/model.mlmodel"
WEIGHT_FILE = "Data/com.apple.CoreML/weights/weight.bin"


def save_package(program: Program, path: Path, metadata: Mapping[str, str]) -> None:
    """Convert a hand-built, fully typed program without any pass and save it to the new `path`.

    No pass runs because several rewrite what was meant: `fuse_conv_scale` folds scales into weights and
    `canonicalize_quantized_lut_pattern` splits one codebook into one per channel. What is written is not
    opened as an MLModel, which would expand variables in its path.
    """
    scratch = path.with_name(f".{path.name}.scratch")
    streamed = streaming(scratch, path / WEIGHT_FILE)
    with redirect_stderr(io.StringIO()), quiet_logging(), _scratch_at(scratch), streamed, _without_passes():
        _mil_convert(
            program,
            convert_from="milinternal",
            convert_to="mlprogram",
            registry=ConverterRegistry,
            modelClass=lambda path, **options: path,
            compute_units=ct.ComputeUnit.CPU_AND_NE,
            specification_version=TARGET.value,
            main_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
            package_dir=str(path),
        )
        _take_modes(path, scratch.stat().st_mode)
    _make_deterministic(path, metadata)


@contextmanager
def _without_passes() -> Iterator[None]:
    """Have coremltools run no pass, and not validate and print all of the program between them: that takes
    longer than writing it. It is validated when it is written."""
    before = PassPipelineManager.apply_pipeline
    PassPipelineManager.apply_pipeline = staticmethod(lambda program, pipeline: None)
    try:
        yield
    finally:
        PassPipelineManager.apply_pipeline = staticmethod(before)


@contextmanager
def _scratch_at(scratch: Path) -> Iterator[None]:
    """Have coremltools write its own copy of the weights there, and no longer than needed.

    It reports a full disk as a RuntimeError; raises OSError then.
    """
    before = tempfile.tempdir
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tempfile.tempdir = str(scratch)
    try:
        yield
    except RuntimeError as error:
        if shutil.disk_usage(scratch).free < NO_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch)) from error
        raise
    finally:
        tempfile.tempdir = before
        shutil.rmtree(scratch, ignore_errors=True)


def _take_modes(path: Path, mode: int) -> None:
    """Give all that is in a package the permissions of a new folder; coremltools lets only its owner read."""
    for part in path.rglob("*"):
        part.chmod(mode & (0o777 if part.is_dir() else 0o666))


def package_bytes(path: Path) -> tuple[int, int]:
    """Return the bytes of the weight file and of the graph."""
    return (path / WEIGHT_FILE).stat().st_size, (path / MODEL_FILE).stat().st_size


def _make_deterministic(path: Path, metadata: Mapping[str, str]) -> None:
    """Sort protobuf maps, keep our own metadata only, and derive manifest ids from what they name."""
    model = Model_pb2.Model()
    model_file = path / MODEL_FILE
    model.ParseFromString(model_file.read_bytes())
    recorded = model.description.metadata.userDefined
    recorded.clear()
    recorded.update(metadata)
    model_file.write_bytes(model.SerializeToString(deterministic=True))

    manifest_file = path / "Manifest.json"
    manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    entries, ids = {}, {}
    for old, entry in manifest["itemInfoEntries"].items():
        ids[old] = str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])).upper()
        entries[ids[old]] = entry
    manifest["itemInfoEntries"] = entries
    manifest["rootModelIdentifier"] = ids[manifest["rootModelIdentifier"]]
    manifest_file.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")
