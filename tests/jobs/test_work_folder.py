"""The folder in which an output is made: one process at a time, and a target that is never half there."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anequant.errors import ResourceError, UsageError
from anequant.jobs.output_folder import require_space
from anequant.jobs.work_folder import WorkFolder, is_full, staged_folder, work_folder
from anequant.quantization.weight_format import WeightFormat

HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def contents(folder: Path) -> dict[str, str | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
    }


def half_done(target: Path, *, output: bool = True) -> WorkFolder:
    """What a killed run leaves: a journal and an output."""
    work = WorkFolder(target)
    work.folder.mkdir()
    work.journal.write_text("a line\n")
    if output:
        work.output.mkdir()
        (work.output / "new").write_text("new")
    return work


def old(target: Path) -> None:
    target.mkdir()
    (target / "old").write_text("old")


def test_an_output_appears_whole(home: Path, source: Path) -> None:
    with staged_folder(home / "a" / "out", force=False, source=source) as folder:
        (folder / "file").write_text("x")
        assert not (home / "a" / "out").exists()
    assert contents(home) == {"a": None, "a/out": None, "a/out/file": "x"}


def test_an_error_leaves_nothing(home: Path, source: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        staged_folder(home / "a" / "out", force=False, source=source) as folder,
    ):
        (folder / "file").write_text("x")
        raise ZeroDivisionError
    assert contents(home) == {}


def test_force_exchanges(home: Path, source: Path) -> None:
    old(home / "out")
    with staged_folder(home / "out", force=True, source=source) as folder:
        (folder / "new").write_text("new")
    assert contents(home) == {"out": None, "out/new": "new"}


@pytest.mark.parametrize("failing", [1, 2])
def test_an_exchange_that_fails_keeps_the_old_output(
    home: Path, source: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    old(home / "out")
    rename, calls = Path.rename, 0

    def fails(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise PermissionError(errno.EPERM, "not permitted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with (
        pytest.raises(ResourceError, match="out' cannot be written: not permitted"),
        staged_folder(home / "out", force=True, source=source) as folder,
    ):
        (folder / "new").write_text("new")
    assert contents(home) == {"out": None, "out/old": "old"}


def test_a_crash_between_the_renames_loses_nothing(home: Path, source: Path) -> None:
    """The old output is put back, and the new one is there to go on with."""
    work = half_done(home / "out")
    old(work.replaced)
    with pytest.raises(UsageError, match="exists"), work_folder(home / "out", force=False, source=source):
        pytest.fail("it was let in")
    assert contents(home / "out") == {"old": "old"}
    with work_folder(home / "out", force=True, source=source) as found:
        assert contents(found.output) == {"new": "new"}
        found.publish()
    assert contents(home) == {"out": None, "out/new": "new"}


def test_a_crash_after_the_renames_leaves_the_new_output(home: Path, source: Path) -> None:
    work = half_done(home / "out", output=False)
    old(work.replaced)
    (home / "out").mkdir()
    (home / "out" / "new").write_text("new")
    with pytest.raises(UsageError, match="exists"), work_folder(home / "out", force=False, source=source):
        pytest.fail("it was let in")
    assert contents(home) == {"out": None, "out/new": "new"}


def test_an_old_output_outlives_work_that_is_thrown_away(home: Path, source: Path) -> None:
    """A crash between the renames, and a journal that is gone."""
    work = half_done(home / "out")
    work.journal.unlink()
    old(work.replaced)
    with pytest.raises(UsageError, match="exists"), work_folder(home / "out", force=False, source=source):
        pytest.fail("it was let in")
    assert contents(home) == {"out": None, "out/old": "old"}


def test_work_without_a_journal_is_thrown_away(home: Path, source: Path) -> None:
    work = half_done(home / "out")
    work.journal.unlink()
    with work_folder(home / "out", force=False, source=source) as found:
        assert not found.output.exists()
    assert contents(home) == {}


def test_work_with_a_journal_stays(home: Path, source: Path) -> None:
    half_done(home / "out")
    with (
        pytest.raises(ZeroDivisionError),
        work_folder(home / "out", force=False, source=source) as found,
    ):
        assert contents(found.output) == {"new": "new"}
        raise ZeroDivisionError
    assert contents(home / ".out.partial" / "output") == {"new": "new"}


def test_one_process_at_a_time(home: Path, source: Path) -> None:
    work = half_done(home / "out")
    lock = work.folder / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        before = contents(home)
        with (
            pytest.raises(UsageError, match="out' is being written by another process"),
            work_folder(home / "out", force=True, source=source),
        ):
            pytest.fail("it was let in")
        assert contents(home) == before
        other.communicate()
    with work_folder(home / "out", force=False, source=source) as found:
        assert contents(found.output) == {"new": "new"}


def test_work_is_not_done_behind_a_link(home: Path, source: Path) -> None:
    (home / "elsewhere").mkdir()
    (home / ".out.partial").symlink_to(home / "elsewhere")
    with pytest.raises(UsageError, match="is a link"), work_folder(home / "out", force=False, source=source):
        pytest.fail("it was let in")
    assert contents(home / "elsewhere") == {}


def read_only(*args: Any, **options: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_place_that_cannot_be_written(home: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub, since root may write where the mode forbids it."""
    monkeypatch.setattr(Path, "mkdir", read_only)
    with (
        pytest.raises(UsageError, match="out' cannot be created: Read-only file system"),
        work_folder(home / "out", force=False, source=source),
    ):
        pytest.fail("it was let in")
    assert contents(home) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB; mounting one takes privileges that not every machine gives."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=64k", "anequant", str(place)]
    if mount is None or subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk(small_disk: Path, source: Path) -> None:
    with (
        pytest.raises(ResourceError, match="no space left for"),
        staged_folder(small_disk / "out", force=False, source=source) as folder,
    ):
        (folder / "big").write_bytes(bytes(1 << 20))
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_is_read_only(small_disk: Path, source: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with (
        pytest.raises(UsageError, match="cannot be created: Read-only file system"),
        work_folder(small_disk / "out", force=False, source=source),
    ):
        pytest.fail("it was let in")


def test_libraries_say_that_a_disk_is_full_in_their_own_words(small_disk: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from anequant.quantization.nearest import quantize_linear
    from anequant.targets.coreml.program.package import save_package
    from anequant.targets.coreml.program.parts import embeddings_program

    with pytest.raises(SafetensorError) as error:
        save_file({"a": torch.zeros(100_000)}, small_disk / "a")
    assert is_full(error.value)
    for path in small_disk.iterdir():
        path.unlink()
    weight = torch.randn(512, 256)
    table = quantize_linear(weight, None, WeightFormat(8, "uniform", "output"), "a")
    program = embeddings_program(table, 8)
    with pytest.raises(OSError) as full:
        save_package(program, small_disk / "a.mlpackage", {})
    assert is_full(full.value)
    assert not is_full(PermissionError(errno.EPERM, os.strerror(errno.EPERM)))


def test_room_is_asked_for_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(home)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    require_space(home / "out", 10_000)
    with pytest.raises(ResourceError, match=r"out' needs 10,001 bytes, and 10,000 are free"):
        require_space(home / "out", 10_001)
