"""Which width each tensor gets when all together may take `target` bits per weight on average.

Every tensor starts at the narrowest width. A step to a wider one lowers the loss and costs bits; the
steps are taken in the order of loss saved per bit, as far as the budget goes. Where a wider step saves
more per bit than the one before it, the two count as one: on what is left, the lower convex hull of each
tensor's losses, this greedy order is optimal up to the last step (Shoham and Gersho 1988, section II).
"""

from __future__ import annotations

from collections.abc import Mapping

from anequant.errors import UsageError

ROUNDING = 1e-12
"""A target such as 20 / 3 is a little off in float64."""


def allocate_bits(
    losses: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], target: float
) -> dict[str, int]:
    """Choose the width of each tensor: losses[name][width] and sizes[name] in weights; same names in both.

    Raises UsageError when even the narrowest widths take more than `target` bits per weight.
    """
    widths = sorted(next(iter(losses.values())))
    if not widths[0] <= target <= widths[-1]:
        raise UsageError(
            f"a target of {target} bits per weight cannot be met by widths of {', '.join(map(str, widths))}",
            remedy=f"use a target from {widths[0]} to {widths[-1]}, or other widths",
        )
    chosen = dict.fromkeys(losses, widths[0])
    budget = (target - widths[0]) * sum(sizes.values()) * (1 + ROUNDING)
    steps = [
        (saved / (sizes[name] * (end - start)), name, start, end)
        for name, by_width in losses.items()
        for saved, start, end in _hull_steps(by_width)
    ]
    for _, name, start, end in sorted(steps, key=lambda step: -step[0]):
        cost = sizes[name] * (end - start)
        if chosen[name] == start and cost <= budget:
            chosen[name], budget = end, budget - cost
    return chosen


def _hull_steps(by_width: Mapping[int, float]) -> list[tuple[float, int, int]]:
    """(loss saved, from, to) along the lower convex hull, the most saved per bit first."""
    widths = sorted(by_width)
    steps, start = [], widths[0]
    while start != widths[-1]:
        wider = [width for width in widths if width > start]
        end = max(wider, key=lambda width: (by_width[start] - by_width[width]) / (width - start))
        saved = by_width[start] - by_width[end]
        if saved <= 0:
            break
        steps.append((saved, start, end))
        start = end
    return steps
