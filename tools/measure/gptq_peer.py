"""What gptqmodel takes for a model: run by the interpreter that it is installed for, by `bench_gptq.py`.

python gptq_peer.py MODEL TOKENS OUTPUT
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it would take one, which it then refuses

import gptqmodel
from gptqmodel import GPTQModel, QuantizeConfig

BITS, GROUP = 4, 128


def main() -> None:
    model, tokens, output = sys.argv[1:]
    windows = json.loads(Path(tokens).read_text(encoding="utf-8"))
    begun = time.perf_counter()
    loaded = GPTQModel.load(model, QuantizeConfig(bits=BITS, group_size=GROUP), device="cpu")
    loaded.quantize([{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows])
    loaded.save(output)
    found = {
        "seconds": time.perf_counter() - begun,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "version": gptqmodel.__version__,
        "group": GROUP,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
