"""tools/measure/real_model_quality.py without a model: its table, its words, the environments of peers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp_peer
import numpy as np
import peer_environments
import pytest
import real_model_rows
import real_model_tables
from peer_environments import (
    COREAI_MODELS,
    GPTQMODEL,
    LLAMA_CPP,
    OwnPeer,
    PeerError,
    make_environment,
    run_peer,
)
from quality_runs import Row, list_missing
from real_model_runs import FIGURES, OWN_PEERS

OURS, OTHER, BROKEN, ABSENT = ROWS = [
    Row("ours", "the best", seeds=(0, 1)),
    Row("other", "a peer", peer="other"),
    Row("broken", "", peer="broken"),
    Row("absent", "", peer="absent", needs="no_such_package"),
]


HERE = {"cpu": "Intel", "cores": 8, "date": "2026-01-01"}
THERE = {"cpu": "AMD", "cores": 2, "date": "2026-01-02"}


def run(label: str, seed: int, bits: float, kl: list[float]) -> dict[str, Any]:
    figures = dict.fromkeys(FIGURES, kl) | {"top1": [0.5] * len(kl)}
    took = {"nbytes": 3_000_000, "seconds": 2.0, "peak": 10**9, "about": None}
    texts = {"one": figures, "two": figures}
    place = THERE if label == "other" else HERE
    return {"row": label, "seed": seed, "bits": bits, **took, "texts": texts, "machine": place}


RESULTS: dict[str, Any] = {
    "settings": {
        "model": "model",
        "texts": ["one", "two"],
        "calibration": ["three", "four"],
        "windows": 3,
        "length": 8,
        "samples": 4,
    },
    "machine": THERE,
    "runs": [
        run("ours", 0, 4.0, [0.1, 0.2, 0.3]),
        run("ours", 1, 4.0, [0.3, 0.2, 0.1]),
        run("other", 0, 4.5, [0.3, 0.31, 0.29]),
        {"row": "broken", "seed": 0, "failed": "ERROR: no cc | c++"},
    ],
}


def test_the_curve_goes_up_in_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model_tables, "CURVE", ("other", "absent", "ours"))
    monkeypatch.setattr(real_model_tables, "W4", "ours")
    _, _, *rows = real_model_tables.curve(RESULTS).splitlines()
    assert rows == [
        "| ours | 4.00 | 3.0 | 0.2000 | 0.2000 | 1.00 | 1.00 |",
        "| other | 4.50 | 3.0 | 0.3000 | 0.3000 | 1.50 | 1.50 |",
    ]


def test_the_table_has_every_row_and_reason() -> None:
    head, line, *rows = real_model_tables.table(ROWS, RESULTS).splitlines()
    assert head.startswith("| way | bits | MB | seeds | KL, one | KL, two | extra NLL, one |")
    assert all(row.count("|") == line.count("|") for row in (head, *rows))
    error = np.std([0.3, 0.31, 0.29], ddof=1) / 3**0.5
    assert rows[0].startswith(
        "| ours | 4.000 | 3.0 | 2 | 0.2000 ± 0.0000 | 0.2000 ± 0.0000 | +0.2000 ± 0.0000"
    )
    assert rows[1].startswith(f"| other | 4.500 | 3.0 | 1 | 0.3000 ± {error:.4f} |")
    assert rows[1].endswith("| 50.0% | 50.0% | 2* | 1000 | a peer |")
    assert rows[2].endswith("| not run: ERROR: no cc / c++ |")
    assert rows[3].endswith("| not run: not measured yet |")
    (missing,) = real_model_rows.list_unavailable(ROWS, RESULTS["runs"])
    table = real_model_tables.table(ROWS, {**RESULTS, "runs": [missing]})
    assert table.endswith("| not run: `no_such_package` is not installed |")
    assert real_model_rows.list_unavailable(ROWS, [missing]) == []


def test_two_ways_are_compared_window_by_window() -> None:
    """What windows have in common cancels: the errors of each alone are larger than the difference."""
    mine, theirs = [0.1, 0.2, 0.3, 0.4], [0.12, 0.21, 0.32, 0.41]
    results = {**RESULTS, "runs": [run("ours", 0, 4.0, mine), run("other", 0, 4.5, theirs)]}
    difference = np.subtract(mine, theirs)
    told = f"{difference.mean():+.4f} ± {difference.std(ddof=1) / 2:.4f}"
    said = real_model_tables.compare_pair("ours", "other", results)
    assert said == f"ours at 4.00 bits, other at 4.50: better on one ({told}) and better on two ({told})."
    said = real_model_tables.compare_pair("other", "ours", results)
    assert said is not None and said.count("worse on") == 2
    results["runs"][1] = run("other", 0, 4.5, [0.2, 0.1, 0.4, 0.3])
    said = real_model_tables.compare_pair("ours", "other", results)
    assert said is not None and said.count("no different on") == 2
    assert real_model_tables.compare_pair("ours", "broken", RESULTS) is None


def test_the_words_of_a_page() -> None:
    said = real_model_tables.report(RESULTS)
    assert "3 windows of 8 tokens of one and two each" in said and "2026-01-01 on 8 cores" in said
    assert "an Intel; rows with * 2026-01-02 on 2 cores of an AMD, by" in said
    assert "rotated twin (`anequant rotate`), never the model itself" in said
    assert said.count("not run: not measured yet") == len(real_model_rows.ROWS)


def test_rows_are_known_and_pairs_are_of_rows() -> None:
    from quality_peers import PEERS

    labels = [row.label for row in real_model_rows.ROWS]
    assert len(set(labels)) == len(labels)
    assert {label for pair in real_model_rows.PAIRS for label in pair} <= set(labels)
    assert {row.peer for row in real_model_rows.ROWS if row.peer} <= PEERS.keys() | OWN_PEERS.keys()


def test_what_is_kept_is_not_measured_again() -> None:
    kept = [run for run in RESULTS["runs"] if "failed" not in run]
    assert list_missing(ROWS, kept) == [(BROKEN, 0)]
    assert list_missing([OURS], kept[1:]) == [(OURS, 0)] and list_missing([OURS], []) == [
        (OURS, 0),
        (OURS, 1),
    ]


def test_rows_are_chosen_by_words() -> None:
    assert real_model_rows.choose_rows([""]) == real_model_rows.ROWS
    chosen = [row.label for row in real_model_rows.choose_rows(["torchao", "k-means"])]
    assert chosen[:2] == ["torchao int4, groups of 32", "torchao int4, groups of 64"] and len(chosen) == 4


# Environments of peers


class Calls:
    """Stands for subprocess.run: what was called; a command with `refused` in it fails."""

    def __init__(self, refused: str = "nothing") -> None:
        self.commands: list[list[str]] = []
        self.refused = refused

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        failed = self.refused in command
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
        said = "ERROR: cannot be built\nhint: see above\n" if failed else ""
        return subprocess.CompletedProcess(command, int(failed), "", said)


def test_an_environment_is_made_once_from_pinned_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls()
    monkeypatch.setattr(subprocess, "run", calls)
    python = make_environment(GPTQMODEL, tmp_path)
    assert python == tmp_path / GPTQMODEL.key / "bin" / "python"
    venv, before, packages = calls.commands
    assert venv[:3] == [sys.executable, "-m", "venv"] and before[-5:] == list(GPTQMODEL.before)
    assert packages[-3:] == list(GPTQMODEL.packages) and "--no-build-isolation" in packages
    assert make_environment(GPTQMODEL, tmp_path) == python and len(calls.commands) == 3
    make_environment(LLAMA_CPP, tmp_path)
    assert len(calls.commands) == 5 and "--no-build-isolation" not in calls.commands[-1]
    for environment in (COREAI_MODELS, GPTQMODEL, LLAMA_CPP):
        assert all("==" in package for package in (*environment.packages, *environment.before))


def test_an_environment_that_cannot_be_made_says_why_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", Calls(LLAMA_CPP.packages[0]))
    with pytest.raises(PeerError, match=r"^ERROR: cannot be built$"):
        make_environment(LLAMA_CPP, tmp_path)
    calls = Calls()
    monkeypatch.setattr(subprocess, "run", calls)
    make_environment(LLAMA_CPP, tmp_path)
    assert len(calls.commands) == 2


def test_a_peer_tells_what_it_measured_or_why_it_did_not(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text("import json, sys; print('so far'); print(json.dumps({'told': sys.argv[1:]}))")
    peer = OwnPeer(LLAMA_CPP, str(script), ("--type", "Q4_0"))
    assert run_peer(Path(sys.executable), peer, "model", tmp_path) == {
        "told": ["model", str(tmp_path), "--type", "Q4_0"]
    }
    script.write_text(
        "import json, os, tempfile; print(json.dumps({'told': [os.getcwd(), tempfile.mkdtemp()]}))"
    )
    where, temporary = run_peer(Path(sys.executable), peer, "model")["told"]
    assert temporary.startswith(where) and not Path(where).exists()
    script.write_text("raise ValueError('does not fit')")
    with pytest.raises(PeerError, match=r"^ValueError: does not fit$"):
        run_peer(Path(sys.executable), peer, "model")


# What llama.cpp is given and gives back


def test_every_tensor_of_a_llama_has_a_name_in_gguf() -> None:
    names = {
        "lm_head.weight": "output.weight",
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.7.self_attn.o_proj.weight": "blk.7.attn_output.weight",
        "model.layers.12.post_attention_layernorm.weight": "blk.12.ffn_norm.weight",
    }
    assert {name: llama_cpp_peer.rename(name) for name in names} == names


def test_a_gguf_file_comes_back_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs gguf, of the extra real")
    generator = np.random.default_rng(0)
    shapes = {
        "lm_head.weight": (5, 8),
        "model.norm.weight": (8,),
        "model.layers.0.mlp.up_proj.weight": (4, 8),
    }
    tensors = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    numbers = (
        "num_hidden_layers",
        "max_position_embeddings",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
    )
    config = dict.fromkeys((*numbers, "num_attention_heads", "num_key_value_heads"), 8) | {
        "rms_norm_eps": 1e-5
    }
    llama_cpp_peer.write_gguf(config, tensors, tmp_path / "model.gguf")
    names = {llama_cpp_peer.rename(name): name for name in tensors}
    weights, bits, kinds = llama_cpp_peer.read_gguf(tmp_path / "model.gguf", names)
    for name, weight in tensors.items():
        assert (
            np.array_equal(weights[name], weight) and bits[name] == 32 * weight.size and kinds[name] == "F32"
        )


def test_environments_are_kept_by_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Calls())
    make_environment(LLAMA_CPP, tmp_path)
    kept = json.loads((tmp_path / LLAMA_CPP.key / peer_environments.MADE).read_text())
    assert tuple(kept["packages"]) == LLAMA_CPP.packages
    assert len({LLAMA_CPP.key, GPTQMODEL.key}) == 2
