"""What a worker of a cluster does with a task, and what it has to have in common with whoever sent it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from anequant.errors import ResourceError, UsageError
from anequant.jobs.process import give_back_memory
from anequant.jobs.task_files import paths_in, read_value, write_value
from anequant.versions import installed_versions

SENT_BY = ("dask", "distributed")


@dataclass(frozen=True)
class Order:
    """A task that was sent: its file, what all workers have to be like, and threads of torch to use, as on
    how many share a sum its last digits depend."""

    file: Path
    facts: Mapping[str, str]
    threads: int


@dataclass(frozen=True)
class Answer:
    """The file of a result, beside that of its task, and who made it."""

    file: Path
    worker: str


def collect_facts() -> dict[str, str]:
    """All that bytes depend on beside a task: versions, and the instructions that torch uses."""
    sent = {package: importlib.metadata.version(package) for package in SENT_BY}
    machine = {"machine": platform.machine(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return {**installed_versions(), **sent, **machine}


def require_facts(worker: str, wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raises UsageError naming the worker and what is not as `wanted`."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UsageError(
                f"worker {worker} has {name} {found.get(name)}, and this process has {value}",
                remedy="use the same environment and the same kind of processor on all machines",
            )


def require_one_thread(worker: str, threads: int) -> None:
    """Raises UsageError naming a worker that does several tasks at once, which share what is global."""
    if threads != 1:
        raise UsageError(
            f"worker {worker} does {threads} tasks at once",
            remedy="start workers with --nthreads 1, and several on a machine that has room for them",
        )


def require_seen(worker: str, path: Path, seen: bool) -> None:
    """Raises ResourceError naming the worker when it has not `seen` the path."""
    if not seen:
        raise ResourceError(
            f"worker {worker} does not see '{path}'",
            remedy="keep models and outputs in a folder that all machines share, under the same name",
        )


def run_order(function: Callable[[Any], Any], order: Order) -> Answer:
    """Do a task in a worker; what is left behind when the worker is lost has a name of its own."""
    from distributed import get_worker

    worker = get_worker().address
    require_one_thread(worker, get_worker().state.nthreads)
    require_facts(worker, order.facts, collect_facts())
    require_seen(worker, order.file, order.file.exists())
    torch.set_num_threads(order.threads)
    task = read_value(order.file)
    for path in paths_in(task):
        require_seen(worker, path, path.exists())
    file = order.file.with_name(f"{order.file.name}.{uuid4().hex}")
    write_value(file, function(task))
    del task
    give_back_memory()
    return Answer(file, worker)
