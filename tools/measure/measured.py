"""What the measuring scripts share: where and when they ran, and how docs/measured/ keeps what they found."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
DOCS = REPOSITORY / "docs"
RESULTS = DOCS / "measured"
PACKAGES = ("anequant", "torch", "transformers", "coremltools")


def machine(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Processor, cores, memory, versions of Python and of `packages`, and the date in UTC. Linux only."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory": f"{memory / 1e9:.0f} GB",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def when_and_where(about: dict[str, Any]) -> str:
    """`2026-11-25 on 2 cores of an AMD EPYC`, of what `machine` gave."""
    cpu = about["cpu"]
    article = "an" if cpu[:1].lower() in "aeiou" else "a"
    return f"{about['date']} on {about['cores']} cores of {article} {cpu}"


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
