"""Who does the independent parts of a job, by the name that a user gives: this process, or a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from anequant.errors import UsageError, quote
from anequant.jobs.control import drop_note
from anequant.jobs.tasks import Schedulers, local

LOCAL, DASK = "local", "dask://"


@contextmanager
def open_scheduler(name: str, note: Callable[[str], None] = drop_note) -> Iterator[Schedulers]:
    """Schedulers by name: `local`, or `dask://host:port`, with a connection until the block ends; `note` is
    then told who did how many tasks.

    Raises UsageError for another name, for workers that differ from this process and when dask is not
    installed, ResourceError when nobody answers or nobody works there.
    """
    if name == LOCAL:
        yield local
        return
    if not name.startswith(DASK):
        raise UsageError(f"there is no scheduler {quote(name)}", remedy=f"use {LOCAL} or {DASK}HOST:PORT")
    try:
        import distributed
    except ImportError as error:
        raise UsageError(
            "a cluster needs dask, which is not installed", remedy="pip install 'anequant[cluster]'"
        ) from error
    del distributed
    from anequant.jobs.dask_scheduler import connect

    with connect(name.removeprefix(DASK)) as cluster:
        yield cluster.within
        for worker, count in sorted(cluster.done.items()):
            note(f"{count} task{'s' if count > 1 else ''} done by worker {worker}")
