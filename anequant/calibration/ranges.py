"""How large the numbers inside a quantized model get, against what float16 and the Neural Engine hold.

The engine computes in float16 (65504 at most) and adds up a convolution's products in a fixed-point
accumulator of 32768, in whatever order (Q15.16, measured on M4 and M6 by third parties). What can
overflow, in the graph that `coreml` emits, is

    residual   the stream before attention, between it and the MLP, and after that, and what o and down add
    scores     q . k after RoPE, with 1 / sqrt(head_dim) on q
    attention  not a magnitude: the largest share of a token's attention that rounding q, k and scores moves
               to other tokens. A score of m is off by up to d = m 2^-11, which softmax sees as it is: of two
               equal scores tanh(d) / 2 moves, 5% at m = 200, a quarter at m = 1100, long before an overflow
    sums       a convolution's partial sums; |codebook[codes]| |input_scale x| bounds every order of adding
    products   what the other linears and the SwiGLU product return
    turns      inside of an online rotation: its factors are orthonormal, so the Euclidean norm of what one
               block of it mixes bounds every value and every sum there

A factor c on everything that writes to the stream scales the stream by c and leaves every norm's output, and
so the model, as it was once each norm's epsilon is scaled by c^2. A power of two moves between a codebook
and its output scales without changing their product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, Space, layer_prefix
from anequant.checkpoints.quantized import check_scales, load
from anequant.checkpoints.reader import Checkpoint
from anequant.quantization.nearest import LARGEST_FLOAT16
from anequant.quantization.scales import spread
from anequant.reference.forward import ReferenceModel
from anequant.rotation.orthogonal import Rotation

LOUDEST_TOKENS = 32
WEIGHT_ROUNDING = 2.0**-9
"""The rounding of bfloat16, in which checkpoints made elsewhere are stored; that of float16 is a quarter."""


@dataclass(frozen=True)
class LayerRange:
    """The largest magnitudes inside one layer, in the order of the graph; `sums` by linear."""

    layer: int
    residual: float
    scores: float
    products: float
    sums: dict[str, float]
    turns: float = 0.0
    attention: float = 0.0


def measure_ranges(checkpoint: Checkpoint, tokens: Tensor) -> list[LayerRange]:
    """Measure the ranges of every layer of a quantized checkpoint for tokens [n, length], in float32.

    `sums` look at the 32 tokens with the largest inputs only. Raises InputError as `check_scales` does.
    """
    spec = checkpoint.spec
    online = checkpoint.online
    model = ReferenceModel(spec, torch.float32, online)
    hidden = checkpoint.read(f"{EMBEDDING}.weight")[tokens].float()
    ranges = []
    for number in range(spec.num_layers):
        tensors = {name: value.float() for name, value in checkpoint.layer(number).items()}
        sums: dict[str, float] = {}
        residual, products, scores, turns, moved = float(hidden.abs().max()), 0.0, 0.0, 0.0, 0.0
        for group in spec.input_groups:
            name = group[0].name
            (arriving,) = model.inputs(number, tensors, [hidden], name, arriving=True, within=True)
            products = max(products, float(arriving.abs().max()))
            if online.r4 is not None and group[0].input.space is Space.FFN:
                turns = max(turns, _largest_norm(arriving, online.r4))
            for linear in group:
                inputs = arriving
                if online.active:
                    (inputs,) = model.inputs(number, tensors, [hidden], linear.name, within=True)
                weight = tensors[f"{linear.name}.weight"]
                sums[linear.name] = _largest_sum(
                    checkpoint, layer_prefix(number) + linear.name, weight, inputs
                )
                output = _output(tensors, linear.name, inputs)
                largest = float(output.abs().max())
                if linear.output.space is Space.RESIDUAL:
                    residual = max(residual, largest)
                    hidden = hidden + output.view_as(hidden)
                else:
                    products = max(products, largest)
            if name == "self_attn.q_proj":
                (inputs,) = model.inputs(number, tensors, [hidden], name, within=True)
                scores, norm, moved = _attention_ranges(
                    model, tensors, inputs.view(*hidden.shape), checkpoint
                )
                turns = norm if online.r3 is not None else turns
            residual = max(residual, float(hidden.abs().max()))
        ranges.append(LayerRange(number, residual, scores, products, sums, turns, moved))
    return ranges


def find_power_of_two(value: float, most: float) -> float:
    """Return 1, or the largest power of two that brings `value` to at most `most`."""
    return 1.0 if value <= most else 2.0 ** -math.ceil(math.log2(value / most))


def _output(tensors: dict[str, Tensor], name: str, inputs: Tensor) -> Tensor:
    output = inputs @ tensors[f"{name}.weight"].T
    bias = tensors.get(f"{name}.bias")
    return output if bias is None else output + bias


def _largest_sum(checkpoint: Checkpoint, name: str, weight: Tensor, inputs: Tensor) -> float:
    """Return the largest partial sum of a linear for inputs [tokens, in].

    What is stored is the entries times both scales, rounded, so |weight| |x| / |output_scale| tells which
    rows can have the largest sum; only their codes are recovered."""
    parts = [f"{name}.{part}" for part in ("input_scales", "output_scales", "codebook")]
    stored = {part: checkpoint.read(part) for part in parts if part in checkpoint.tensors}
    stored[f"{name}.weight"] = weight
    input_scale, output_scale = (scale.abs() for scale in check_scales(name, stored))
    scaled = inputs.abs() * input_scale
    loudest = scaled.sum(1).topk(min(LOUDEST_TOKENS, len(scaled))).indices
    near = (inputs[loudest].abs() @ weight.abs().T).amax(0)
    if output_scale.ndim == 1:
        near /= output_scale
    rows = (near >= near.max() * (1 - 4 * WEIGHT_ROUNDING)).nonzero()[:, 0]
    linear = load(name, stored.__getitem__, stored, rows if f"{name}.codebook" in stored else None)
    entries = linear.codebook.abs()[linear.codes.int()]
    if linear.output_scale.ndim == 2:
        entries *= spread(linear.output_scale, entries.shape[1]).abs()
    return float((scaled[loudest] @ entries.T).max())


def _largest_norm(inputs: Tensor, rotation: Rotation) -> float:
    """Return the largest Euclidean norm of what one Hadamard matrix rotates, for inputs [tokens, in]."""
    blocks = inputs.view(-1, rotation.order or rotation.size)
    return float(torch.linalg.vector_norm(blocks, dim=1).max())


def _attention_ranges(
    model: ReferenceModel, tensors: dict[str, Tensor], inputs: Tensor, checkpoint: Checkpoint
) -> tuple[float, float, float]:
    """max |q . k| / sqrt(head_dim) over causal pairs, the largest norm of a q or k, and the largest share of
    a token's attention that float16 moves, for inputs [n, length, hidden_size]."""
    spec = checkpoint.spec
    length = inputs.shape[1]
    cos, sin = model.rope_tables(length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def heads(side: str, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        x = rounded(_output(tensors, f"self_attn.{side}_proj", inputs))
        x = x.view(*inputs.shape[:2], -1, spec.head_dim).transpose(1, 2)
        gain = tensors.get(f"self_attn.{side}_norm.weight")
        if gain is not None:
            x = torch.nn.functional.rms_norm(x, (spec.head_dim,), gain, spec.rms_norm_eps)
        first, second = x.chunk(2, -1)
        return rounded(x * cos + torch.cat([-second, first], -1) * sin)

    def scores(rounded: Callable[[Tensor], Tensor]) -> Tensor:
        query, key = rounded(heads("q", rounded) * spec.head_dim**-0.5), heads("k", rounded)
        key = key.repeat_interleave(spec.num_heads // spec.num_key_value_heads, 1)
        return rounded(query @ key.transpose(-1, -2))

    query, key = heads("q", Tensor.float), heads("k", Tensor.float)
    norm = max(float(torch.linalg.vector_norm(side, dim=-1).max()) for side in (query, key))
    exact = scores(Tensor.float)
    weights, rounded = (
        value.masked_fill(~causal, -math.inf).softmax(-1) for value in (exact, scores(_as_float16))
    )
    moved = (weights - rounded).abs().sum(-1).max() / 2
    return float(exact.abs()[..., causal].max()), norm, float(moved)


def _as_float16(values: Tensor) -> Tensor:
    return values.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).half().float()
