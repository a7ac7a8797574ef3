"""The compiled inner loop of a fold, where there is one: W' = round(W + left · right) in place, in one look at W.

``native/kernels.c`` is built when the package is installed and a compiler is there, and used where the processor has
fused multiply-adds on vectors; everywhere else :mod:`loracc.folded` computes the same with numpy. The sum of one
element is formed in the order of the rank whatever is computed beside it, so the bytes do not depend on tiles; OpenBLAS
multiplies short factors in that order too, and the two give the same bytes (tested).
"""

from __future__ import annotations

import numpy as np

from loracc.dtypes import Array

#: What the functions of ``_kernels`` take; one that was built from older sources counts as not built.
_INTERFACE = 2

try:
    from loracc import _kernels

    if getattr(_kernels, "INTERFACE", 1) != _INTERFACE:
        _kernels = None  # type: ignore[assignment]
except ImportError:  # not built: an optional part
    _kernels = None  # type: ignore[assignment]

__all__ = ["Product", "has_kernel"]


def has_kernel(stored: np.dtype[np.generic], sums: np.dtype[np.generic]) -> bool:
    """Whether weights of dtype ``stored`` with sums of dtype ``sums`` can be folded by the kernel here."""
    return _kernels is not None and _kernels.width(stored.name, sums.name) > 0


class Product:
    """ΔW = ``left`` · ``right`` on a rectangle of a stored matrix.

    Args:
        left: ``[m, r]``, in the dtype of the sums.
        right: ``[r, n]``, likewise.
        row, column: Where the rectangle begins in the stored matrix.
        dtype: Of the weight.

    Attributes:
        rows, columns: The rectangle, as ranges of the stored matrix.
    """

    def __init__(self, left: Array, right: Array, row: int, column: int, dtype: np.dtype[np.generic]) -> None:
        self.rows = range(row, row + left.shape[0])
        self.columns = range(column, column + right.shape[1])
        self._dtypes = dtype.name, left.dtype.name
        self._left = np.ascontiguousarray(left)
        self._packed = _packed(right, _kernels.width(*self._dtypes))

    def add_to(self, tile: Array, lo: int) -> bool:
        """Fold into the stored rows from ``lo`` on, in place; ``tile`` is ``[rows, columns]`` and C-contiguous.

        Returns whether all that was computed is finite; what is not may have any bits.
        """
        first, last = max(self.rows.start, lo), min(self.rows.stop, lo + len(tile))
        if first >= last:
            return True
        stride = tile.shape[1]
        left = self._left[first - self.rows.start : last - self.rows.start]
        offset = (first - lo) * stride + self.columns.start
        rank = left.shape[1]
        return _kernels.fold(
            *self._dtypes,
            tile.view(np.uint8),
            offset,
            last - first,
            len(self.columns),
            stride,
            left,
            self._packed,
            rank,
        )


def _packed(right: Array, width: int) -> Array:
    """``[r, n]`` -> ``[⌈n / width⌉, r, width]``, zeros at the end: what the kernel reads at once lies together."""
    rank, columns = right.shape
    panels = -(-columns // width)
    packed = np.zeros((panels, rank, width), right.dtype)
    whole = columns // width
    packed[:whole] = right[:, : whole * width].reshape(rank, whole, width).transpose(1, 0, 2)
    packed[whole:, :, : columns - whole * width] = right[None, :, whole * width :]
    return packed
