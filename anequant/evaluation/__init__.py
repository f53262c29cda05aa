"""How good a model is; here, how much text that is measured on where nobody says, for --help imports it."""

WINDOWS, LENGTH = 32, 512
"""Most windows, and the tokens of each."""

SAMPLE_WINDOWS, SAMPLE_LENGTH = 4, 256
"""Windows of the bundled text, which `convert` ends with, and the tokens of each."""
