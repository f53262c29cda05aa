"""A process of its own for everything that Apple's package does: `python -m anequant.targets.coreai.worker`.

The package, a beta, aborts when its process ends, now and then, and may crash or hang on what it is given.
Here it takes nothing with it. Without torch, it starts in a second.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

AUTHOR, RUN, DESCRIBE = "author", "run", "describe"


def main() -> None:
    """Do one job; the process ends without what Python and the package do at its end."""
    kind, *arguments = sys.argv[1:]
    if kind == AUTHOR:
        from anequant.jobs.typed import from_plain
        from anequant.targets.coreai.design import Design
        from anequant.targets.coreai.program.author import author

        design, asset = map(Path, arguments)
        author(from_plain(Design, json.loads(design.read_text(encoding="utf-8"))), asset)
    elif kind == RUN:
        from anequant.targets.coreai.execute import serve

        serve(Path(arguments[0]))
    elif kind == DESCRIBE:
        from anequant.targets.coreai.describe import describe

        describe(*map(Path, arguments))
    os._exit(0)


if __name__ == "__main__":
    main()
