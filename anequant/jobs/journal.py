"""What of a long job is done: a file with a line for each unit of work, so that a later run goes on there.

A line is a JSON object: the unit's name, the data that later units need of it, and a checksum over both and
over the line before. A line is added when the files of its unit are on disk: bytes first, then the names of
their folders, then the line. So a crash leaves at most a last line without its end, which is dropped, and
files of a unit that has no line, which that unit writes again.

The first line is the fingerprint: all that decides the bytes of the output. Where it differs, nothing is
taken up.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from anequant.errors import UsageError
from anequant.jobs.control import Progress, Run, Unit, measure_shares
from anequant.jobs.process import give_back_memory, resident_bytes
from anequant.jobs.step import AnyStep, Result, State, Step, expect
from anequant.jobs.typed import from_plain, to_plain
from anequant.jobs.work_folder import JOURNAL, LOCK, START_OVER, DamagedWork, WorkFolder, sync

FINGERPRINT = "fingerprint"
TASKS = "tasks"
CHECK_LENGTH = 16

Value = TypeVar("Value")


@dataclass(frozen=True)
class Record:
    """A line of the journal: a unit's name, and the data that later units need of it, as JSON holds it."""

    unit: str
    data: Any


class Journal:
    """The units of one job in their order: those that an earlier run did, then those that this one does."""

    def __init__(self, work: WorkFolder, fingerprint: Mapping[str, Any], run: Run) -> None:
        """Take up the journal of `work`, or begin one.

        Raises UsageError naming what changed when the job is not the one that was begun, DamagedWork for a
        damaged journal; both leave it as it is. Raises what connecting the scheduler with a folder does.
        """
        self._work = work
        self._run = run
        self._synced: dict[Path, tuple[int, int]] = {}
        if not run.resume:
            work.clear()
        self._records, self._check = _read(work) if work.journal.is_file() else ([], "")
        self._next = 0
        self._steps: Sequence[AnyStep] = ()
        self._shares: dict[str, tuple[float, float]] = {}
        if not work.half_published:
            work.output.mkdir(exist_ok=True)
        self.output = work.written
        self._clear_tasks()
        self.scheduler = run.scheduler(self.tasks)
        if self._records:
            begun = self._records[0].data if self._records[0].unit == FINGERPRINT else {}
            _compare(begun, to_plain(fingerprint), work.target)
        self.unit(FINGERPRINT, lambda: dict(fingerprint), dict)

    @property
    def tasks(self) -> Path:
        """Where tasks and the scheduler keep their files; no unit keeps anything there."""
        return self._work.folder / TASKS

    @property
    def folder(self) -> Path:
        """Where units keep files that are not part of the output."""
        return self._work.folder

    @property
    def units(self) -> list[str]:
        """The names of the units that are done."""
        return [record.unit for record in self._records[1:]]

    def plan(self, steps: Sequence[AnyStep]) -> None:
        """Take the steps that the job is going to do, in their order."""
        expected = expect(steps)
        self._steps, self._shares = tuple(steps), measure_shares(expected)
        self._run.planned(expected)

    def do(self, step: Step[State, Result], state: State) -> Result:
        """Do the step that is due, or take over what an earlier run did of it.

        Raises as `unit`, KeyboardInterrupt when the job is to stop, and RuntimeError for a step that is not
        the next of the plan.
        """
        place = self._next - 1
        if place >= len(self._steps) or self._steps[place] is not step:
            raise RuntimeError(f"'{step.id}' is not step {place + 1} of the plan")
        replayed = self._next < len(self._records)
        self._stop_if_asked(replayed)
        begun, end = time.monotonic(), self._shares[step.id][1]
        progress = self._progress_of(step)
        progress(step.title, 0.0)
        result: Result = self.unit(step.id, lambda: step.run(state, progress), step.result)
        if replayed:
            step.replay(state, result)
        step.accept(state, result)
        seconds = 0.0 if replayed else time.monotonic() - begun
        told = tuple(step.tell(result))
        self._run.finished(Unit(step.id, step.stage, told, seconds, resident_bytes(), end, replayed))
        self._stop_if_asked(replayed)
        return result

    def _progress_of(self, step: AnyStep) -> Progress:
        """The Progress of a step, within its stage where the job has several."""
        whole, share = self._run.progress, self._shares[step.id]
        several = len({one.stage for one in self._steps}) > 1
        return whole.part(step.stage, *share) if several else whole.share(*share)

    def _stop_if_asked(self, replayed: bool) -> None:
        """Raises KeyboardInterrupt before and after a step that is done here, when the job is to stop."""
        if not replayed and self._run.stopping():
            raise KeyboardInterrupt

    def require_complete(self) -> None:
        """Raises RuntimeError unless every step of the plan is done."""
        if self._next - 1 != len(self._steps):
            raise RuntimeError(f"{self._next - 1} of the plan's {len(self._steps)} steps are done")

    def unit(self, name: str, run: Callable[[], Value], kind: type[Value]) -> Value:
        """Return what `run` returned, of type `kind` and as JSON holds it, now or when it ran in an earlier
        process.

        Raises DamagedWork when an earlier run did another unit in this place.
        """
        if self._next < len(self._records):
            record = self._records[self._next]
            if record.unit != name:
                raise _report_damage(self._work, f"has '{record.unit}' where '{name}' is due")
        else:
            record = Record(name, to_plain(run()))
            give_back_memory()
            self._sync_files()
            line, self._check = _make_line(record.unit, record.data, self._check)
            append_line(self._work.journal, line)
            self._records.append(record)
        self._next += 1
        value: Value = from_plain(kind, record.data)
        return value

    def done(self, name: str) -> bool:
        """Return whether the unit is among those that are done."""
        return any(record.unit == name for record in self._records)

    def _clear_tasks(self) -> None:
        """Begin with no files of tasks; a worker that an earlier run left at work finds its folder gone, and
        cannot keep this one from being made."""
        if self.tasks.exists():
            gone = self.tasks.with_name(f"{TASKS}.{uuid4().hex}")
            self.tasks.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        self.tasks.mkdir()

    def _sync_files(self) -> None:
        """Have the disk hold what is new since the last unit."""
        folders = set()
        for path in self._files():
            state = path.stat().st_size, path.stat().st_mtime_ns
            if self._synced.get(path) == state:
                continue
            if path.is_file():
                sync(path)
                self._synced[path] = state
            folders |= {parent for parent in path.parents if parent.is_relative_to(self.folder)}
        for folder in sorted(folders, reverse=True):
            sync(folder)

    def _files(self) -> Iterator[Path]:
        """What units have written; in `tasks` others may be at work."""
        for path in self.folder.iterdir():
            if path.name not in (JOURNAL, LOCK) and path.name.partition(".")[0] != TASKS:
                yield path
                yield from path.rglob("*")


def is_journal_of(work: WorkFolder, fingerprint: Mapping[str, Any]) -> bool:
    """Return whether the journal of `work` is sound and that of this job. Raises DamagedWork for a damaged
    one."""
    records, _ = _read(work)
    return bool(records) and records[0] == Record(FINGERPRINT, to_plain(fingerprint))


def append_line(path: Path, line: str) -> None:
    """Add a line to the journal; it is on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def _read(work: WorkFolder) -> tuple[list[Record], str]:
    """Return the records and the last checksum, and cut off a last line without its end."""
    raw = work.journal.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(work.journal, len(whole))
    records, check = [], ""
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            values = json.loads(text)
            record = Record(values["unit"], values["data"])
            line, check = _make_line(record.unit, record.data, check)
        except (ValueError, TypeError, KeyError) as error:
            raise _report_damage(work, f"is damaged in line {number}") from error
        if line.encode() != text + b"\n":
            raise _report_damage(work, f"is damaged in line {number}")
        records.append(record)
    return records, check


def _make_line(unit: str, data: Any, previous: str) -> tuple[str, str]:
    """Return the line of a unit and its checksum."""
    digest = hashlib.sha256(json.dumps([previous, unit, data]).encode()).hexdigest()[:CHECK_LENGTH]
    return json.dumps({"unit": unit, "data": data, "check": digest}) + "\n", digest


def _report_damage(work: WorkFolder, problem: str) -> DamagedWork:
    return DamagedWork(f"the journal of an interrupted run for '{work.target}' {problem}", work.folder)


def _compare(begun: Any, wanted: Any, target: Path) -> None:
    """Raises UsageError naming the first part of the fingerprint that is not what it was."""
    changed = find_difference(begun, wanted)
    if changed is not None:
        raise UsageError(
            f"an interrupted run for '{target}' had {changed}",
            remedy=f"repeat the command that was interrupted, or {START_OVER}",
        )


def find_difference(begun: Any, wanted: Any) -> str | None:
    """Return the first part of a fingerprint that is not what it was, and how many there are; None for the
    same."""
    before, now = dict(_leaves(begun)), dict(_leaves(wanted))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if not changed:
        return None
    key = changed[0]
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return f"{key} {before.get(key)!r}, this one has {now.get(key)!r}{more}"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested object by its dotted name."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        yield from _leaves(item, f"{name}.{key}" if name else key)
