"""``.onnx_adapter`` with loracc's names: A ``[in, r]``, B ``[r, out]`` with the scale multiplied in.

Lost: the scale as a number (exactly recoverable where it is a power of two: ``--alpha``), and everything but linear
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array, round_to
from loracc.formats.factors import Factors, refuse
from loracc.formats.onnx_adapter_file import write_parameters
from loracc.manifest import parameter_name

__all__ = ["write_onnx_adapter"]


def write_onnx_adapter(factors: Sequence[Factors], path: Path) -> tuple[str, ...]:
    """Write one file; returns what was lost.

    Raises:
        UnsupportedError: Anything but plain low-rank pairs on linear layers.
        MissingExtraError: ONNX Runtime is not installed.
    """
    refuse(".onnx_adapter", "embeddings", [one for one in factors if one.embedding])
    refuse(".onnx_adapter", "convolutions", [one for one in factors if one.convolution])
    refuse(".onnx_adapter", "stacked experts", [one for one in factors if one.stacked])
    refuse(".onnx_adapter", "DoRA", [one for one in factors if one.magnitude is not None])
    parameters: dict[str, Array] = {}
    rounded = 0
    for one in factors:
        b = _folded(one.b, one.s)
        rounded += not np.array_equal(b.astype(np.float64), one.b.astype(np.float64) * one.s)
        parameters |= {parameter_name(one.module, "A"): one.a.T, parameter_name(one.module, "B"): b.T}
    write_parameters(path, parameters)
    scales = sorted({one.s for one in factors} - {1.0})
    notes = []
    if scales:
        notes.append(f"the scale ({', '.join(f'{s:g}' for s in scales)}) is multiplied into B, as the format wants it.")
    if rounded:
        notes.append(f"B of {rounded} modules was rounded by that: the scale is not a power of two.")
    return tuple(notes)


def _folded(b: Array, s: float) -> Array:
    """s·B, rounded once into B's own dtype."""
    return b if s == 1.0 else round_to(b.astype(np.float64) * s, ir.DataType.from_numpy(b.dtype))
