"""Text that a model writes itself: calibration data that is always at hand.

The model's own distribution is the one its activations are made for (LLM-QAT: Liu et al. 2023, section
3.1). Sampling needs all layers at every token, so this holds the whole model, in bfloat16 where it is stored
so, else in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from anequant.checkpoints.reader import Checkpoint
from anequant.errors import InputError
from anequant.jobs.control import Progress, silent
from anequant.recipe import Calibration
from anequant.reference.empty_model import OnDemand, borrow, build_empty_model
from anequant.reference.hooks import attach_all


@torch.no_grad()
def sample_windows(
    checkpoint: Checkpoint,
    first: int,
    calibration: Calibration,
    *,
    resident: bool = True,
    progress: Progress = silent,
) -> Tensor:
    """Let the model write independent texts at temperature 1, each starting with token `first`: int64
    [samples, length], drawn by the seed of `calibration`, whose source does not matter.

    Unless the model is `resident`, its weights are read again for every token: slow, and the same texts.
    Raises InputError when the logits are not finite.
    """
    spec = checkpoint.spec
    model, _ = build_empty_model(spec)
    attach_all(model, spec, checkpoint.online)
    names = [f"{EMBEDDING}.weight", f"{FINAL_NORM}.weight"]
    names += [layer_prefix(layer) + name for layer in range(spec.num_layers) for name in spec.layer_tensors()]
    stored = checkpoint.tensors[f"{EMBEDDING}.weight"].dtype
    dtype = torch.bfloat16 if stored == "BF16" else torch.float32
    (_load if resident else _stream)(model, checkpoint, names, dtype)

    generator = torch.Generator().manual_seed(calibration.seed)
    length = calibration.length
    tokens = torch.full((calibration.samples, length), first)
    cache = None
    for position in range(1, length):
        progress(f"sample token {position} of {length}", position / length)
        output = model(
            tokens[:, position - 1 : position], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        chances = output.logits[:, -1].float().softmax(-1)
        if not bool(chances.isfinite().all()):
            raise InputError(
                f"the model's own logits are not finite when it writes token {position}",
                where=str(checkpoint.folder),
                remedy="check the checkpoint for a damaged tensor",
            )
        tokens[:, position] = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
    return tokens


def _load(model: Any, checkpoint: Checkpoint, names: list[str], dtype: torch.dtype) -> None:
    state = {name: checkpoint.read(name).to(dtype) for name in names}
    head = checkpoint.head_name
    state[f"{HEAD}.weight"] = state[head] if head in state else checkpoint.read(head).to(dtype)
    model.load_state_dict(state, assign=True)


def _stream(model: Any, checkpoint: Checkpoint, names: list[str], dtype: torch.dtype) -> None:
    """Keep norms only; every linear and the head borrow their weight, and the embedding reads single rows."""
    spec, table = checkpoint.spec, f"{EMBEDDING}.weight"
    layers = range(spec.num_layers)
    linears = [layer_prefix(layer) + linear.name for layer in layers for linear in spec.architecture.linears]
    borrowed = [name for name in names if name.rpartition(".")[0] in linears]
    kept = {name: checkpoint.read(name).to(dtype) for name in names if name not in (table, *borrowed)}
    model.load_state_dict(kept, strict=False, assign=True)
    for name in linears:
        borrow(model.get_submodule(name), OnDemand(borrowed, checkpoint.read), name, dtype)
    head = OnDemand([f"{HEAD}.weight"], lambda name: checkpoint.read(checkpoint.head_name))
    borrow(model.get_submodule(HEAD), head, HEAD, dtype)

    def rows(tokens: Tensor) -> Tensor:
        used, places = torch.unique(tokens, return_inverse=True)
        read = (checkpoint.read(table, slice(token, token + 1)) for token in used.tolist())
        return torch.cat(list(read)).to(dtype)[places]

    model.model.embed_tokens.forward = rows
