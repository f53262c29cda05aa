"""What a linear's outputs mean to the end loss: the weights of tokens in its Hessian, and its coupling.

A linear y = W x is rounded so that sum_t w_t ||E x_t||^2 is small, E its error. With w_t = 1 all tokens count
the same. What E does to the model's predictions is, to second order, the quadratic form of the Fisher
information; of its blocks for single outputs the diagonal is s_ti = (dL/dy_ti)^2, where L is the negative
log likelihood of tokens that are drawn from the model itself, and s_t is its mean over the outputs
(GuidedQuant: Kim et al. 2025, arXiv 2505.07004, section 3, with all outputs in one group). One draw makes s_t
noisy, and its few largest values would decide nearly alone; so the root is taken, and scaled to a mean of
one:

    w_t = sqrt(s_t) / mean_t sqrt(s_t).

Errors of two outputs that move the predictions alike count together. Of the Kronecker form of the Fisher
information, C times H, the factor of the outputs is E[g g^T] with g = dL/dy (as YAQA factors it: Tseng et al.
2025, arXiv 2505.22988). Each token counts in it as it does in H, so

    C = sum_t g_t g_t^T / |g_t|,

scaled to a mean diagonal of one, plus the identity, halved, in tiles of rows: that bounds its size.

Windows go forward through the rotated model, a layer at a time, which leaves the states before every layer in
files, and back. Weights need no more than a few digits: where the processor multiplies bfloat16, all of it is
in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from anequant.architectures.spec import layer_prefix
from anequant.calibration.surprise import differentiate_surprise
from anequant.jobs.control import Progress, silent
from anequant.quantization.kernels import TILE, count_tiles
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
    what the model is asked to predict. In `scratch` stays a file of couplings for each layer, see
    `read_couplings`; other files there are gone at the end."""
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
        roots |= {layer_prefix(layer) + name: seen.norms for name, seen in found.items()}
        save_file({name: seen.coupling for name, seen in found.items()}, couplings_file(scratch, layer))
        _file(scratch, layer).unlink()
    return {name: root / root.mean().clamp_min(SMALLEST) for name, root in roots.items()}


def couplings_file(folder: Path, layer: int) -> Path:
    return folder / f"couplings-{layer}.safetensors"


def read_couplings(folder: Path, layer: int) -> dict[str, Tensor]:
    """Return C float32 [tiles, TILE, TILE] of a layer's linears, by name relative to it."""
    found: dict[str, Tensor] = load_file(couplings_file(folder, layer))
    return found


@dataclass(frozen=True, eq=False)
class _Seen:
    """Of a linear: the norm [n, length] of the gradient for each token's output, and its coupling."""

    norms: Tensor
    coupling: Tensor


def _go_back(
    runner: ReferenceModel, layer: int, tensors: Mapping[str, Tensor], file: Path, gradient: Tensor
) -> dict[str, _Seen]:
    """Return what is seen of a layer's linears, by name, and turn `gradient` [n, length, hidden_size] from
    that for what leaves the layer into that for what enters."""
    states = load_file(file)[STATES]
    norms: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}
    for few in torch.arange(len(states)).split(WINDOWS_AT_ONCE):
        entering, outputs = runner.output_gradients(layer, tensors, states[few], gradient[few])
        for name, values in outputs.items():
            norm = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
            norms.setdefault(name, []).append(norm)
            rooted = values / norm.clamp_min(SMALLEST).sqrt()[..., None].to(values.dtype)
            tiles = count_tiles(values.shape[-1])
            total = sums.setdefault(name, torch.zeros(tiles, TILE, TILE))
            _add_squares(total, rooted.flatten(0, 1))
        gradient[few] = entering
    return {name: _Seen(torch.cat(parts), _couple(sums[name])) for name, parts in norms.items()}


def _add_squares(total: Tensor, rows: Tensor) -> None:
    """Add rows.T @ rows, for rows [tokens, out], in tiles to total [tiles, TILE, TILE]."""
    tiles = pad(rows, (0, total.shape[0] * TILE - rows.shape[1])).view(len(rows), -1, TILE).transpose(0, 1)
    total += torch.bmm(tiles.transpose(1, 2), tiles)


def _couple(total: Tensor) -> Tensor:
    """Return C of sums [tiles, TILE, TILE], in which rows beyond the last are zero; half of the identity
    without a gradient."""
    diagonal = total.diagonal(dim1=1, dim2=2)
    mean = float(diagonal.sum()) / max(1, int((diagonal > 0).sum()))
    return (total / (mean or 1.0) + torch.eye(TILE)) / 2


def _file(scratch: Path, layer: int) -> Path:
    return scratch / f"{STATES}-{layer}.safetensors"
