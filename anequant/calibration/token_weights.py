"""How much each token's output of each linear means to the end loss: the weights of its Hessian.

A linear y = W x is rounded so that sum_t w_t ||E x_t||^2 is small, E its error. With w_t = 1 all tokens count
the same. What E does to the model's predictions is, to second order, the quadratic form of the Fisher
information; of its blocks for single outputs the diagonal is s_ti = (dL/dy_ti)^2, where L is the negative
log likelihood of tokens that are drawn from the model itself, and s_t is its mean over the outputs
(GuidedQuant: Kim et al. 2025, arXiv 2505.07004, section 3, with all outputs in one group). One draw makes s_t
noisy, and its few largest values would decide nearly alone; so the root is taken, and scaled to a mean of
one:

    w_t = sqrt(s_t) / mean_t sqrt(s_t).

Windows go forward through the rotated model, a layer at a time, which leaves the states before every layer in
files, and back. Weights need no more than a few digits: where the processor multiplies bfloat16, all of it is
in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anequant.architectures.spec import layer_prefix
from anequant.calibration.surprise import differentiate_surprise
from anequant.jobs.control import Progress, silent
from anequant.quantization.products import has_bfloat16
from anequant.reference.forward import WINDOWS_AT_ONCE, ReferenceModel
from anequant.reference.rotated_model import RotatedModel

STATES = "states"
FORWARD = 0.3
"""Share of the work that is done once all windows are at the head."""

SMALLEST = 1e-30


def measure_token_weights(
    model: RotatedModel, tokens: Tensor, seed: int, scratch: Path, progress: Progress = silent
) -> dict[str, Tensor]:
    """Return the weights float32 [n, length] of tokens [n, length] by every linear's full name; `seed` draws
    what the model is asked to predict. The files in `scratch` are gone at the end."""
    spec = model.spec
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    runner = ReferenceModel(spec, dtype, model.online.rotations)
    hidden = model.embed(tokens).to(dtype)
    for layer in range(spec.num_layers):
        progress(f"layer {layer + 1} forward", FORWARD * layer / spec.num_layers)
        save_file({STATES: hidden}, _file(scratch, layer))
        hidden = runner.run_layer(layer, model.float_layer(layer), hidden)
    head = torch.cat([rotated.to(dtype) for _, rotated in model.head()])
    gradient = differentiate_surprise(runner, hidden, head, torch.Generator().manual_seed(seed))
    del hidden, head
    roots: dict[str, Tensor] = {}
    for layer in reversed(range(spec.num_layers)):
        progress(f"layer {layer + 1} backward", 1 - (1 - FORWARD) * (layer + 1) / spec.num_layers)
        found = _go_back(runner, layer, model.float_layer(layer), _file(scratch, layer), gradient)
        roots |= {layer_prefix(layer) + name: root for name, root in found.items()}
        _file(scratch, layer).unlink()
    return {name: root / root.mean().clamp_min(SMALLEST) for name, root in roots.items()}


def _go_back(
    runner: ReferenceModel, layer: int, tensors: Mapping[str, Tensor], file: Path, gradient: Tensor
) -> dict[str, Tensor]:
    """Return the norm [n, length] of the gradient for each token's output of each of a layer's linears, and
    turn `gradient` [n, length, hidden_size] from that for what leaves the layer into that for what enters."""
    states = load_file(file)[STATES]
    norms: dict[str, list[Tensor]] = {}
    for few in torch.arange(len(states)).split(WINDOWS_AT_ONCE):
        entering, outputs = runner.output_gradients(layer, tensors, states[few], gradient[few])
        for name, values in outputs.items():
            norm = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
            norms.setdefault(name, []).append(norm)
        gradient[few] = entering
    return {name: torch.cat(parts) for name, parts in norms.items()}


def _file(scratch: Path, layer: int) -> Path:
    return scratch / f"{STATES}-{layer}.safetensors"
