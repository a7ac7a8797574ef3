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
    "all_finite",
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

    bfloat16 keeps 8 significant bits: float32 arithmetic misrounds about one element in 10⁵, as long as the delta is a
    short sum (see :attr:`loracc.folded.FoldedTensor.compute_dtype`). float16 keeps 11: float32 arithmetic alone
    misrounds about 6·10⁻⁵ of the elements by landing on ties, and a strong delta takes that over 10⁻⁴, so float16 is
    computed in float64 as float32 is.
    """
    return np.dtype(np.float32 if storage == ir.DataType.BFLOAT16 else np.float64)


def round_to(values: Array, storage: ir.DataType, out: Array | None = None) -> Array:
    """Round to nearest even into ``storage``, once. ``values`` is float32 or float64 of any shape.

    Overflow becomes inf, and NaN stays NaN: :func:`all_finite` finds both afterwards.

    Args:
        values: What to round; may be returned as it is when it has the dtype already.
        storage: The dtype to round to.
        out: Where to put it, of that dtype and shape; made when absent.
    """
    # ml_dtypes goes from float64 to bfloat16 by way of float32, which would round twice.
    exact = _narrowed(values) if storage == ir.DataType.BFLOAT16 and values.dtype == np.float64 else values
    with np.errstate(over="ignore", invalid="ignore"):
        # Measured on a block in cache: ml_dtypes' cast 0.43 ns per element, shifts and masks in numpy 0.50.
        if out is None:
            return exact.astype(storage.numpy(), copy=False)
        np.copyto(out, exact, casting="unsafe")
    return out


def _narrowed(values: Array) -> Array:
    """float64 -> float32 such that rounding it to bfloat16 rounds the float64 correctly.

    Rounding twice goes wrong only where the first result lies midway between two bfloat16 numbers: one in 2¹⁶.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = np.atleast_1d(values.astype(np.float32))
    midway = nearest.view(np.uint32) << np.uint32(16) == np.uint32(1 << 31)
    if midway.any():
        nearest[midway] = _round_to_odd(np.atleast_1d(values)[midway])
    return nearest.reshape(values.shape)


def _round_to_odd(values: Array) -> Array:
    """float64 -> float32 such that a second rounding to 22 bits or fewer is correct (Boldo & Melquiond 2008).

    Inexact results are truncated and their last bit is set: the second rounding sees that something was below it.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = values.astype(np.float32)
    back = nearest.astype(np.float64)
    bits = nearest.view(np.uint32)
    inexact = (back != values) & ~np.isnan(values)
    bits = bits - (inexact & (np.abs(back) > np.abs(values)))
    return (bits | inexact).astype(np.uint32).view(np.float32)


def all_finite(values: Array) -> bool:
    """Whether no element is inf or NaN; ``values`` is of a float dtype that keeps inf in its highest exponent.

    Two reductions over the bits, as signed integers for the positive numbers and as unsigned ones for the negative.

    >>> all_finite(np.array([1.0, -3.0])), all_finite(np.array([1.0, -np.inf])), all_finite(np.array([np.nan]))
    (True, False, False)
    """
    if not values.size:
        return True
    if values.dtype in (np.float32, np.float64) and values.flags.c_contiguous:
        # One product over numbers of any ordinary size; what overflows it is looked at again.
        flat = values.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.dot(flat, flat)):
                return True
    size = values.dtype.itemsize
    infinity = int(np.array(np.inf).astype(values.dtype).view(f"u{size}"))
    sign = 1 << (8 * size - 1)
    return bool(values.view(f"i{size}").max() < infinity and int(values.view(f"u{size}").max()) < infinity + sign)


def unit_roundoff(storage: ir.DataType) -> float:
    """The largest relative error of one rounding: 2⁻⁸ (bf16), 2⁻¹¹ (fp16), 2⁻²⁴ (fp32), 2⁻⁵³ (fp64).

    >>> unit_roundoff(ir.DataType.BFLOAT16) == 2.0**-8
    True
    """
    return float(ml_dtypes.finfo(storage.numpy()).eps) / 2.0  # type: ignore[no-untyped-call]  # untyped upstream
