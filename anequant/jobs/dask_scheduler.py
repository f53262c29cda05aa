"""Tasks on a dask.distributed cluster whose workers share a folder with this process.

Files are this process's: it writes a task's, and removes it and that of the result when it has read the
result. So a task can be done again by another worker when the one that did it is lost.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from distributed import Client, Future, KilledWorker, Worker, WorkerPlugin, wait
from distributed import TimeoutError as Late
from distributed.client import ClosedClientError, FutureCancelledError
from distributed.comm.core import CommClosedError

from anequant.errors import ResourceError, UsageError
from anequant.jobs.task_files import passing_folder, read_value, write_value
from anequant.jobs.task_worker import (
    Answer,
    Order,
    collect_facts,
    require_facts,
    require_one_thread,
    require_seen,
    run_order,
)
from anequant.jobs.tasks import Result, Scheduler, Task, TasksLost

CONNECT_SECONDS = 10.0
WORKER_SECONDS = 60.0
"""How long a job waits while no worker takes its tasks: one that is lost may be started again."""

POLL_SECONDS = 1.0
AHEAD = 2
"""Tasks for each worker that are not done: the one it does, and the one that it does next."""

LOGGERS = ("distributed", "tornado")


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """The cluster whose scheduler is at host:port. Raises as `open_scheduler` does."""
    with _quiet():
        try:
            client = Client(f"tcp://{address}", timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ResourceError(
                f"no dask scheduler answers at '{address}'",
                remedy="start one with `dask scheduler`, and name its host and port",
            ) from error
        try:
            cluster = Cluster(client, address)
            cluster.check_workers()
            client.register_plugin(Unwatched())
            yield cluster
        finally:
            client.close(timeout=CONNECT_SECONDS)


@contextmanager
def _quiet() -> Iterator[None]:
    """What goes wrong is told by errors: dask's own lines would get between those of a job."""
    levels = {name: logging.getLogger(name).level for name in _loggers()}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _loggers() -> list[str]:
    return [name for name in logging.root.manager.loggerDict if name.split(".")[0] in LOGGERS]


class Unwatched(WorkerPlugin):  # type: ignore[misc]
    """Workers without dask's profiler: it holds on to the variables of running functions, and coremltools
    finishes a package when its variable goes."""

    name = "anequant-unwatched"

    def setup(self, worker: Worker) -> None:
        profiler = worker.periodic_callbacks.pop("profile", None)
        if profiler is not None:
            profiler.stop()


class Cluster:
    """Workers behind a scheduler; `done` counts the tasks that each did."""

    def __init__(self, client: Client, address: str) -> None:
        self.done: Counter[str] = Counter()
        self._client = client
        self._address = address
        self._facts = collect_facts()

    def within(self, folder: Path) -> Scheduler:
        """Raises ResourceError for a worker that does not see the folder."""
        with passing_folder(folder) as probe:
            for worker, seen in self._ask(Path.exists, probe).items():
                require_seen(worker, probe, seen)
        return _Tasks(self, folder)

    def check_workers(self) -> None:
        """Raises UsageError for a worker that is not like this process, ResourceError when there is none."""
        workers = self.workers()
        if not workers:
            raise ResourceError(
                f"the dask scheduler at '{self._address}' has no workers",
                remedy=f"start some with `dask worker tcp://{self._address} --nthreads 1`",
            )
        for worker, info in workers.items():
            require_one_thread(worker, info["nthreads"])
        for worker, found in self._ask(collect_facts).items():
            require_facts(worker, self._facts, found)

    def workers(self) -> Mapping[str, Mapping[str, Any]]:
        """What the scheduler knows of every worker, by address."""
        try:
            return dict(self._client.scheduler_info(n_workers=-1)["workers"])
        except (OSError, ClosedClientError) as error:
            raise self._gone() from error

    def submit(self, function: Callable[[Task], Result], file: Path) -> Future:
        order = Order(file, self._facts, torch.get_num_threads())
        key = f"{function.__name__}-{uuid4().hex}"
        return self._client.submit(run_order, function, order, key=key, pure=False)

    def wait(self, futures: Iterable[Future]) -> None:
        """Until one of them is done, or a moment."""
        with self._client.as_current(), suppress(Late, FutureCancelledError):
            wait(list(futures), timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")

    def cancel(self, futures: Iterable[Future]) -> None:
        """Have nobody begin with these; who is at work on one goes on for nothing."""
        if self._client.status == "running":
            self._client.cancel(list(futures))

    def answer(self, future: Future) -> Answer:
        """Return the answer of a future that is done. Raises what its task raised."""
        try:
            answer: Answer = future.result()
        except KilledWorker as error:
            raise ResourceError(
                "workers were lost while they did one task, each time another",
                where=str(error.last_worker.address),
                remedy="see what ended them; for want of memory, take more --chunks or larger machines",
            ) from error
        except (FutureCancelledError, CommClosedError) as error:
            raise self._gone() from error
        self.done[answer.worker] += 1
        return answer

    def _ask(self, function: Callable[..., Any], *arguments: object) -> Mapping[str, Any]:
        """Ask every worker, and return by address what those answer that are not lost just now."""
        answers = self._client.run(function, *arguments, on_error="return")
        for worker, answer in answers.items():
            if isinstance(answer, Exception) and not isinstance(answer, OSError):
                raise UsageError(
                    f"worker {worker} cannot run anequant: {answer}",
                    remedy="use the same environment on all machines",
                ) from answer
        return {worker: answer for worker, answer in answers.items() if not isinstance(answer, OSError)}

    def _gone(self) -> TasksLost:
        return TasksLost(
            f"the dask scheduler at '{self._address}' no longer answers",
            remedy="start it and its workers again; the same command then goes on where it stopped",
        )


class _Tasks:
    """A Scheduler whose files are in a folder."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        with passing_folder(self._folder) as folder:
            files: dict[Future, Path] = {}
            try:
                yield from self._results(function, enumerate(tasks), folder, files)
            finally:
                self._cluster.cancel(files)

    def _results(
        self,
        function: Callable[[Task], Result],
        tasks: Iterator[tuple[int, Task]],
        folder: Path,
        files: dict[Future, Path],
    ) -> Iterator[Result]:
        """`files` are those of the tasks that are under way, by their futures, in order."""
        waiting: deque[Future] = deque()
        patience = _Patience(self._cluster)
        while True:
            unfinished = sum(not future.done() for future in waiting)
            room = AHEAD * max(1, len(self._cluster.workers())) - unfinished
            for number, task in itertools.islice(tasks, max(0, room)):
                file = (folder / str(number)).absolute()
                write_value(file, task)
                waiting.append(self._cluster.submit(function, file))
                files[waiting[-1]] = file
            if not waiting:
                return
            if not waiting[0].done():
                self._cluster.wait(future for future in waiting if not future.done())
                patience.check()
                continue
            future = waiting.popleft()
            answer = self._cluster.answer(future)
            result = read_value(answer.file)
            answer.file.unlink()
            files.pop(future).unlink()
            del future
            yield result
            del result


class _Patience:
    """Ends when nobody works."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._seen = time.monotonic()

    def check(self) -> None:
        """Raises TasksLost when nobody has worked for a while."""
        workers = self._cluster.workers()
        if any(map(_works, workers.values())):
            self._seen = time.monotonic()
        if time.monotonic() - self._seen > WORKER_SECONDS:
            what = "all are paused for want of memory" if workers else "all are gone"
            raise TasksLost(
                f"no worker has taken a task for {WORKER_SECONDS:.0f} seconds: {what}",
                remedy="start some with --memory-limit 0; the same command then goes on where it stopped",
            )


def _works(info: Mapping[str, Any]) -> bool:
    counts = info["metrics"].get("task_counts", {})
    return bool(info["status"] == "running" or counts.get("executing"))
