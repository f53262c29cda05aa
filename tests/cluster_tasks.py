"""Tasks for test_scheduler, in a module that workers import."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch

from anequant.errors import InputError
from anequant.quantization.linear import QuantizedLinear

WAIT = 0.2


def whoami(task: int) -> tuple[int, int, int]:
    """The task, the process that does it and its threads."""
    time.sleep(WAIT)
    return task, os.getpid(), torch.get_num_threads()


def doubled(linear: QuantizedLinear) -> QuantizedLinear:
    return replace(linear, codebook=2 * linear.codebook)


def refuse(task: int) -> int:
    if task == 2:
        raise InputError("'x' is no model", where="x", remedy="name another")
    return task


def die_once(task: tuple[Path, int]) -> int:
    """Kills its worker at the task of number 3, unless one has been killed."""
    folder, number = task
    time.sleep(WAIT)
    if number == 3 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def leave_mark(task: tuple[Path, int]) -> int:
    folder, number = task
    (folder / str(number)).touch()
    time.sleep(WAIT)
    return number


def exists(task: Path) -> bool:
    return task.exists()
