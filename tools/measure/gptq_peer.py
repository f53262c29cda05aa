"""What gptqmodel makes of a model, and what it takes: run by the interpreter that it is installed for.

    python gptq_peer.py MODEL TOKENS OUTPUT [--group 128] [--float FOLDER]

TOKENS is a JSON file of token windows. With --float the float model is held in float32, not in bfloat16 as
gptqmodel would, and the quantized one is also written as float32 weights, which anequant reads. Seconds and
peak memory are those of quantizing and writing OUTPUT.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it would take one, which it then refuses

import gptqmodel
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.utils.model_dequant import dequantize_model
from safetensors import safe_open

BITS = 4
PACKED = (".qweight", ".qzeros", ".scales")


def count_bits(folder: Path) -> int:
    """Count what is stored of the quantized weights: codes, scales and zero points."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is no dict)
                if name.endswith(PACKED):
                    total += 8 * tensors.get_tensor(name).nbytes
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--float", type=Path)
    options = parser.parse_args()
    windows = json.loads(options.tokens.read_text(encoding="utf-8"))
    begun = time.perf_counter()
    config = QuantizeConfig(bits=BITS, group_size=options.group)
    dtype = "auto" if options.float is None else torch.float32
    loaded = GPTQModel.load(options.model, config, device="cpu", dtype=dtype)
    loaded.quantize([{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows])
    loaded.save(str(options.output))
    found = {
        "seconds": time.perf_counter() - begun,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "version": gptqmodel.__version__,
        "group": options.group,
        "projection_bits": count_bits(options.output),
    }
    if options.float is not None:
        dequantize_model(options.output, options.float, target_dtype=torch.float32)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
