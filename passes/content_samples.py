"""A few elements of a tensor, read where they lie, and when two elements are the same number in different dtypes.

Tensors of any rank are seen as matrices: the first axis by all the others. A view may be transposed, and may begin at a
later row (a block of a concatenated weight).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import ml_dtypes
import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array, unit_roundoff
from loracc.encodings.decoded import DecodedTensor
from loracc.errors import InputError
from loracc.tensors import PermutedTensor, TiledTensor, dims, lies_in_file, read_rows

__all__ = ["SAMPLES", "Elements", "Matrix", "agree", "sample_positions", "step_of"]

#: Elements of a tensor that are compared before all of it is.
SAMPLES = 24
#: Steps of the R2 sequence (Roberts 2018): any number of its points is spread evenly over a square.
_R2 = (0.7548776662466927, 0.5698402909980532)


def sample_positions(rows: int, columns: int, count: int = SAMPLES) -> tuple[Array, Array]:
    """Row and column of ``count`` elements of a matrix; the same for every matrix of one shape.

    >>> [index.tolist() for index in sample_positions(8, 4, 3)]
    [[4, 2, 0], [2, 0, 2]]
    """
    steps = np.arange(count, dtype=np.float64)
    spread = (np.floor((0.5 + steps * step) % 1.0 * n) for step, n in zip(_R2, (rows, columns), strict=True))
    row, column = (index.astype(np.int64) for index in spread)
    return row, column


def agree(one: Array, other: Array, first: ir.DataType, second: ir.DataType, step: float = 0.0) -> Array:
    """Where two arrays of the given dtypes, as float64, may be the same numbers but for a cast between the dtypes.

    One dtype: equal, NaN included. Two: within one unit in the last place of either (a cast may round or cut off), or
    where float16 clips what is too large and what is too small for it. ``step`` is the distance of neighbouring values
    where one of them was quantized.
    """
    if step:
        return np.abs(one - other) <= step
    equal: Array = (one == other) | (np.isnan(one) & np.isnan(other))
    if first == second:
        return equal
    limits = [ml_dtypes.finfo(dtype.numpy()) for dtype in (first, second)]  # type: ignore[no-untyped-call]
    unit = 2 * max(unit_roundoff(first), unit_roundoff(second))
    least = max(float(limit.smallest_subnormal) for limit in limits)
    most = min(float(limit.max) for limit in limits)
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.maximum(np.abs(one), np.abs(other))
        close = np.abs(one - other) <= unit * size + least
        clipped = (np.minimum(np.abs(one), np.abs(other)) >= most) & (np.sign(one) == np.sign(other))
    return equal | close | clipped


def step_of(tensor: ir.TensorProtocol) -> float:
    """How far a value of the tensor may be from what it was before it was quantized; 0 where it was not."""
    return tensor.step() if isinstance(tensor, DecodedTensor) else 0.0


@dataclass(frozen=True)
class Matrix:
    """How a tensor is looked at: as (first axis, the others), transposed, from some row on.

    Attributes:
        shape: Rows and columns of the whole view; a vector is a matrix of one column.
        turned: Rows are the tensor's last axis (matrices only).
    """

    shape: tuple[int, int]
    turned: bool = False

    @classmethod
    def of(cls, shape: tuple[int, ...], *, turned: bool = False) -> Matrix:
        """The view of a tensor of this shape."""
        rows, columns = shape[0], math.prod(shape[1:])
        return cls((columns, rows), True) if turned else cls((rows, columns))

    def flat(self, rows: Array, columns: Array) -> Array:
        """Position of the view's elements in the stored tensor."""
        return columns * self.shape[0] + rows if self.turned else rows * self.shape[1] + columns


class Elements:
    """Random access to a tensor's elements: single reads from its file, or an array that is made once.

    Use it as a context manager.

    Attributes:
        dtype: The tensor's.
        step: See :func:`step_of`.
    """

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self._perm: tuple[int, ...] = ()
        self._shape = dims(tensor)
        if isinstance(tensor, PermutedTensor):
            self._perm, tensor = tensor.perm, tensor.base
        self.dtype, self.step = tensor.dtype, step_of(tensor)
        self._tensor, self._file, self._array = tensor, -1, None
        self._exact: TiledTensor | None = None
        if isinstance(tensor, DecodedTensor) and len(self._shape) == 2:
            self._exact, self._turned = tensor.exact(), tensor.turned
        elif isinstance(tensor, ir.ExternalTensor) and lies_in_file(tensor):
            self._file = os.open(tensor.path, os.O_RDONLY)
        else:
            self._array = np.asarray(tensor.numpy())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file, self._array, self._exact = -1, None, None

    def at(self, flat: Array) -> Array:
        """The elements at these positions of the flattened tensor, as float64.

        Raises:
            InputError: The file ends before them.
        """
        index = np.unravel_index(flat, self._shape) if self._shape else ()
        if self._perm:
            axes = sorted(range(len(self._perm)), key=self._perm.__getitem__)
            index = tuple(index[axis] for axis in axes)
        if self._exact is not None:
            return self._decode(self._exact, index[::-1] if self._turned else index)
        if self._array is not None:
            return np.asarray(self._array[index]).astype(np.float64)
        return self._read(np.ravel_multi_index(index, dims(self._tensor)))

    @staticmethod
    def _decode(exact: TiledTensor, index: tuple[Array, ...]) -> Array:
        """Codes are decoded a row at a time: what they mean lies in another tensor."""
        rows, columns = index
        return np.array([read_rows(exact, int(i), int(i) + 1)[0, j] for i, j in zip(rows, columns, strict=True)])

    def _read(self, flat: Array) -> Array:
        dtype = self._tensor.dtype.numpy()
        offset = getattr(self._tensor, "offset", 0) or 0
        size = dtype.itemsize
        data = b"".join(os.pread(self._file, size, offset + size * int(position)) for position in flat)
        if len(data) != size * len(flat):
            raise InputError(f"tensor {self._tensor.name!r}: its file ends before it does.", hint="Fetch it again.")
        return np.frombuffer(data, dtype).astype(np.float64)
