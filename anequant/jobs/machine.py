"""What this machine lets one process use: cores and memory, within the limits of a container."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Memory:
    """Bytes; `available` is None where the system does not tell."""

    total: int
    available: int | None


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may run on, and no more than its container's share of time (cgroup v2)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    quota, _, period = _read_content(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, max(int(quota) // int(period), 1))
    return cores


def memory(cgroup: Path = CGROUP, meminfo: Path = MEMINFO) -> Memory:
    """Return the memory of the machine, or of the container where that is less (cgroup v2)."""
    lines = [line.split() for line in _read_content(meminfo).splitlines()]
    kilobytes = {parts[0]: int(parts[1]) for parts in lines if len(parts) > 1 and parts[1].isdigit()}
    available = kilobytes["MemAvailable:"] * 1024 if "MemAvailable:" in kilobytes else None
    if "MemTotal:" in kilobytes:
        total = kilobytes["MemTotal:"] * 1024
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = _read_content(cgroup / "memory.max"), _read_content(cgroup / "memory.current")
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        left = max(total - int(used), 0) if used.isdigit() else total
        available = left if available is None else min(available, left)
    return Memory(total, available)


def _read_content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def torch_threads(default: int) -> int:
    """Return the threads of a torch that loads, else `default`."""
    try:
        threads: int = importlib.import_module("torch").get_num_threads()
    except Exception:
        return default
    return threads
