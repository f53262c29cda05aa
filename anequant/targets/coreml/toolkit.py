"""The one place that imports coremltools, without what it logs about this machine while it loads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Keep every logger silent below errors."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


with quiet_logging():
    import coremltools as ct
    from coremltools.converters.mil.backend.mil import helper as mil_helper
    from coremltools.converters.mil.converter import ConverterRegistry, _mil_convert
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, get_new_symbol, types
    from coremltools.converters.mil.mil.passes.pass_pipeline import PassPipelineManager
    from coremltools.libmilstoragepython import _BlobStorageReader as BlobReader
    from coremltools.proto import MIL_pb2, Model_pb2

TARGET = ct.target.iOS18

__all__ = [
    "TARGET",
    "BlobReader",
    "ConverterRegistry",
    "Function",
    "MIL_pb2",
    "Model_pb2",
    "PassPipelineManager",
    "Program",
    "_mil_convert",
    "ct",
    "get_new_symbol",
    "mb",
    "mil_helper",
    "quiet_logging",
    "types",
]
