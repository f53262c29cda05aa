"""What rotation and rounding did to every projection: outliers and errors, before and after.

Two float models read the same tokens, one layer at a time: the model as it came, its norms' gains folded, and
the same after the rotations. Rotations keep the norm of every weight and of every token's input, so their
outliers and their errors of rounding compare. Both are rounded to nearest with the recipe's widths, codebook
and scales, which shows what the rotations alone are worth; what the checkpoint holds is compared with the
rotated weights, and shows what the whole recipe is. Every error is of one projection on the float model's
input, and does not count what came before it.

    weight error   ||W' - W|| / ||W||
    output error   ||X W'^T - X W^T|| / ||X W^T||, over all tokens

Kurtosis (3 for normal values) and peak (max / rms) are over all entries of a weight; of an input, over the
channels of a token, and then the median of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anequant.architectures.spec import Linear, layer_prefix
from anequant.checkpoints.manifest import read_rotation_keys
from anequant.checkpoints.quantized import load
from anequant.checkpoints.reader import Checkpoint
from anequant.checkpoints.rotation_files import read_written_rotations
from anequant.errors import UnsupportedError
from anequant.evaluation.distribution import measure_distribution
from anequant.jobs.control import Progress, silent
from anequant.quantization.codebook import count_code_bits
from anequant.quantization.linear import QuantizedLinear
from anequant.quantization.nearest import quantize_linear
from anequant.quantization.online import NOTHING, plan_online
from anequant.quantization.weight_format import unfolded_format
from anequant.recipe import Recipe
from anequant.reference.forward import ReferenceModel
from anequant.reference.rotated_model import RotatedModel
from anequant.rotation.rotation_plan import RotationPlan


@dataclass(frozen=True)
class Outliers:
    """How far values stick out; None where all are the same."""

    kurtosis: float | None
    peak: float | None


@dataclass(frozen=True)
class Side:
    """One projection in one of the two float models, and rounded to nearest there.

    The errors are None where it stays float16, or where its values do not fit float16.
    """

    weight: Outliers
    inputs: Outliers
    weight_error: float | None
    output_error: float | None


@dataclass(frozen=True)
class StoredProjection:
    """What a checkpoint holds; `name` is relative to the layer, `codes` counts how often each entry of the
    codebook is used, empty at 16 bits."""

    name: str
    shape: tuple[int, int]
    bits: int
    codes: tuple[int, ...]


@dataclass(frozen=True)
class ProjectionMeasurement:
    """`before` is None for a model that came rotated; the errors are of what the checkpoint holds."""

    stored: StoredProjection
    before: Side | None
    after: Side
    weight_error: float
    output_error: float


@dataclass(frozen=True)
class LayerMeasurement:
    """`residual_*` is the largest magnitude in the residual stream as it leaves the layer."""

    layer: int
    residual_before: float | None
    residual_after: float
    projections: tuple[ProjectionMeasurement, ...]


@dataclass(frozen=True)
class ModelMeasurement:
    """`embedded_*` is the largest magnitude in the residual stream as it enters the first layer."""

    embedded_before: float | None
    embedded_after: float
    layers: tuple[LayerMeasurement, ...]


def measure_projections(
    checkpoint: Checkpoint, original: Checkpoint, recipe: Recipe, tokens: Tensor, progress: Progress = silent
) -> ModelMeasurement:
    """Compare a quantized `checkpoint` with the float model that `recipe` made it from, on tokens [n,
    length].

    It holds one projection, the inputs of one layer and both hidden states. Raises what
    `read_written_rotations` raises.
    """
    came_rotated = read_rotation_keys(original.folder) is not None
    plan = RotationPlan() if came_rotated else read_written_rotations(checkpoint, recipe)
    online = plan_online(original.spec, recipe).rotations
    after = _Walker(RotatedModel(original, plan, recipe.fold_input_scales, online), recipe, tokens)
    before = None
    if not came_rotated:
        before = _Walker(RotatedModel(original, RotationPlan(), False, NOTHING), recipe, tokens)
    embedded = None if before is None else before.largest, after.largest
    layers = []
    for layer in range(original.spec.num_layers):
        progress(f"layer {layer + 1} of {original.spec.num_layers}", layer / original.spec.num_layers)
        bits = {
            linear.name: _bits(checkpoint, layer, linear) for linear in original.spec.architecture.linears
        }
        sides = {} if before is None else {seen.name: seen.side for seen in before.walk(layer, bits)}
        measured = []
        for seen in after.walk(layer, bits):
            stored = load_projection(checkpoint, layer, seen.name)
            errors = _errors(_weight(stored), seen.weight, seen.inputs, seen.output)
            kept = summarise_projection(seen.name, stored)
            measured.append(ProjectionMeasurement(kept, sides.get(seen.name), seen.side, *errors))
        largest = None if before is None else before.largest
        layers.append(LayerMeasurement(layer, largest, after.largest, tuple(measured)))
    return ModelMeasurement(*embedded, tuple(layers))


def load_projection(checkpoint: Checkpoint, layer: int, name: str) -> QuantizedLinear | Tensor:
    """Load a projection of a layer that anequant wrote: quantized, or its float16 weight."""
    full = layer_prefix(layer) + name
    if f"{full}.codebook" in checkpoint.tensors:
        return load(full, checkpoint.read, checkpoint.tensors)
    return checkpoint.read(f"{full}.weight")


def summarise_projection(name: str, linear: QuantizedLinear | Tensor) -> StoredProjection:
    if not isinstance(linear, QuantizedLinear):
        return StoredProjection(name, (linear.shape[0], linear.shape[1]), 16, ())
    codes = torch.bincount(linear.codes.flatten().int(), minlength=linear.codebook.numel())
    rows, columns = linear.codes.shape
    return StoredProjection(name, (rows, columns), linear.bits, tuple(codes.tolist()))


@dataclass(frozen=True)
class _Seen:
    """A projection on the way: weight [out, in], inputs [tokens, in], and their product."""

    name: str
    weight: Tensor
    inputs: Tensor
    output: Tensor
    side: Side


class _Walker:
    """One of the two float models with its hidden states [n, length, hidden_size]."""

    def __init__(self, model: RotatedModel, recipe: Recipe, tokens: Tensor) -> None:
        self._model = model
        self._recipe = recipe
        self._runner = ReferenceModel(model.spec, torch.float32, model.online)
        self._hidden = model.embed(tokens)

    @property
    def largest(self) -> float:
        return float(self._hidden.abs().max())

    def walk(self, layer: int, bits: Mapping[str, int]) -> Iterator[_Seen]:
        """Walk through the layer and yield one projection after the other; `bits` are by name."""
        _, tensors = self._model.layer(layer)
        inputs, self._hidden = self._runner.every_input(layer, tensors, self._hidden)
        for group in self._model.spec.input_groups:
            x = inputs[group[0].name]
            outliers = measure_token_outliers(x)
            for linear in group:
                weight = tensors[f"{linear.name}.weight"].float()
                output, values = x @ weight.T, measure_distribution(weight)
                nearest = self._nearest(weight, bits[linear.name], layer_prefix(layer) + linear.name)
                errors = (None, None) if nearest is None else _errors(nearest, weight, x, output)
                side = Side(Outliers(values.kurtosis, values.peak), outliers, *errors)
                yield _Seen(linear.name, weight, x, output, side)

    def _nearest(self, weight: Tensor, bits: int, name: str) -> Tensor | None:
        """Round the weight to nearest with the recipe's codebook and scales; None where that cannot be."""
        if bits == 16:
            return None
        try:
            rounded = quantize_linear(weight, None, unfolded_format(self._recipe, bits), name)
        except UnsupportedError:
            return None
        return rounded.dequantize()


def _bits(checkpoint: Checkpoint, layer: int, linear: Linear) -> int:
    codebook = checkpoint.tensors.get(f"{layer_prefix(layer)}{linear.name}.codebook")
    return 16 if codebook is None else count_code_bits(math.prod(codebook.shape))


def _weight(stored: QuantizedLinear | Tensor) -> Tensor:
    return stored.dequantize() if isinstance(stored, QuantizedLinear) else stored.float()


def measure_token_outliers(inputs: Tensor) -> Outliers:
    """Return the median over tokens of kurtosis and peak over channels, for inputs [tokens, in].

    Tokens whose channels are all the same do not count.
    """
    wide = inputs.double()
    off = wide - wide.mean(1, keepdim=True)
    variance, rms = off.square().mean(1), wide.square().mean(1).sqrt()
    varied = variance > 0
    if not bool(varied.any()):
        return Outliers(None, None)
    kurtosis = off.pow(4).mean(1)[varied] / variance[varied].square()
    peak = wide.abs().amax(1)[varied] / rms[varied]
    return Outliers(float(kurtosis.median()), float(peak.median()))


def _errors(rounded: Tensor, weight: Tensor, inputs: Tensor, output: Tensor) -> tuple[float, float]:
    """Return the weight error and the output error of rounded [out, in], for inputs [tokens, in]."""
    difference = rounded - weight
    moved = inputs @ difference.T
    return _ratio(difference, weight), _ratio(moved, output)


def _ratio(difference: Tensor, size: Tensor) -> float:
    whole = float(torch.linalg.vector_norm(size, dtype=torch.float64))
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64)) / max(whole, 1e-30)
