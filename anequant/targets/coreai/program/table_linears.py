"""A linear as a 1x1 convolution whose weight is codes into one table.

    output_scale * conv(codebook[codes], round(input_scale * x)) + bias

The scales are multiplications of their own, never part of the weight: a table with scales inside has been
wrong on the engine (coreai-torch issue 93, coreai-models issue 279). Where inputs are rounded, they pass
through `quantize` and `dequantize`, and the weight stays codes into a table.
"""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np

from anequant.targets.coreai.coreai_toolkit import ops
from anequant.targets.coreai.design import BIAS, CODES, INPUT_SCALE, OUTPUT_SCALE
from anequant.targets.coreai.program.builder import Builder, Var
from anequant.targets.shared.rotation_names import name_factor


def emit_linear(builder: Builder, x: Var, name: str) -> Var:
    """W x + b on an image [1, in, 1, S]."""
    if builder.has(name + INPUT_SCALE):
        x = builder.mul(x, builder.constant(name + INPUT_SCALE))
    step = builder.design.steps.get(name)
    if step is not None:
        x = _round(builder, x, step)
    y = builder.mul(builder.conv(x, builder.look_up(name)), builder.constant(name + OUTPUT_SCALE))
    return builder.add(y, builder.constant(name + BIAS)) if builder.has(name + BIAS) else y


def emit_turn(builder: Builder, x: Var, name: str) -> Var:
    """An online rotation of channels [1, C, 1, S], factor after factor, as in `rotation_weights`.

    A factor is codes into a table of two, as every weight here that something is multiplied by afterwards:
    Apple's package folds a product with a convolution's plain constant into that.
    """
    _, width, _, length = x.type.shape
    turned = x
    for factor in map(partial(name_factor, name), itertools.count()):
        if not builder.has(factor + CODES):
            break
        weight = builder.look_up(factor)
        channels, size = list(weight.type.shape)[:2]
        turned = builder.reshape(turned, 1, channels, width // channels, length)
        turned = builder.conv(turned, weight, channels // size)
    return x if turned is x else builder.reshape(turned, 1, width, 1, length)


def _round(builder: Builder, x: Var, step: float) -> Var:
    scale, zero = builder.number(step, 0), builder.integers(0, np.int8)
    free, axes = builder.number(0.0, 0), builder.integers((0, 1, 2, 3))
    codes = ops.quantize(x, scale, zero, free, axes)
    return ops.dequantize(codes, scale, zero, free, axes)
