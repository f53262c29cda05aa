"""What a lowered model computes beside the checkpoint it was made from: logits on the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anequant.checkpoints.reader import Checkpoint
from anequant.errors import VerificationError
from anequant.jobs.control import Progress
from anequant.reference.forward import logits
from anequant.reference.windows import DECODE_TOKENS, PREFILL_TOKENS, choose_probe_tokens

LEAST_AGREEMENT = 0.99
LARGEST_ERROR = 1e-2
FLOAT16_STEP = 2.0**-10
NOISE_FACTOR = 4.0
LARGEST_ROUNDING = 2.0

RunTokens = Callable[[Tensor, int, Progress], Tensor]
"""Runs tokens [n], the first so many of them at once."""


@dataclass(frozen=True)
class LoweredModel:
    """A model as a back end runs it.

    context, batch  the most positions, and how many of them prefill takes at once
    argmax          whether it tells its best logits only; the others are -inf
    run             what it says of tokens [n], the first `prompt` of them at once: logits
                    [1 + n - prompt, vocab] from the prompt's end on
    run_unrounded   the same without the rounding of activations
    where           the place that errors name
    """

    context: int
    batch: int
    argmax: bool
    run: RunTokens
    run_unrounded: RunTokens
    where: str


@dataclass(frozen=True)
class PackageCheck:
    """How the packages on disk compare with the checkpoint they were made from.

    weights         compressed constants equal to the checkpoint's codes, codebook and scales, bit for bit
    positions       decode positions at which logits were compared
    agreement       share of them where the arg-max is the same
    ties            positions where it is not, but the checkpoint's two logits are closer than one float16
                    step or four times the position's root mean square difference: rounding decides there
    relative_error  largest logit difference over the largest logit
    rounding        where activations are rounded, the numbers above are of a run without; this is the one of
                    `compare_rounding` with it, else None
    """

    weights: int
    prefill_tokens: int
    positions: int
    agreement: float
    ties: int
    relative_error: float
    rounding: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_model(
    model: LoweredModel, checkpoint: Checkpoint, weights: int, progress: Progress
) -> PackageCheck:
    """Feed whole batches as a prompt, then one token after the other; compare from the prompt's end on.

    `weights` are the constants that were found equal. Raises VerificationError when the logits are apart.
    """
    online = checkpoint.online
    prefill = max(min(PREFILL_TOKENS, model.context // 2) // model.batch, 1) * model.batch
    decode = min(DECODE_TOKENS, model.context - prefill)
    tokens = choose_probe_tokens(checkpoint, prefill + decode)
    progress("checkpoint in transformers", 0.5)
    running = progress.part("run", 0.6, 1.0)
    plain = next(logits(replace(checkpoint, online=online.rotations), tokens[None]))[prefill - 1 :]
    ours = model.run_unrounded(tokens, prefill, running)
    result = compare_logits(weights, prefill, ours, plain, model.where, partial=model.argmax)
    if not online.activations:
        return result
    expected = next(logits(checkpoint, tokens[None]))[prefill - 1 :]
    ours = model.run(tokens, prefill, running)
    return replace(result, rounding=compare_rounding(ours, expected, plain, model.where))


def compare_rounding(ours: Tensor, expected: Tensor, plain: Tensor, where: str) -> float:
    """Return how far logits [positions, vocab] are from the checkpoint's, over what rounding does to these.

    `plain` are the checkpoint's without rounded activations. Values next to a boundary round either way, and
    after a few layers two machines round as if independently: the ratio of root mean squares is then at most
    the root of 2 (it is 0.4 to 0.5 for transformers itself in float32 and float64). Raises VerificationError
    when it is more than LARGEST_ROUNDING.
    """
    known = ours != float("-inf")
    difference, rounding = (torch.where(known, part, 0) for part in (ours - expected, expected - plain))
    ratio = float(difference.square().sum().sqrt() / rounding.square().sum().sqrt().clamp_min(1e-30))
    if not ratio <= LARGEST_ROUNDING:
        raise VerificationError(
            "with rounded activations the packages' logits differ from the checkpoint's by "
            f"{ratio:.2f} times what rounding does to these",
            where=where,
            remedy=f"at most {LARGEST_ROUNDING} is accepted",
        )
    return ratio


def compare_logits(
    weights: int, prefill: int, ours: Tensor, expected: Tensor, where: str, *, partial: bool = False
) -> PackageCheck:
    """Judge logits [positions, vocab] against the checkpoint's; raises VerificationError when apart.

    With `partial`, a logit of -inf is one that the packages do not tell (arg-max heads).
    """
    best, choice = expected.max(-1)
    margin = best - expected.gather(-1, ours.argmax(-1, keepdim=True)).squeeze(-1)
    known = ours != float("-inf") if partial else torch.ones_like(ours, dtype=torch.bool)
    difference = torch.where(known, ours - expected, 0)
    noise = (difference.square().sum(-1) / known.sum(-1)).sqrt()
    ties = (margin > 0) & (margin < torch.maximum(best.abs() * FLOAT16_STEP, NOISE_FACTOR * noise))
    agreement = float((ours.argmax(-1) == choice).double().mean())
    error = float(difference.abs().max() / expected.abs().max())
    result = PackageCheck(weights, prefill, len(ours), agreement, int(ties.sum()), error)
    if not (agreement + result.ties / len(ours) >= LEAST_AGREEMENT and error <= LARGEST_ERROR):
        raise VerificationError(
            f"the packages' logits differ from the checkpoint's by {error:.2e} relative, "
            f"their arg-max agrees at {agreement:.1%} of {len(ours)} positions",
            where=where,
            remedy=f"at most {LARGEST_ERROR:.0e} and at least {LEAST_AGREEMENT:.0%} are accepted",
        )
    return result
