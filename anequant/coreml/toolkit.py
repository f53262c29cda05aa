"""coremltools' MIL builder and converter, imported without what they log about this machine."""

from __future__ import annotations

import logging

logging.disable(logging.WARNING)
try:
    import coremltools as ct
    from coremltools.converters.mil.converter import mil_convert
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, get_new_symbol, types
finally:
    logging.disable(logging.NOTSET)

TARGET = ct.target.iOS18

__all__ = ["TARGET", "Function", "Program", "ct", "get_new_symbol", "mb", "mil_convert", "types"]
