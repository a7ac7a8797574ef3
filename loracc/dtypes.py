"""Which precision a fold is computed in, and the one rounding at its end (DESIGN.md 4)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = [
    "FLOAT_NAMES",
    "Array",
    "compute_dtype",
    "dtype_from_name",
    "is_float",
    "round_to",
    "unit_roundoff",
]

Array = npt.NDArray[Any]

#: ``--dtype`` names and what they mean.
FLOAT_NAMES = {
    "fp16": ir.DataType.FLOAT16,
    "float16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "fp32": ir.DataType.FLOAT,
    "float32": ir.DataType.FLOAT,
    "fp64": ir.DataType.DOUBLE,
    "float64": ir.DataType.DOUBLE,
}


def dtype_from_name(name: str) -> ir.DataType:
    """``"bf16"`` -> ``ir.DataType.BFLOAT16``; raises KeyError for other names."""
    return FLOAT_NAMES[name.lower()]


def is_float(dtype: ir.DataType) -> bool:
    """Whether a delta can be added to a weight of this dtype."""
    return dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


def compute_dtype(storage: ir.DataType) -> np.dtype[Any]:
    """The precision W + ΔW is computed in before the one rounding.

    bfloat16 keeps 8 significant bits: float32 arithmetic misrounds fewer than one element in 10⁵. float16 keeps 11:
    float32 arithmetic alone misrounds about 6·10⁻⁵ of the elements by landing on ties, and a strong delta takes that
    over 10⁻⁴, so float16 is computed in float64 as float32 is.
    """
    return np.dtype(np.float32 if storage == ir.DataType.BFLOAT16 else np.float64)


def round_to(values: Array, storage: ir.DataType) -> Array:
    """Round to nearest even into ``storage``, once. ``values`` is float32 or float64 of any shape.

    float64 -> bfloat16 goes through float32 inside ml_dtypes; no caller does that on the folding path (see
    ``compute_dtype``).
    """
    # Overflow becomes inf here on purpose: the fold looks for inf and names the site.
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(storage.numpy(), copy=False)


def unit_roundoff(storage: ir.DataType) -> float:
    """The largest relative error of one rounding: 2⁻⁸ (bf16), 2⁻¹¹ (fp16), 2⁻²⁴ (fp32), 2⁻⁵³ (fp64).

    >>> unit_roundoff(ir.DataType.BFLOAT16) == 2.0**-8
    True
    """
    return float(ml_dtypes.finfo(storage.numpy()).eps) / 2.0
