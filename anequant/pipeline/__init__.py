"""The main job, step by step: quantize, lower, verify; and convert, which is all three."""
