"""Coverage-guided fuzzing of every reader of `fuzz_targets` with atheris, one process after the other.

    python tools/fuzz.py [--seconds 600] [TARGET ...]

The time is shared among the targets. Whatever escapes a reader and is not an AnequantError ends its process
with the traceback; the bytes that did it are kept in fuzz-crashes/, to be run again with
`python tools/fuzz.py --run TARGET FILE`. The exit code is 1 if there was any.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

CRASHES = Path("fuzz-crashes")
MEMORY_MB, ONE_INPUT_SECONDS = 3000, 20
INSTRUMENTED = ["anequant"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--run", action="store_true", help="read FILE once by TARGET")
    parser.add_argument("--in-process", metavar="PLACE", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", metavar="TARGET", help="all by default")
    options = parser.parse_args()
    if options.in_process:
        return fuzz(options.names[0], Path(options.in_process), options.seconds)
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        from fuzz_targets import build_targets

        place = Path(folder) / "files"
        place.mkdir()
        targets = build_targets(place)
        if options.run:
            name, file = options.names
            targets[name](Path(file).read_bytes())
            return 0
        names = options.names or list(targets)
        return max([start(name, options.seconds // len(names)) for name in names])


def start(name: str, seconds: int) -> int:
    """Fuzz one target in a process of its own; 1 if something escaped."""
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
        command = [sys.executable, __file__, "--in-process", folder, "--seconds", str(seconds), name]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    done = [line for line in result.stderr.splitlines() if line.startswith(("Done", "stat::number_of"))]
    print(f"{name}: {'clean, ' + done[0] if result.returncode == 0 and done else 'FAILED'}", flush=True)
    if result.returncode:
        print(result.stdout[-4000:], result.stderr[-6000:], flush=True)
    return int(result.returncode != 0)


def fuzz(name: str, folder: Path, seconds: int) -> int:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from fuzz_targets import build_targets

    place = folder / "files"
    place.mkdir(parents=True)
    target = build_targets(place)[name]
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "sound").write_bytes(target.file.read_bytes())
    CRASHES.mkdir(exist_ok=True)
    size = max(4096, 2 * target.file.stat().st_size)
    settings = {
        "max_total_time": seconds,
        "max_len": size,
        "len_control": 0,
        "timeout": ONE_INPUT_SECONDS,
        "rss_limit_mb": MEMORY_MB,
        "artifact_prefix": f"{CRASHES}/{name}-",
        "seed": 1,
    }
    arguments = [sys.argv[0], *(f"-{key}={value}" for key, value in settings.items()), str(seeds)]
    atheris.Setup(arguments, target)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
