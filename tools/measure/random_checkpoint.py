"""A random Qwen2 checkpoint of Qwen2.5-0.5B's shape.

    python tools/measure/random_checkpoint.py FOLDER [--layers 24] [--vocab 151936]

It is written a few layers at a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from anequant.checkpoints.side_files import copy_tokenizer
from anequant.checkpoints.source import BUNDLED_MODEL

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 896, 4864, 14, 2, 64, 151936
QUERY_WIDTH, KV_WIDTH = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
EPS, THETA = 1e-6, 1_000_000.0
LAYERS_PER_SHARD = 6
SEED = 2025
LINEARS = {
    "self_attn.q_proj": (QUERY_WIDTH, HIDDEN),
    "self_attn.k_proj": (KV_WIDTH, HIDDEN),
    "self_attn.v_proj": (KV_WIDTH, HIDDEN),
    "self_attn.o_proj": (HIDDEN, QUERY_WIDTH),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def write_random_checkpoint(folder: Path, layers: int, vocab: int = VOCAB) -> None:
    """bfloat16 weights, q/k/v biases, gains around one, tied embedding, and the bundled model's tokenizer,
    which knows the first 8192 of the tokens; the same bytes every time."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int, spread: float = 0.02, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(spread).add_(mean).bfloat16()

    def layer(number: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{number}"
        tensors = {f"{prefix}.{name}.weight": normal(*shape) for name, shape in LINEARS.items()}
        tensors |= {f"{prefix}.{name}.bias": normal(LINEARS[name][0], spread=0.5) for name in BIASED}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = normal(HIDDEN, spread=0.1, mean=1.0)
        return tensors

    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = 0
    starts = [None, *range(0, layers, LAYERS_PER_SHARD)]
    for shard, start in enumerate(starts, 1):
        if start is None:
            tensors = {"model.embed_tokens.weight": normal(vocab, HIDDEN)}
            tensors["model.norm.weight"] = normal(HIDDEN, spread=0.1, mean=1.0)
        else:
            numbers = range(start, min(start + LAYERS_PER_SHARD, layers))
            tensors = {name: tensor for number in numbers for name, tensor in layer(number).items()}
        file = f"model-{shard:05d}-of-{len(starts):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", _config(layers, vocab))
    copy_tokenizer(BUNDLED_MODEL, folder)


def _config(layers: int, vocab: int) -> dict[str, Any]:
    bundled = json.loads((BUNDLED_MODEL / "config.json").read_text(encoding="utf-8"))
    return {
        **{key: bundled[key] for key in ("bos_token_id", "eos_token_id")},
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 32768,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": vocab,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    arguments = parser.parse_args()
    write_random_checkpoint(arguments.folder, arguments.layers, arguments.vocab)


if __name__ == "__main__":
    main()
