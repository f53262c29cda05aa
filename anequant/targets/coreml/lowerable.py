"""What can become Core ML packages: the sizes, the model, and what it does while it runs."""

from __future__ import annotations

import re

from anequant.architectures.spec import ModelSpec
from anequant.errors import UsageError
from anequant.lower_options import LowerOptions
from anequant.quantization.online import Online
from anequant.targets.shared.geometry import count_head_parts
from anequant.targets.shared.online_limits import check_online
from anequant.targets.shared.rope_tables import compute_rope_tables


def check_lowering(spec: ModelSpec, options: LowerOptions, online: Online) -> None:
    """Raise UsageError for impossible sizes, UnsupportedError for a model that cannot be lowered to them."""
    for name, value, most in (
        ("context", options.context, 65536),
        ("batch", options.batch, options.context),
        ("chunks", 1 if options.chunks is None else options.chunks, spec.num_layers),
        ("max-chunk-mb", options.max_chunk_mb, 1_000_000),
    ):
        if not 1 <= value <= most:
            raise UsageError(f"--{name} is {value}, it must be between 1 and {most}")
    if options.prefix is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", options.prefix):
        raise UsageError(
            f"--prefix '{options.prefix}' cannot begin file names",
            remedy="use letters, digits, - and _, a letter or digit first",
        )
    if options.batch < 2:
        raise UsageError("--batch is 1, prefill needs at least 2 positions at once")
    if options.context % options.batch:
        raise UsageError(
            f"--context {options.context} is not a multiple of --batch {options.batch}",
            remedy="ANEMLL's Swift runtime prefills whole batches only",
        )
    check_online(online, "Core ML")
    count_head_parts(spec)
    compute_rope_tables(spec, options.context)
