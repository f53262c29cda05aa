"""One run of `real_model_quality.py`: quantize in the way of a row, and measure every window of the texts.

Recipes start from the model, peers from its rotated twin; both are measured against the float model. Peers
that clash with anequant's needs run in environments of their own, see `peer_environments.py`.
"""

from __future__ import annotations

import json
import math
import resource
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer_environments import GPTQMODEL, LLAMA_CPP, OwnPeer, PeerError, make_environment, run_peer
from quality_runs import Row, ask

if TYPE_CHECKING:
    from torch import Tensor

    from anequant.recipe import Calibration

FLOAT, SAMPLES = 16, 96
"""Bits of what stays float, and windows of calibration, the same number of each text."""

FIGURES = ("kl", "extra_nll", "top1")
"""Of every window: nats, nats, and the share of equal top tokens."""

OWN_PEERS: dict[str, OwnPeer] = {
    "GPTQModel int4, groups of 128": OwnPeer(GPTQMODEL, "gptq_peer.py", ("--group", "128")),
    **{
        f"llama.cpp {kind}{words}": OwnPeer(LLAMA_CPP, "llama_cpp_peer.py", ("--type", kind, *options))
        for kind in ("Q4_0", "Q4_K_M")
        for words, options in (("", ()), (", head and embedding fp16", ("--float-tables",)))
    },
}
"""Peers with environments of their own, by the names that rows have for them."""


@dataclass(frozen=True)
class Settings:
    """Folders of the model and its twin, texts to measure and to calibrate on, the evaluation's windows of
    each text, and folders: `work` of what the runs share, `cache` of environments."""

    model: Path
    twin: Path
    texts: tuple[Path, ...]
    calibration: tuple[Path, ...]
    windows: int
    length: int
    work: Path
    cache: Path

    def describe(self) -> dict[str, Any]:
        """What decides the figures, without the places where files are."""
        return {
            "model": self.model.name,
            "texts": [text.stem for text in self.texts],
            "calibration": [text.stem for text in self.calibration],
            "windows": self.windows,
            "length": self.length,
            "samples": SAMPLES,
        }


@dataclass(frozen=True)
class Made:
    """What quantizing gave and took: bits per weight of the projections with scales, bytes of the whole
    model, seconds, the peak of memory in bytes, and what a peer says of itself."""

    bits: float
    nbytes: int
    seconds: float
    peak: int
    about: dict[str, Any] | None = None


def record_references(settings: Settings) -> dict[str, Any]:
    """Run the float model on the windows of every text, and keep them and its final states in `work`."""
    from safetensors.torch import save_file

    from anequant.checkpoints.reader import open_checkpoint
    from anequant.evaluation.divergence import record_reference
    from anequant.evaluation.evaluate import read_windows

    base = open_checkpoint(settings.model)
    for number, text in enumerate(settings.texts):
        tokens = read_windows(base, text, settings.windows, settings.length)
        hidden = record_reference(base, tokens).hidden
        save_file({"tokens": tokens, "hidden": hidden}, settings.work / f"{number}.safetensors")
    return {}


def measure(task: tuple[Row, int, Settings]) -> dict[str, Any]:
    """Quantize with one seed and measure; meant for a process of its own. What fails is told as a reason."""
    row, seed, settings = task
    with tempfile.TemporaryDirectory(dir=settings.work) as scratch:
        folder = Path(scratch) / "quantized"
        try:
            made = _quantize_row(row, seed, settings, folder)
            texts = [_measure_text(folder, number, settings) for number in range(len(settings.texts))]
        except PeerError as error:
            return {"row": row.label, "seed": seed, "failed": str(error)}
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            return {"row": row.label, "seed": seed, "failed": f"{type(error).__name__}: {reason}"}
    names = (text.stem for text in settings.texts)
    return {"row": row.label, "seed": seed, **asdict(made), "texts": dict(zip(names, texts, strict=True))}


def _quantize_row(row: Row, seed: int, settings: Settings, folder: Path) -> Made:
    if row.peer is None:
        return _run_recipe(row, seed, settings, folder)
    return _run_own_peer(row, settings, folder) if row.peer in OWN_PEERS else _run_peer(row, settings, folder)


def _run_recipe(row: Row, seed: int, settings: Settings, folder: Path) -> Made:
    from anequant.checkpoints.reader import open_checkpoint
    from anequant.checkpoints.stored_bits import measure_stored_bits
    from anequant.pipeline.quantize import quantize
    from anequant.recipe import Calibration

    own = Calibration(("self",), row.windows, settings.length)
    calibration = own if row.own_text else _calibrate(settings, row.windows)
    request = ask(row, seed, settings.model, calibration)
    begun = time.perf_counter()
    quantize(request, folder)
    seconds, peak = time.perf_counter() - begun, _peak()
    stored = measure_stored_bits(open_checkpoint(folder))
    assert stored is not None
    return Made(stored.projections, stored.nbytes, seconds, peak)


def _run_peer(row: Row, settings: Settings, folder: Path) -> Made:
    """A peer of this environment, on the twin."""
    from quality_peers import PEERS

    assert row.peer is not None
    peer, windows = PEERS[row.peer], read_calibration(settings.twin, settings)
    begun = time.perf_counter()
    peer.run(settings.twin, folder, windows)
    seconds, peak = time.perf_counter() - begun, _peak()
    return _count(settings.twin, peer.count_bits(_spec(settings.twin)), None, (seconds, peak))


def _run_own_peer(row: Row, settings: Settings, folder: Path) -> Made:
    """A peer of another environment, on the twin."""
    assert row.peer is not None
    peer = OWN_PEERS[row.peer]
    python = make_environment(peer.environment, settings.cache)
    tokens = folder.with_name("tokens.json")
    tokens.write_text(json.dumps(read_calibration(settings.twin, settings).tolist()), encoding="utf-8")
    output = folder.with_name("packed")
    found = run_peer(python, peer, settings.twin, tokens, output, "--float", folder)
    projections, tables = found.pop("projection_bits"), found.pop("table_bits", None)
    took = found.pop("seconds"), found.pop("peak")
    return replace(_count(settings.twin, projections, tables, took), about=found)


def _calibrate(settings: Settings, windows: int) -> Calibration:
    """Return so many windows, the same number of every calibration text."""
    from anequant.recipe import Calibration

    return Calibration(tuple(map(str, settings.calibration)), windows, settings.length)


def read_calibration(model: Path, settings: Settings) -> Tensor:
    """Cut calibration windows [SAMPLES, length], the same number from every text."""
    from anequant.calibration.tokens import read_calibration_tokens
    from anequant.checkpoints.reader import open_checkpoint

    return read_calibration_tokens(_calibrate(settings, SAMPLES), open_checkpoint(model))


def _measure_text(folder: Path, number: int, settings: Settings) -> dict[str, list[float]]:
    """Measure a checkpoint on a text: FIGURES of every window."""
    from safetensors.torch import load_file

    from anequant.checkpoints.reader import open_checkpoint
    from anequant.evaluation.divergence import Reference, measure_quality_against

    kept = load_file(settings.work / f"{number}.safetensors")
    base = open_checkpoint(settings.model)
    reference = Reference(kept["hidden"], base.read(base.head_name))
    means = measure_quality_against(open_checkpoint(folder), kept["tokens"], reference).by_window
    return {key: [round(value, 6) for value in getattr(means, key)] for key in FIGURES}


def _spec(model: Path) -> Any:
    from anequant.checkpoints.reader import open_checkpoint

    return open_checkpoint(model).spec


def _count(model: Path, projections: int, tables: int | None, took: tuple[float, int]) -> Made:
    """What a peer made, from the bits of all projections, and of embedding and head, None for float16; and
    the seconds and bytes that it took."""
    spec = _spec(model)
    if tables is None:
        tables = FLOAT * 2 * spec.vocab_size * spec.hidden_size
    bits = projections / (spec.num_layers * spec.layer_weights)
    return Made(bits, math.ceil((projections + tables) / 8), *took)


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
