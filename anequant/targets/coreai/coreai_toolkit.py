"""The one place that imports coreai; only processes of `worker` import this.

The order matters in 1.0.0b3: `coreai._compiler.dialects` before `coreai.authoring` is a circular import.
Constants with a name of their own, types of odd widths and states need modules that are not public.
"""

from __future__ import annotations

import coreai.authoring  # isort: skip
from coreai._compiler._mlir_libs._coreaiIR._bindings.mlir.dialects.coreai import HandleType
from coreai._compiler.dialects import coreai as ops
from coreai._compiler.dialects._coreai_ops_gen import ConstantOp
from coreai._compiler.ir import (
    ArrayAttr,
    DenseElementsAttr,
    DenseResourceElementsAttr,
    DictAttr,
    F16Type,
    F32Type,
    IntegerType,
    Location,
    RankedTensorType,
    StringAttr,
    TypeAttr,
)
from coreai.authoring import AIModelAsset, AIProgram, Module
from coreai.authoring.graph_builder import GraphOp
from coreai.runtime import NDArray

__all__ = [
    "AIModelAsset",
    "AIProgram",
    "ArrayAttr",
    "ConstantOp",
    "DenseElementsAttr",
    "DenseResourceElementsAttr",
    "DictAttr",
    "F16Type",
    "F32Type",
    "GraphOp",
    "HandleType",
    "IntegerType",
    "Location",
    "Module",
    "NDArray",
    "RankedTensorType",
    "StringAttr",
    "TypeAttr",
    "coreai",
    "ops",
]
