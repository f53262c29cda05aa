"""What it costs to round a tensor, in nats, at any width: the measure that mixed bits are chosen by.

For small errors E of a weight, KL(float || quantized) is half the quadratic form of the Fisher information,

    KL ~ 1/2 E_y [ <G, E>^2 ],   G = gradient of log p(y) for the weight,  y drawn from the float model,

summed over positions, whose draws are independent (Amari, "Natural gradient works efficiently", 1998,
section 2). A window is one draw of a square, so many short windows tell more than few long.

Of E the width decides the size alone. Every entry of the core gets an error of about the same mean square D,
and rounding with feedback (gptq.py) makes E = N U^-1, where the entries of N are independent, each of mean
square D o_r^2 d_j^2, and U = L / l with H = L L^T, l the diagonal of L. So the mean over N has a closed form,

    KL ~ D S,   S = 1/2 sum_j d_j^2 l_j^2 (L^-1 A L^-T)_jj,   A = E[G^T diag(o^2) G],

in which nothing but D depends on the width. Rounding to nearest is the same with U = I. The head's G is
(p - 1_y) h^T for a final state h, so its A is E[q h h^T] with q = sum_v o_v^2 p_v (1 - p_v). What the
embedding's error does is decided by a few of its rows, the start token's first of all: there <G, E> itself is
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anequant.architectures.spec import EMBEDDING, HEAD, ModelSpec, layer_prefix
from anequant.calibration.surprise import differentiate_surprise
from anequant.jobs.control import Progress, silent
from anequant.quantization.gptq import factorize
from anequant.quantization.nearest import divide_by_scales, fit_core, quantize_linear
from anequant.quantization.online import NOTHING, Online
from anequant.quantization.products import add_square, mirror
from anequant.quantization.weight_format import WeightFormat
from anequant.reference.forward import WINDOWS_AT_ONCE, ReferenceModel
from anequant.reference.head_loss import PIECE

Losses = dict[str, dict[int, float]]
"""KL per token by tensor name and bits."""

WEIGHT = ".weight"

DAMPING = 0.2
"""Of Hessians, as rounding damps them."""

NOISE_WEIGHTS = 1 << 16
"""Weights of a tensor that are rounded at every width to see how far entries are off."""

FORWARD = 0.3
"""Share of the work that is done once all windows are at the head."""


@dataclass(frozen=True)
class FloatModel:
    """The folded and rotated float model that costs are measured in.

    layer_tensors  the float32 tensors of a layer, by name relative to it
    head           float32 [vocab, hidden_size], with the final norm's gain
    embed          the float32 states [..., hidden_size] of tokens
    embedding      float32 [vocab, hidden_size], read where it is measured
    online         the rotations that run
    """

    spec: ModelSpec
    layer_tensors: Callable[[int], Mapping[str, Tensor]]
    head: Tensor
    embed: Callable[[Tensor], Tensor]
    embedding: Callable[[], Tensor]
    online: Online = NOTHING


@dataclass(frozen=True)
class Formats:
    """What is measured: the formats of projections, and those of embedding and head by name where they are
    measured too, each differing in bits alone. `feedback` says whether rounding takes inputs into account."""

    linears: Sequence[WeightFormat]
    tables: Mapping[str, Sequence[WeightFormat]] = field(default_factory=dict)
    feedback: bool = True


def measure_rounding_losses(
    model: FloatModel,
    tokens: Tensor,
    formats: Formats,
    *,
    seed: int,
    weights: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> Losses:
    """Measure the KL per token that rounding each projection, and embedding and head where their formats are
    given, would cost at every width.

    tokens [n, length] are the windows to measure on; `weights` [n, length] by linear are those of its
    Hessian; `seed` draws what the model predicts.
    """
    spec = model.spec
    runner = ReferenceModel(spec, torch.float32, model.online)
    inputs = [model.embed(tokens)]
    for layer in range(spec.num_layers):
        progress(f"layer {layer + 1} forward", FORWARD * layer / spec.num_layers)
        inputs.append(runner.run_layer(layer, model.layer_tensors(layer), inputs[-1]))
    final = inputs.pop()
    gradient = differentiate_surprise(runner, final, model.head, torch.Generator().manual_seed(seed))
    losses: Losses = {}
    if HEAD in formats.tables:
        losses[HEAD] = _measure_head(runner, final, model.head, formats)
    for layer in reversed(range(spec.num_layers)):
        progress(f"layer {layer + 1} backward", 1 - (1 - FORWARD) * (layer + 1) / spec.num_layers)
        prefix = layer_prefix(layer)
        own = {name: weights[prefix + name] for name in runner.linears} if weights else {}
        states = inputs.pop(), gradient
        found = _measure_layer(runner, layer, model.layer_tensors(layer), states, own, formats)
        losses |= {prefix + name: loss for name, loss in found}
    if EMBEDDING in formats.tables:
        losses[EMBEDDING] = _measure_embedding(model.embedding(), tokens, gradient, formats)
    return losses


@dataclass(frozen=True, eq=False)
class _Noise:
    """The mean square error of a core's entries by bits, and the scales rows [out] and columns [in] of it."""

    squares: Mapping[int, float]
    rows: Tensor
    columns: Tensor

    def losses(self, sensitivity: float) -> dict[int, float]:
        return {bits: square * sensitivity for bits, square in self.squares.items()}


def _find_noise(weight: Tensor, formats: Sequence[WeightFormat], name: str) -> _Noise:
    """Fit the scales of the first format, and round some evenly spaced rows of weight [out, in] in each."""
    fitted = fit_core(weight, formats[0], name)
    columns = fitted.input_scale
    rows = fitted.output_scale.view(len(weight), -1).square().mean(1).sqrt()
    some = slice(None, None, -(-weight.numel() // NOISE_WEIGHTS))
    squares = {}
    for format_ in formats:
        given = columns if format_.scales == "balanced" else None
        error = quantize_linear(weight[some], None, format_, name, given).dequantize() - weight[some]
        squares[format_.bits] = float(divide_by_scales(error, rows[some], columns).square().mean())
    return _Noise(squares, rows, columns)


def _measure_layer(
    runner: ReferenceModel,
    layer: int,
    tensors: Mapping[str, Tensor],
    states: tuple[Tensor, Tensor],
    weights: Mapping[str, Tensor],
    formats: Formats,
) -> Iterator[tuple[str, dict[int, float]]]:
    """Yield the losses of every linear of a layer. `states` are what enters it and the gradient for what
    leaves it, which becomes that for what enters: [n, length, hidden_size]."""
    hidden, gradient = states
    noises = {name: _find_noise(tensors[name + WEIGHT], formats.linears, name) for name in runner.linears}
    squares = {name: torch.zeros(2 * [len(noise.columns)]) for name, noise in noises.items()}
    for window in range(len(hidden)):
        one = slice(window, window + 1)
        gradient[one], found = runner.gradients(layer, tensors, hidden[one], gradient[one])
        for name, noise in noises.items():
            add_square(squares[name], found[name + WEIGHT] * noise.rows[:, None])
    count = hidden[..., 0].numel()
    for name, noise in noises.items():
        hessian = None
        if formats.feedback:
            inputs = runner.inputs(layer, tensors, hidden.split(WINDOWS_AT_ONCE), name)
            hessian = _sum_hessian(inputs, weights.get(name))
        yield name, noise.losses(_sensitivity(squares.pop(name), noise.columns, hessian) / count)


def _sum_hessian(inputs: Iterable[Tensor], weights: Tensor | None) -> Tensor:
    """Return the sum of w x x^T [in, in] over inputs, some tokens [n, in] at a time, with their weights."""
    rest = None if weights is None else weights.flatten()
    hessian: Tensor | None = None
    for x in inputs:
        if rest is not None:
            x = x * rest[: len(x), None].sqrt()
            rest = rest[len(x) :]
        if hessian is None:
            hessian = torch.zeros(x.shape[1], x.shape[1])
        add_square(hessian, x)
    assert hessian is not None
    mirror(hessian)
    return hessian


def _sensitivity(square: Tensor, columns: Tensor, hessian: Tensor | None) -> float:
    """Return S for A, whose lower triangle `square` [in, in] holds, and d `columns` [in]; U = I without a
    Hessian."""
    if hessian is None:
        return float((square.diagonal() * columns.square()).sum()) / 2
    mirror(square)
    factor = factorize(hessian, DAMPING)
    ordered = square[factor.order].index_select(1, factor.order)
    half = torch.linalg.solve_triangular(factor.lower, ordered, upper=False)
    whole = torch.linalg.solve_triangular(factor.lower, half.T, upper=False).diagonal()
    weighed = columns[factor.order] * factor.lower.diagonal()
    return float((weighed.square() * whole).sum()) / 2


def _measure_head(runner: ReferenceModel, final: Tensor, head: Tensor, formats: Formats) -> dict[int, float]:
    noise = _find_noise(head, formats.tables[HEAD], HEAD)
    ones, rows = torch.ones(head.shape[1]), noise.rows.square()
    square, hessian = torch.zeros(2, head.shape[1], head.shape[1])
    with torch.no_grad():
        for states in final.flatten(0, 1).split(PIECE):
            normed = runner.final_norm(states, ones)
            chances = (normed @ head.T).softmax(-1)
            spread = (chances - chances.square()) @ rows
            add_square(square, normed * spread.sqrt()[:, None])
            add_square(hessian, normed)
    mirror(hessian)
    found = _sensitivity(square, noise.columns, hessian if formats.feedback else None)
    return noise.losses(found / final[..., 0].numel())


def _measure_embedding(
    embedding: Tensor, tokens: Tensor, gradient: Tensor, formats: Formats
) -> dict[int, float]:
    """`gradient` [n, length, hidden_size] is that for the embedded tokens [n, length]."""
    losses = {}
    for format_ in formats.tables[EMBEDDING]:
        error = quantize_linear(embedding, None, format_, EMBEDDING).dequantize().sub_(embedding)
        changes = (gradient * error[tokens]).sum((1, 2))
        losses[format_.bits] = float(changes.square().sum()) / 2 / tokens.numel()
    return losses
