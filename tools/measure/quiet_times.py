"""Seconds of `w4-ane` on a machine that does nothing else, with a thread for each of two cores.

    python tools/measure/quiet_times.py MODEL TEXT CALIBRATION --json docs/measured/quiet.json

The runs of `compare_quality.py` have one thread each and share the machine. What else is measured, and how:
see `quality_runs.py`.
"""

from __future__ import annotations

from typing import Any

from measured import when_and_where
from quality_runs import Row, run_table

DEFAULT = Row("`w4-ane`", "the default")
TUNED = Row("`w4-ane --tune 100`", "distilled", overrides={"tune": 100})


def sentence(results: dict[str, Any]) -> str:
    """What a file's results say, in words."""
    seconds = {run["row"]: run["seconds"] for run in results["runs"]}
    return (
        f"On a quiet machine `w4-ane` takes {seconds[DEFAULT.label]:.0f} s and `--tune 100` "
        f"{seconds[TUNED.label]:.0f} s (`python tools/measure/quiet_times.py`, "
        f"{when_and_where(results['machine'])})."
    )


if __name__ == "__main__":
    run_table([DEFAULT, TUNED], __doc__, jobs=1, threads=2)
