"""The hash of every file that `anequant convert` makes of the bundled model, with every recipe of configs/.

    python tools/measure/output_bytes.py before.json
    python tools/measure/output_bytes.py after.json --against before.json

Run it with the Python of each installation that is to be compared, on one machine. Reports, which hold times,
and the lines of cards and manifests that tell a command or versions are left out. With --against, a table
says for each recipe how many files are equal, and the exit code is 1 if any is not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CALIBRATION = ("--calib-samples", "8", "--calib-length", "128")
LOWERING = ("--context", "256", "--batch", "64")
UNSUPPORTED = 4
"""The exit code for a recipe that packages cannot hold, which is quantized alone."""

TIMED = ("report.html", "report.json")
LEFT_OUT = "anequant.json"
"""Compared without its "versions" and without the hashes of what is left out."""


def convert(recipe: Path, text: Path, folder: Path) -> dict[str, str]:
    """Convert with a recipe; return the hash of each file by its name in the output."""
    words = ["convert", "-o", str(folder), "--recipe", str(recipe), "--calib", str(text), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "anequant", *words, *CALIBRATION]
    ran = subprocess.run([*command, *LOWERING], env=environment, check=False)
    if ran.returncode == UNSUPPORTED:
        command[3:4] = ["quantize", str(text.parent / "tiny-qwen2")]
        ran = subprocess.run(command, env=environment, check=False)
    ran.check_returncode()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in TIMED)
    return {path.relative_to(folder).as_posix(): digest(path) for path in files}


def digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, or of what remains of a manifest."""
    content = path.read_bytes()
    if path.name == LEFT_OUT:
        values = json.loads(content)
        values.pop("versions")
        values["files"] = {name: hash_ for name, hash_ in values["files"].items() if name not in TIMED}
        content = json.dumps(values, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--against", type=Path, help="JSON file of another run")
    parser.add_argument("--recipes", type=Path, default=Path(__file__).parents[2] / "configs")
    arguments = parser.parse_args()
    text = Path(__file__).parents[2] / "anequant" / "bundled" / "sample.txt"
    found: dict[str, dict[str, str]] = {}
    for recipe in sorted(arguments.recipes.glob("*.toml")):
        with tempfile.TemporaryDirectory() as scratch:
            found[recipe.stem] = convert(recipe, text, Path(scratch) / "out")
        print(recipe.stem, len(found[recipe.stem]), flush=True)
    arguments.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if arguments.against is None:
        return 0
    before = json.loads(arguments.against.read_text(encoding="utf-8"))
    unequal = 0
    print("| recipe | files | equal | other |\n|---|---:|---:|---|")
    for recipe, files in found.items():
        names = {*files, *before.get(recipe, {})}
        other = sorted(name for name in names if files.get(name) != before.get(recipe, {}).get(name))
        print(f"| {recipe} | {len(names)} | {len(names) - len(other)} | {', '.join(other)} |")
        unequal += len(other)
    return int(unequal > 0)


if __name__ == "__main__":
    sys.exit(main())
