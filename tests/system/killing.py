"""Runs a job on the bundled model in child processes, kills them with SIGKILL, and lets others go on.

A script, so that the process that forks has one thread and has imported everything: each child costs its
work alone. It prints one JSON object; the tests compare.

    python killing.py FOLDER '{"job": "convert", "recipe": "w4-nearest", "keys": {}, "every": 1}'
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anequant.checkpoints import writer
from anequant.checkpoints.places import REPORT_DATA, REPORT_PAGE
from anequant.checkpoints.source import resolve_source
from anequant.errors import AnequantError
from anequant.jobs import journal
from anequant.jobs.control import Run
from anequant.jobs.work_folder import WorkFolder
from anequant.lower_options import LowerOptions
from anequant.pipeline import converting
from anequant.pipeline.quantize import quantize
from anequant.recipe import Calibration
from anequant.recipe_files import load_recipe
from anequant.report.page import report_layers
from anequant.report.page import write_report as report_module
from anequant.report.page.conversion_report import convert_and_report
from anequant.request import Request
from anequant.targets.coreml import build as lower_package
from anequant.targets.coreml.program.package import save_package

AT_ONCE = 2
CALIBRATION = Calibration(("self",), samples=3, length=16)
SIZES = LowerOptions(context=16, batch=8, chunks=2)


Start = Callable[[Path, list[str]], None]
"""Run a job with an output and a list that gets its notes."""


def kill_matrix(folder: Path, job: str, recipe: str, keys: dict[str, Any], every: int) -> dict[str, Any]:
    """Kill a job after each of its journal records in turn, so that each process does one unit.

    What every `every`-th kill leaves, and where `between` has one for the next unit, is copied; another
    process goes on with the copy to the end. Yields the units of an uninterrupted run, and by place of the
    kill how that was, what it left, and what differs from the uninterrupted run in the end.
    """
    run = _job(job, recipe, keys)
    units = _uninterrupted(run, folder / "whole")
    results: dict[str, Any] = {}
    running: dict[int, str] = {}
    for number, name in enumerate(units, 1):
        place = f"after {name}"
        status = _killed(lambda: _kill_after(1), lambda: run(folder / "row" / "out", []))
        branches: list[tuple[str, Callable[[], None] | None]] = []
        if number % every == 0 or number == len(units):
            branches.append((place, None))
        following = [*units, "publish"][number]
        if every == 1 and following in BETWEEN:
            branches.append((f"in {following}", BETWEEN[following]))
        for branch, kill in branches:
            home = folder / branch.replace(" ", "-")
            shutil.copytree(folder / "row", home)
            if len(running) == AT_ONCE:
                _collect(running, results, folder)
            child = os.fork()
            if not child:
                _in_child(partial(_go_on, folder, home, status, kill, run))
            running[child] = branch
    while running:
        _collect(running, results, folder)
    return {"units": units, "kills": results}


def differing(one: Path, other: Path) -> list[str]:
    """Files and folders that are not in both with the same bytes; a report tells how long its run took, so it
    must only be there."""
    files = [
        {
            path.relative_to(root).as_posix(): path.read_bytes() if _is_compared(path) else None
            for path in root.rglob("*")
        }
        for root in (one, other)
    ]
    names = files[0].keys() | files[1].keys()
    return sorted(name for name in names if files[0].get(name, b"-") != files[1].get(name, b"-"))


def _is_compared(path: Path) -> bool:
    return path.is_file() and path.name not in (REPORT_PAGE, REPORT_DATA)


def _job(job: str, recipe: str, keys: dict[str, Any]) -> Start:
    source, chosen = resolve_source(None), load_recipe(recipe, keys)

    def run(output: Path, notes: list[str]) -> None:
        control = Run(note=notes.append)
        if job == "convert":
            convert_and_report(Request(source, chosen, CALIBRATION, lowering=SIZES), output, control)
        else:
            quantize(Request(source, chosen, CALIBRATION), output, control)

    return run


def _uninterrupted(run: Start, output: Path) -> list[str]:
    """The units of a run in the order of their records."""
    units: list[str] = []
    append = journal.append_line

    def listed(path: Path, line: str) -> None:
        units.append(json.loads(line)["unit"])
        append(path, line)

    journal.append_line = listed
    run(output, [])
    journal.append_line = append
    return units


def _go_on(folder: Path, home: Path, status: int, kill: Callable[[], None] | None, run: Start) -> None:
    """Go on with what a kill left in `home`; with `kill`, first in a process that it ends in turn."""
    if kill is not None:
        status = _killed(kill, lambda: run(home / "out", []))
    left = sorted(path.name for path in home.iterdir())
    notes: list[str] = []
    run(home / "out", notes)
    result = {
        "signal": status,
        "left by the kill": left,
        "notes": notes,
        "differs": differing(folder / "whole", home / "out"),
        "left": sorted(path.name for path in home.iterdir()),
    }
    (folder / f"{home.name}.json").write_text(json.dumps(result))
    shutil.rmtree(home)


def _killed(kill: Callable[[], None], run: Callable[[], None]) -> int:
    """The signal that ended a child process, 0 for none."""
    child = os.fork()
    if not child:
        kill()
        _in_child(run)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _kill_after(number: int) -> None:
    append, count = journal.append_line, 0

    def counted(path: Path, line: str) -> None:
        nonlocal count
        append(path, line)
        count += 1
        if count == number:
            _die()

    journal.append_line = counted


def _kill_in_line(number: int) -> None:
    append, count = journal.append_line, 0

    def halved(path: Path, line: str) -> None:
        nonlocal count
        count += 1
        append(path, line[: len(line) // 2] if count == number else line)
        if count == number:
            _die()

    journal.append_line = halved


def _kill_in_tensor(name: str) -> None:
    write = writer.CheckpointWriter.write

    def halved(self: writer.CheckpointWriter, tensor: str, values: torch.Tensor) -> None:
        if tensor == name:
            write(self, tensor, values[: len(values) // 2])
            self.flush()
            _die()
        write(self, tensor, values)

    _replace(writer.CheckpointWriter, "write", halved)


def _kill_in_package(number: int) -> None:
    count = 0

    def broken(program: Any, path: Path, metadata: Any) -> None:
        nonlocal count
        count += 1
        save_package(program, path, metadata)
        if count == number:
            weights = next(path.rglob("weight.bin"))
            os.truncate(weights, weights.stat().st_size // 2)
            _die()

    _replace(lower_package, "save_package", broken)


def _kill_in_report() -> None:
    """When its data is there and its page is not."""
    replace = report_module.replace_file

    def halved(path: Path, text: str) -> None:
        if path.name == REPORT_PAGE:
            _die()
        replace(path, text)

    report_module.replace_file = halved


def _kill_in_publish() -> None:
    def killed(self: WorkFolder) -> None:
        _die()

    _replace(WorkFolder, "publish", killed)


BETWEEN = {
    "layer 3 of 4": lambda: _kill_in_tensor("model.layers.2.mlp.up_proj.weight"),
    "checkpoint files": lambda: _kill_in_line(1),
    "chunk 1 of 2": lambda: _kill_in_package(1),
    "report": lambda: _kill_in_report(),
    "publish": lambda: _kill_in_publish(),
}
"""Kills inside a unit, by its name."""


def _replace(owner: object, name: str, new: object) -> None:
    """Replace an attribute for the rest of the process."""
    setattr(owner, name, new)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_child(run: Callable[[], object]) -> None:
    """Run and leave the process, whatever happens."""
    try:
        run()
    except AnequantError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(2)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def _collect(running: dict[int, str], results: dict[str, Any], folder: Path) -> None:
    child, _ = os.wait()
    place = running.pop(child)
    file = folder / f"{place.replace(' ', '-')}.json"
    results[place] = json.loads(file.read_text()) if file.is_file() else None


def main(words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    _replace(converting, "SAMPLE_WINDOWS", 1)
    _replace(converting, "SAMPLE_LENGTH", 16)
    report_layers.WINDOWS, report_layers.LENGTH = 1, 16
    print(json.dumps(kill_matrix(Path(words[0]), **json.loads(words[1]))))


if __name__ == "__main__":
    main(sys.argv[1:])
