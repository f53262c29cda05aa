"""Quantize Hugging Face LLMs for Apple's Neural Engine."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
"""Idle threads sleep. Spinning ones make small operations 5 times slower on a busy machine."""
