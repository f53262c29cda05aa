"""What can become an asset of Core AI, told before anything is read."""

from __future__ import annotations

from anequant.architectures.spec import ModelSpec
from anequant.errors import UsageError
from anequant.lower_options import KV_FORMS, AssetOptions
from anequant.quantization.online import Online
from anequant.targets.coreai.design import SMALLEST_CONTEXT, list_contexts
from anequant.targets.coreai.installed import require_installed
from anequant.targets.shared.online_limits import check_online
from anequant.targets.shared.rope_tables import compute_rope_tables

LARGEST_CONTEXT = 65536
"""Positions are 16-bit integers."""

LARGEST_WINDOW = 256


def check_asset(spec: ModelSpec, options: AssetOptions, online: Online) -> None:
    """Raise UsageError for impossible sizes, UnsupportedError for a model that cannot be lowered to them, or
    where Core AI is not installed."""
    require_installed()
    contexts = list_contexts(min(options.context, LARGEST_CONTEXT))
    if not contexts or contexts[-1] != options.context:
        raise UsageError(
            f"--context {options.context} is none of Core AI's",
            remedy=f"use {SMALLEST_CONTEXT}, or double that as often as you like, up to {LARGEST_CONTEXT}",
        )
    ladder = options.ladder
    if (
        not ladder
        or list(ladder) != sorted(set(ladder))
        or not 1 <= ladder[0] <= ladder[-1] <= LARGEST_WINDOW
    ):
        raise UsageError(
            f"--ladder {','.join(map(str, ladder))} is no ladder",
            remedy=f"name ascending numbers of positions up to {LARGEST_WINDOW}, as in 8,16,64",
        )
    odd = [size for size in ladder if SMALLEST_CONTEXT % size]
    if odd:
        raise UsageError(
            f"--ladder names {odd[0]}, which does not divide {SMALLEST_CONTEXT}",
            remedy="windows begin at multiples of their size and may not cross a context: use powers of two",
        )
    if options.kv not in KV_FORMS:
        raise UsageError(f"--kv is '{options.kv}'", remedy=f"use {' or '.join(KV_FORMS)}")
    widest = max(spec.num_key_value_heads * spec.head_dim, spec.num_layers)
    if options.context < widest or (len(contexts) > 1 and options.context == widest):
        raise UsageError(
            f"--context {options.context} is too short beside {widest}, the width of keys or count of layers",
            remedy="Apple's runner takes the largest size of a cache for its context: use a longer context",
        )
    check_online(online, "Core AI")
    compute_rope_tables(spec, options.context)
