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

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anequant.architectures.spec import layer_prefix
from anequant.jobs.control import Progress, silent
from anequant.quantization.products import has_bfloat16
from anequant.reference.forward import WINDOWS_AT_ONCE, ReferenceModel
from anequant.reference.head_loss import PIECE
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
    ones, generator = torch.ones(spec.hidden_size), torch.Generator().manual_seed(seed)
    gradient = _differentiate_surprise(hidden, head, lambda x: runner.final_norm(x, ones), generator)
    del hidden, head
    roots: dict[str, Tensor] = {}
    for layer in reversed(range(spec.num_layers)):
        progress(f"layer {layer + 1} backward", 1 - (1 - FORWARD) * (layer + 1) / spec.num_layers)
        tensors, states = model.float_layer(layer), load_file(_file(scratch, layer))[STATES]
        norms: dict[str, list[Tensor]] = {}
        for begin in range(0, len(states), WINDOWS_AT_ONCE):
            few = slice(begin, begin + WINDOWS_AT_ONCE)
            entering, outputs = runner.output_gradients(layer, tensors, states[few], gradient[few])
            for name, values in outputs.items():
                norm = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
                norms.setdefault(name, []).append(norm)
            gradient[few] = entering
        roots |= {layer_prefix(layer) + name: torch.cat(parts) for name, parts in norms.items()}
        _file(scratch, layer).unlink()
    return {name: root / root.mean().clamp_min(SMALLEST) for name, root in roots.items()}


def _file(scratch: Path, layer: int) -> Path:
    return scratch / f"{STATES}-{layer}.safetensors"


def _differentiate_surprise(
    hidden: Tensor, head: Tensor, norm: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Tensor:
    """Return the gradient of -log p(y) for hidden [n, length, hidden_size], y drawn at every position from
    the model's own p; with h the normalised states and H the head it is (p - 1_y) H for h."""
    parts = []
    for states in hidden.flatten(0, 1).split(PIECE):
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            normed = norm(leaf)
        p = (normed.detach() @ head.T).float().softmax(-1)
        drawn = _draw(p, generator)
        outputs = p.to(head.dtype) @ head - head[drawn]
        parts.append(torch.autograd.grad(normed, leaf, outputs)[0])
    return torch.cat(parts).view_as(hidden)


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an index from each row of p [n, vocab]: where the running sum passes a uniform number."""
    sums = p.cumsum(-1)
    uniform = torch.rand(len(p), 1, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, uniform, right=True).squeeze(-1).clamp_max(p.shape[1] - 1)
