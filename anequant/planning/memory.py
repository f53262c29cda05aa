"""How many bytes every step of a job holds at its peak, above what the imports take.

Written down from what the code holds at once, in bytes an element, and compared with measured peaks by
tools/measure_memory.py. n is a weight's size, [out, w] its shape, N a layer's size, T the calibration tokens.

    turned      a weight as read and two float64 copies of it, beside the layer's float32 so far
    nearest     the float32 that is still to be rounded, and of the weight at hand its core and its codes
    statistics  of fit and of held-out windows: the Hessian, w^2, and a cross moment, w^2, or, of a linear
                that reads its input alone, the moment of its outputs, n; float32
    gptq        beside these: their mean over all windows; the factors of two Hessians (for each of two
                dampings where several linears share them); the damped Hessian; and for refinement the system
                of the input scales with its factor, target, steps, errors and pulls, and members of codebook
                entries for some rows
    walkers     hidden states of T tokens in two models, and in the quantized one what the last linear of
                attention or MLP reads; of a few windows, what attention or the MLP holds
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from anequant.architectures.spec import Linear, ModelSpec, Space
from anequant.checkpoints.header import BITS
from anequant.evaluation.sample_size import SAMPLE_LENGTH, SAMPLE_WINDOWS
from anequant.quantization.refine import CODEBOOK_ROWS, CODEBOOK_WEIGHTS, LARGEST_CODEBOOK
from anequant.recipe import Calibration, Recipe
from anequant.reference.forward import HEAD_ROWS, WINDOWS_AT_ONCE
from anequant.reference.rotated_model import ROWS

FLOAT16, FLOAT32, FLOAT64 = 2, 4, 8
ALLOCATOR = 64 << 20
"""Bytes of freed blocks that glibc does not give back: those below its threshold, which grows to 32 MB."""

CORE_AND_CODES = FLOAT32 + 1
CHANCES = 4
"""Tables [windows, vocab] that sampling holds at once."""

PROBABILITIES = 5
"""Tables [length, vocab] that a comparison of two models' predictions holds at once."""


def resident(base: int, held: int) -> int:
    """The peak of a process whose imports take `base` and which holds `held` bytes at once."""
    return base + held + min(held, ALLOCATOR)


def largest_linear(spec: ModelSpec) -> int:
    return max(spec.linear_weights.values())


def sampling(spec: ModelSpec, calibration: Calibration, dtype: str, *, resident: bool = True) -> int:
    """Of text that a model stored in `dtype` writes itself: all of it, its cache, and logits with their
    chances; or of its weights, unless it is `resident`, the one that is used, of which the head is the
    largest."""
    stored = BITS[dtype] // 8
    itemsize = FLOAT16 if dtype == "BF16" else FLOAT32
    table = spec.vocab_size * spec.hidden_size
    widened = stored * table if stored != itemsize else 0
    cache = 2 * spec.key_value_size * spec.num_layers * calibration.samples * calibration.length
    logits = CHANCES * FLOAT32 * calibration.samples * spec.vocab_size
    if not resident:
        return itemsize * (cache + table) + max(widened, logits)
    model = spec.num_layers * spec.layer_weights + table * (1 if spec.tied else 2)
    return itemsize * (model + cache) + max(widened, logits)


def table(spec: ModelSpec, bits: int, source: int, probe: bool) -> int:
    """Of the embedding or, with the `probe` that compares logits, of the head."""
    block = min(ROWS, spec.vocab_size) * spec.hidden_size
    turning = (source + 2 * FLOAT64) * block + (FLOAT64 * block if probe else 0)
    if bits == 16:
        return turning + FLOAT32 * block
    whole = spec.vocab_size * spec.hidden_size
    return FLOAT32 * whole + max(turning, CORE_AND_CODES * whole)


def layer(spec: ModelSpec, recipe: Recipe, tokens: tuple[int, int] | None, source: int) -> int:
    """Of one decoder layer; `tokens` (windows, length) calibrate, None without."""
    sizes = list(spec.linear_weights.values())
    total, largest = sum(sizes), max(sizes)
    turned = max(
        FLOAT32 * sum(sizes[:number]) + (source + 2 * FLOAT64) * size for number, size in enumerate(sizes)
    )
    if recipe.fold_input_scales:
        turned = max((FLOAT64 + FLOAT32) * total, FLOAT64 * total + (source + 2 * FLOAT64) * largest)
    if tokens is None:
        rounding = max(
            FLOAT32 * sum(sizes[number:]) + (0 if recipe.bits == 16 else CORE_AND_CODES) * size
            for number, size in enumerate(sizes)
        )
        return max(turned, rounding)
    windows, length = tokens
    inner = max(spec.query_size, spec.intermediate_size)
    states = FLOAT32 * windows * length * (2 * spec.hidden_size + inner)
    weights = (FLOAT32 + FLOAT16) * total
    running = max(_running(spec, group[0], length) for group in spec.input_groups) + FLOAT32 * largest
    rounding = CORE_AND_CODES * largest
    if recipe.feeds_back:
        rounding = max(
            max(_statistics(spec, linear) + _running(spec, linear, length), _gptq(spec, linear))
            for linear in spec.architecture.linears
        )
    return states + max(turned, weights + max(rounding, running))


def _moments(spec: ModelSpec, linear: Linear) -> int:
    rows, width = spec.shape(linear)
    return FLOAT32 * (width**2 + (rows * width if linear.norm is None else width**2))


def _statistics(spec: ModelSpec, linear: Linear) -> int:
    """Of all tokens, beside the sums over a few windows that are added."""
    return 3 * _moments(spec, linear)


def _gptq(spec: ModelSpec, linear: Linear) -> int:
    rows, width = spec.shape(linear)
    size, square = rows * width, width**2
    factors = 2 if linear.norm is None else 4
    chosen = min(rows, CODEBOOK_ROWS, max(1, CODEBOOK_WEIGHTS // width))
    refining = 2 * square + 8 * size + 3 * LARGEST_CODEBOOK * chosen * width
    return 3 * _moments(spec, linear) + FLOAT32 * ((factors + 1) * square + refining)


def _running(spec: ModelSpec, linear: Linear, length: int) -> int:
    """A few windows on their way to a linear, in one model, and its input in both."""
    tokens = WINDOWS_AT_ONCE * length
    inner = 3 * spec.intermediate_size if linear.input.space is Space.FFN else 4 * spec.query_size
    return FLOAT32 * tokens * (2 * spec.hidden_size + inner + 2 * spec.width(linear.input))


def _advancing(spec: ModelSpec, windows: int, length: int) -> int:
    """All windows after a layer, beside those before, and a few on their way."""
    few = WINDOWS_AT_ONCE * length * (2 * spec.hidden_size + 3 * spec.intermediate_size)
    return FLOAT32 * (2 * windows * length * spec.hidden_size + few)


def tokens_in_transformers(spec: ModelSpec, source: int) -> int:
    """Of a checkpoint's logits, layer by layer: the embedding; a layer and the one linear that runs; or the
    head and some of its rows, widened."""
    table = source * spec.vocab_size * spec.hidden_size
    widened = FLOAT32 * min(HEAD_ROWS, spec.vocab_size) * spec.hidden_size
    one_layer = source * spec.layer_weights + FLOAT32 * largest_linear(spec)
    return max(table + widened, one_layer)


def ranges(spec: ModelSpec) -> int:
    """Of the magnitudes inside a layer, which lowering looks at: its float32, its codes, and of a linear its
    code numbers and entries."""
    running = max((FLOAT16 + FLOAT32) * largest_linear(spec), 2 * FLOAT32 * largest_linear(spec))
    table = FLOAT16 * spec.vocab_size * spec.hidden_size
    return max(table, (FLOAT32 + 1) * spec.layer_weights + running)


def packed(sizes: Sequence[int]) -> int:
    """Of a package of palettized weights with these sizes: a byte an element, and one of them as read."""
    return sum(sizes) + (FLOAT16 + 2) * max(sizes)


def interpreted(sizes: Iterable[int]) -> int:
    """Of a package that the interpreter runs: float32, and the codes of what is being widened."""
    sizes = list(sizes)
    return FLOAT32 * sum(sizes) + 2 * max(sizes)


def comparison(spec: ModelSpec, source: int) -> int:
    """Of the quality on a text: both heads, the rows that are widened, and predictions of one window."""
    heads = (source + FLOAT16) * spec.vocab_size * spec.hidden_size
    window = PROBABILITIES * FLOAT32 * SAMPLE_LENGTH * spec.vocab_size
    states = 2 * FLOAT32 * SAMPLE_WINDOWS * SAMPLE_LENGTH * spec.hidden_size
    rows = FLOAT32 * min(HEAD_ROWS, spec.vocab_size) * spec.hidden_size
    return max(heads + max(window, rows) + states, tokens_in_transformers(spec, source))


def states(spec: ModelSpec, tokens: tuple[int, int] | None) -> int:
    """Of hidden states of (windows, length) in the float model and the quantized one."""
    return 0 if tokens is None else 2 * FLOAT32 * math.prod(tokens) * spec.hidden_size


def rotations(spec: ModelSpec, recipe: Recipe, tokens: tuple[int, int], source: int) -> int:
    """Of measuring rotations: the float model's states beside the embedding; with restarts or learning, a
    turned layer and its codes, the head, and the states between layers that gradients need."""
    table = spec.vocab_size * spec.hidden_size
    measured = states(spec, tokens) + source * table + FLOAT64 * spec.hidden_size**2
    if recipe.restarts == 1 and not recipe.learn:
        return measured + _advancing(spec, *tokens)
    kept = FLOAT32 * math.prod(tokens) * spec.hidden_size * (spec.num_layers if recipe.learn else 1)
    return measured + kept + 3 * FLOAT32 * table + (FLOAT64 + 3 * FLOAT32) * spec.layer_weights


def sensitivity(spec: ModelSpec, tokens: tuple[int, int], source: int) -> int:
    """Of losses by layer: the whole head, the states before every layer, a layer and what rounds it."""
    kept = FLOAT32 * math.prod(tokens) * spec.hidden_size * (spec.num_layers + 2)
    head = (FLOAT32 + FLOAT32) * spec.vocab_size * spec.hidden_size
    return kept + head + 4 * FLOAT32 * spec.layer_weights


def tuning(spec: ModelSpec, tokens: tuple[int, int], source: int) -> int:
    """Of distillation: what is tuned is in memory as codes, a layer in float32 with its gradients, both
    heads, and states between layers."""
    table = spec.vocab_size * spec.hidden_size
    kept = states(spec, tokens) + FLOAT32 * math.prod(tokens) * spec.hidden_size
    codes = spec.num_layers * spec.layer_weights
    return codes + kept + (source + FLOAT16 + FLOAT32) * table + 3 * FLOAT32 * spec.layer_weights


def stored(size: int) -> int:
    """Of one quantized weight that is read back and compared: what is stored, its codes, and what these
    stand for."""
    return (2 * FLOAT16 + 2) * size
