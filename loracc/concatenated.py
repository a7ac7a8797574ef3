"""Several tensors side by side as one, read in tiles of rows: what a fused weight was made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.rows import Rows, RowsBase
from loracc.tensors import TiledTensor, dims, open_rows

__all__ = ["ConcatenatedTensor"]


class ConcatenatedTensor(TiledTensor):
    """Tensors of one dtype joined along an axis.

    Args:
        parts: In order; all axes but ``axis`` agree.
        axis: 0, or 1 of matrices.
        name: Of the whole.
    """

    def __init__(self, parts: Sequence[ir.TensorProtocol], axis: int, name: str) -> None:
        shape = list(dims(parts[0]))
        shape[axis] = sum(dims(part)[axis] for part in parts)
        super().__init__(parts[0].dtype, shape, name)
        self.parts, self.axis = tuple(parts), axis

    def open_rows(self, *, few: bool = False) -> Rows:
        return _ConcatenatedRows(self, few=few)

    def compute_rows(self, lo: int, hi: int) -> Array:
        result = np.empty((hi - lo, *dims(self)[1:]), self.dtype.numpy())
        with self.open_rows(few=True) as rows:
            rows.fill(lo, hi, result)
        return result


class _ConcatenatedRows(RowsBase):
    """A pass over all parts at once, or one after the other."""

    def __init__(self, tensor: ConcatenatedTensor, *, few: bool) -> None:
        self._axis = tensor.axis
        self._lengths = [dims(part)[tensor.axis] for part in tensor.parts]
        self._parts = [(open_rows(part, few=few), dims(part)) for part in tensor.parts]

    def fill(self, lo: int, hi: int, out: Array) -> None:
        start = 0
        for (rows, shape), length in zip(self._parts, self._lengths, strict=True):
            if self._axis == 1:
                part = np.empty((hi - lo, shape[1]), out.dtype)
                rows.fill(lo, hi, part)
                out[:, start : start + length] = part
            elif lo < start + length and start < hi:
                first, last = max(lo, start), min(hi, start + length)
                rows.fill(first - start, last - start, out[first - lo : last - lo])
            start += length

    def close(self) -> None:
        for rows, _ in self._parts:
            rows.__exit__(None, None, None)
