"""What llama.cpp makes of a model in float32: run by the interpreter that llama-cpp-python is installed for.

    python llama_cpp_peer.py MODEL TOKENS OUTPUT --float FOLDER [--type Q4_K_M] [--float-tables]

OUTPUT is the GGUF file, and FOLDER gets what it holds as float32 weights, which anequant reads. TOKENS are
not looked at: there is no importance matrix. With --float-tables embedding and head stay in float16. Rows of
q and k stay in the order of transformers, which rounding in blocks of a row does not see, so that the file is
not meant to be run. Seconds and peak memory are those of writing the two GGUF files.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # it is run without the package

from real_model import INNER, OUTER

NAMES = {theirs: ours for ours, theirs in (*OUTER.items(), *INNER.items())}
"""Transformers' names and GGUF's; those of a layer without what comes before."""

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def rename(name: str) -> str:
    """Return GGUF's name of a tensor of transformers."""
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    layer, _, inner = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[inner]}.weight"


def write_gguf(config: dict[str, Any], tensors: dict[str, Any], file: Path) -> None:
    """Write a llama in float32 with what llama.cpp has to know to quantize it."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for name, weight in tensors.items():
        writer.add_tensor(rename(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, output: Path, kind: str, *, float_tables: bool) -> None:
    """Raises ValueError when llama.cpp does not do it."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.nthread = int(os.environ.get("OMP_NUM_THREADS", "1"))
    if float_tables:
        options.output_tensor_type = options.token_embedding_type = llama_cpp.GGML_TYPE_F16
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(output), options):
        raise ValueError(f"llama.cpp does not quantize to {kind}")


def read_gguf(file: Path, names: dict[str, str]) -> tuple[dict[str, Any], dict[str, int], dict[str, str]]:
    """Return weights in float32, bits and types of the tensors, by transformers' names."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    weights, bits, kinds = {}, {}, {}
    for tensor in GGUFReader(file).tensors:
        name = names[tensor.name]
        weights[name] = dequantize(tensor.data, tensor.tensor_type)
        bits[name] = 8 * int(tensor.n_bytes)
        kinds[name] = tensor.tensor_type.name
    return weights, bits, kinds


def main() -> None:
    import llama_cpp
    from safetensors.numpy import load_file, save_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--float", type=Path, required=True)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--float-tables", action="store_true")
    options = parser.parse_args()
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    tensors: dict[str, Any] = {}
    for file in sorted(options.model.glob("*.safetensors")):
        tensors |= load_file(file)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.output.parent) as scratch:
        source = Path(scratch) / "float.gguf"
        write_gguf(config, tensors, source)
        quantize(source, options.output, options.type, float_tables=options.float_tables)
    seconds = time.perf_counter() - begun
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights, bits, kinds = read_gguf(options.output, {rename(name): name for name in tensors})
    options.float.mkdir(parents=True)
    save_file(weights, options.float / "model.safetensors", metadata={"format": "pt"})
    for name in FILES:
        if (options.model / name).exists():
            shutil.copyfile(options.model / name, options.float / name)
    projections = [name for name in bits if "_proj" in name]
    found = {
        "seconds": seconds,
        "peak": peak,
        "version": llama_cpp.__version__,
        "types": sorted({kinds[name] for name in projections}),
        "projection_bits": sum(bits[name] for name in projections),
        "table_bits": bits["model.embed_tokens.weight"] + bits["lm_head.weight"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
