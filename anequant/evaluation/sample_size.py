"""How much of a text quality is measured on where nobody says; imports nothing, for it is in --help."""

from __future__ import annotations

WINDOWS, LENGTH = 32, 512
"""Most windows, and the tokens of each."""

SAMPLE_WINDOWS, SAMPLE_LENGTH = 4, 256
"""Of the bundled text, which `convert` ends with."""
