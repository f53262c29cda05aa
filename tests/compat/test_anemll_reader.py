"""Packages read and run as ANEMLL's Python and Swift runtimes do, with a loader written for this test.

Everything is taken from meta.yaml, as there: paths, sizes, head parts. The order of calls is that of the
runtimes' chat loops; only predicting is done by the interpreter, where a Mac has Core ML.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Quantized
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from anequant.lower_options import LowerOptions
from anequant.pipeline.lower import lower
from anequant.request import LowerRequest
from anequant.targets.coreml.interpreter.interpreter import Package

CONTEXT, BATCH, NEW_TOKENS = 48, 16, 12
PROMPTS = [
    "In the morning they went down to the",
    "She said that it was a very long and cold winter, and the",
]
MODELS = {"qwen2": "qwen25", "qwen3": "qwen", "llama": "llama"}


class Loader:
    """What chat.py builds from meta.yaml, and its generation loop."""

    def __init__(self, folder: Path) -> None:
        meta = yaml.safe_load((folder / "meta.yaml").read_text())
        self.parameters = meta["model_info"]["parameters"]
        prefix = self.parameters["model_prefix"]
        lut = {key: self.parameters[f"lut_{key}"] for key in ("embeddings", "ffn", "lmhead")}
        suffix = {key: "" if value == "none" else f"_lut{int(value)}" for key, value in lut.items()}
        count = int(self.parameters["num_chunks"])
        self.context = int(self.parameters["context_length"])
        self.batch = int(self.parameters["batch_size"])
        self.parts = int(self.parameters["split_lm_head"])
        self.embeddings = self._open(folder / f"{prefix}_embeddings{suffix['embeddings']}")
        self.head = self._open(folder / f"{prefix}_lm_head{suffix['lmhead']}")
        first = folder / f"{prefix}_FFN_PF{suffix['ffn']}_chunk_01of{count:02d}"
        found = re.search(r"FFN_PF.*_chunk_(\d+)of(\d+)", first.name)
        assert found is not None and int(found[2]) == count
        self.chunks = [
            self._open(first.parent / first.name.replace("chunk_01of", f"chunk_{i + 1:02d}of"))
            for i in range(count)
        ]
        self.state = self.chunks[0].new_state()
        mask = torch.full((self.context, self.context), float("-inf")).triu(1)
        self.mask = mask.half()[None, None]

    @staticmethod
    def _open(path: Path) -> Package:
        """parse_model_path: the name itself, then with .mlmodelc, then with .mlpackage."""
        for ending in ("", ".mlmodelc", ".mlpackage"):
            if (path.parent / (path.name + ending)).exists():
                return Package.open(path.parent / (path.name + ending))
        raise FileNotFoundError(path)

    def run_chunks(self, hidden: Tensor, positions: Tensor, function: str) -> Tensor:
        start, length = int(positions[0]), len(positions)
        for chunk in self.chunks:
            inputs = {
                "hidden_states": hidden,
                "position_ids": positions.int(),
                "causal_mask": self.mask[:, :, start : start + length],
                "current_pos": positions[:1].int(),
            }
            hidden = chunk.run(inputs, self.state, function)["output_hidden_states"]
        return hidden

    def embed(self, ids: list[int]) -> Tensor:
        hidden: Tensor = self.embeddings.run({"input_ids": torch.tensor([ids], dtype=torch.int32)})[
            "hidden_states"
        ]
        return hidden

    def prefill_padded(self, ids: list[int]) -> None:
        """0.3.4: every block goes through prefill, the last one filled up with token 0."""
        for start in range(0, len(ids), self.batch):
            block = ids[start : start + self.batch]
            padded = block + [0] * (self.batch - len(block))
            positions = torch.arange(start, start + self.batch)
            self.run_chunks(self.embed(padded), positions, "prefill")

    def prefill_whole_blocks(self, ids: list[int]) -> None:
        """0.3.6 with prefill_dynamic_slice: whole blocks only, the rest token by token."""
        assert self.parameters["prefill_dynamic_slice"] is True
        whole = len(ids) // self.batch * self.batch
        self.prefill_padded(ids[:whole])
        for position in range(whole, len(ids)):
            self.run_chunks(self.embed([ids[position]]), torch.tensor([position]), "infer")

    def next_token(self, last: int, position: int) -> int:
        """generate_next_token: the last token once more through infer, at position - 1."""
        hidden = self.run_chunks(self.embed([last]), torch.tensor([position - 1]), "infer")
        outputs = self.head.run({"hidden_states": hidden})
        if self.parameters.get("argmax_in_model"):
            values, local = outputs["argmax_val"], outputs["argmax_idx"]
            assert values.dtype == torch.float16 and local.dtype == torch.int32
            assert values.shape == local.shape == (self.parts,)
            best = int(values.float().argmax())
            sizes = self.parameters["lm_head_chunk_sizes"]
            return int(local[best]) + int(sum(sizes[:best]))
        parts = [outputs[f"logits{i + 1}"] for i in range(self.parts)]
        assert len({part.shape for part in parts}) == 1
        return int(torch.cat(parts, -1)[0, 0].argmax())


def generate(loader: Loader, ids: list[int], prefill: Callable[[Loader, list[int]], None]) -> list[int]:
    tokens = list(ids)
    prefill(loader, tokens)
    for _ in range(NEW_TOKENS):
        tokens.append(loader.next_token(tokens[-1], len(tokens)))
    return tokens


def stock(folder: Path, ids: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    output = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
    )
    tokens: list[int] = output[0].tolist()
    return tokens


@pytest.mark.parametrize("argmax", [False, True], ids=["logits", "argmax"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_the_text_is_that_of_stock_transformers(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], tmp_path: Path, chunks: int, argmax: bool
) -> None:
    checkpoint = quantize_model(tiny_qwen2, "w4-nearest").folder
    options = LowerOptions(context=CONTEXT, batch=BATCH, chunks=chunks, argmax=argmax)
    lower(LowerRequest(checkpoint, options), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        expected = tokenizer.decode(stock(checkpoint, ids))
        for prefill in (Loader.prefill_padded, Loader.prefill_whole_blocks):
            tokens = generate(Loader(tmp_path / "out"), ids, prefill)
            assert tokenizer.decode(tokens) == expected, prefill.__name__


@pytest.mark.parametrize("model_type", MODELS)
def test_every_architecture_follows_the_contract(
    make_model: Callable[..., Path], quantize_model: Callable[..., Quantized], tmp_path: Path, model_type: str
) -> None:
    model = make_model(tmp_path / "model", model_type, False, vocab_size=112)
    checkpoint = quantize_model(model, "w8-nearest").folder
    lower(LowerRequest(checkpoint, LowerOptions(context=CONTEXT, batch=BATCH, chunks=3)), tmp_path / "out")
    loader = Loader(tmp_path / "out")
    assert loader.parameters["model_prefix"] == MODELS[model_type]
    assert loader.parts == (8 if model_type == "llama" else 16)
    ids = torch.randint(112, (19,), generator=torch.Generator().manual_seed(1)).tolist()
    assert generate(loader, ids, Loader.prefill_padded) == stock(checkpoint, ids)


def test_meta_can_be_read_by_column(
    tiny_qwen2: Path, quantize_model: Callable[..., Quantized], tmp_path: Path
) -> None:
    """ANEMLL's prepare_hf.sh greps keys and cuts at spaces: four before a top key's value, six inside."""
    lower(
        LowerRequest(quantize_model(tiny_qwen2, "w4-nearest").folder, LowerOptions(64, 16, 2)),
        tmp_path / "out",
    )
    lines = (tmp_path / "out" / "meta.yaml").read_text().splitlines()

    def cut(key: str, field: int) -> str:
        (line,) = [line for line in lines if line.strip().startswith(f"{key}:")]
        return line.split(" ")[field - 1]

    values = {key: cut(key, 6) for key in ("context_length", "batch_size", "num_chunks", "model_prefix")}
    assert values == {"context_length": "64", "batch_size": "16", "num_chunks": "2", "model_prefix": "qwen25"}
    assert [cut(key, 6) for key in ("lut_embeddings", "lut_ffn", "lut_lmhead")] == ["none", "4", "none"]
    assert cut("version", 4) and cut("architecture", 4) == "qwen2"
    assert cut("ffn", 6) == "qwen25_FFN_PF_lut4.mlmodelc"
