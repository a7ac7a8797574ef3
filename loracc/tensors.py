"""Weights that are read in parts: slabs of rows from a file, and transposed views of them.

All of them are ``onnx_ir`` tensors, so a graph holds them as it holds any initializer and nothing is read before a
target writes. A weight in a file is an ``ir.ExternalTensor``, whether the file is ONNX external data, a safetensors
shard or an uncompressed member of a ``.pt2`` archive.
"""

from __future__ import annotations

import abc
import math
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import UnsupportedError
from loracc.rows import ArrayRows, FileRows, Rows, RowsBase, TransposedRows

__all__ = ["PermutedTensor", "TiledTensor", "dims", "file_tensor", "open_rows", "read_rows", "tile_rows"]

#: Bytes of one tile. Larger ones were measured slower: page faults are the cost.
TILE_BYTES = 1 << 20


def dims(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """A tensor's shape as plain integers."""
    return tuple(int(n) for n in tensor.shape.numpy())


def file_tensor(
    path: str | os.PathLike[str],
    offset: int,
    length: int,
    dtype: ir.DataType,
    shape: Sequence[int],
    name: str,
) -> ir.ExternalTensor:
    """A weight that stays in its file: ``length`` bytes at ``offset``."""
    return ir.ExternalTensor(os.path.abspath(path), offset, length, dtype, shape=ir.Shape(shape), name=name)


def tile_rows(shape: Sequence[int], itemsize: int, tile_bytes: int = TILE_BYTES) -> int:
    """How many rows of a tensor make a tile: at least one.

    >>> tile_rows((4096, 1024), 2)
    512
    """
    return max(1, tile_bytes // max(itemsize * math.prod(shape[1:]), 1))


def lies_in_file(tensor: ir.TensorProtocol) -> bool:
    """Whether the tensor is bytes of a file, one whole number of bytes per element."""
    return isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8


def open_rows(tensor: ir.TensorProtocol, *, few: bool = False) -> Rows:
    """A pass over a tensor's rows that fills the caller's buffers (see :mod:`loracc.rows`); close it after.

    ``few`` says that only some of the rows will be asked for.
    """
    if isinstance(tensor, TiledTensor):
        return tensor.open_rows(few=few)
    if isinstance(tensor, ir.ExternalTensor) and lies_in_file(tensor):
        return FileRows(tensor.path, tensor.offset or 0, tensor.name)
    return ArrayRows(tensor.numpy())


def read_rows(tensor: ir.TensorProtocol, lo: int, hi: int) -> Array:
    """Rows ``lo`` to ``hi`` of a tensor in its own dtype, reading no more than they need where it lies in a file.

    A scalar counts as one row. The result may be read-only.

    Raises:
        InputError: The file ends before the rows do.
    """
    if not isinstance(tensor, TiledTensor) and not lies_in_file(tensor):
        array: Array = tensor.numpy()
        return array[lo:hi] if array.ndim else array
    shape = dims(tensor)
    result = np.empty((hi - lo, *shape[1:]) if shape else (), tensor.dtype.numpy())
    with open_rows(tensor, few=True) as rows:
        rows.fill(lo, hi, result)
    return result


class TiledTensor(ir.LazyTensor):
    """A tensor that computes itself in tiles of rows, and checks that each has the declared shape and dtype.

    ``onnx_ir.LazyTensor`` does not check what its thunk returns, and ``ir.save`` then writes a corrupt file without a
    word (docs/upstream.md); this class does.
    """

    def __init__(self, dtype: ir.DataType, shape: Sequence[int], name: str | None) -> None:
        if dtype.bitwidth < 8:
            raise UnsupportedError(f"tensor {name!r}: rows of {dtype.name} are packed and cannot be computed in tiles.")
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)

    def __repr__(self) -> str:
        # LazyTensor's own shows its function, which is a method of this tensor: it would never end.
        return f"{type(self).__name__}<{self.dtype},{self.shape}>(name={self.name!r})"

    @abc.abstractmethod
    def compute_rows(self, lo: int, hi: int) -> Array:
        """Rows ``lo`` to ``hi`` in the tensor's dtype."""

    def open_rows(self, *, few: bool = False) -> Rows:
        """A pass over the rows; kinds that can fill a buffer without an array of their own override it."""
        return _ComputedRows(self)

    def rows(self, lo: int, hi: int) -> Array:
        """``compute_rows``, checked."""
        shape = dims(self)
        expected = (hi - lo, *shape[1:]) if shape else ()
        result = self.compute_rows(lo, hi)
        if result.shape != expected or result.dtype != self.dtype.numpy():
            raise AssertionError(
                f"{type(self).__name__} {self.name!r}: rows {lo}:{hi} came out as {result.dtype}{list(result.shape)}, "
                f"declared {self.dtype.numpy()}{list(expected)}"
            )
        return result

    def tiles(self, tile_bytes: int = TILE_BYTES) -> Iterator[tuple[int, int, Array]]:
        """``(lo, hi, rows)`` over the whole tensor, in order; each overwrites the one before."""
        shape = dims(self)
        length = shape[0] if shape else 1
        step = min(tile_rows(shape, int(self.dtype.itemsize), tile_bytes), max(length, 1))
        buffer = np.empty((step, *shape[1:]) if shape else (), self.dtype.numpy())
        with self.open_rows() as rows:
            for lo in range(0, length, step):
                hi = min(lo + step, length)
                tile = buffer[: hi - lo] if shape else buffer
                rows.fill(lo, hi, tile)
                yield lo, hi, tile

    def _whole(self) -> ir.TensorProtocol:
        return ir.Tensor(self.numpy(), dtype=self.dtype, name=self.name)

    def numpy(self) -> Array:
        shape = dims(self)
        result = np.empty(shape, self.dtype.numpy())
        with self.open_rows() as rows:
            rows.fill(0, shape[0] if shape else 1, result)
        return result

    def tobytes(self) -> bytes:
        return self.numpy().tobytes()

    def tofile(self, file: BinaryIO) -> None:
        for _, _, rows in self.tiles():
            file.write(np.ascontiguousarray(rows).view(np.uint8).data if rows.ndim else rows.tobytes())


class PermutedTensor(TiledTensor):
    """A transposed view of another tensor: the lazy ``Transpose(weight)`` that hoisting leaves in a node's place."""

    def __init__(self, base: ir.TensorProtocol, perm: Sequence[int], name: str | None = None) -> None:
        shape = dims(base)
        super().__init__(base.dtype, [shape[i] for i in perm], name if name is not None else base.name)
        self.base = base
        self.perm = tuple(perm)

    def open_rows(self, *, few: bool = False) -> Rows:
        base = self.base
        if self.perm == (1, 0) and isinstance(base, ir.ExternalTensor) and lies_in_file(base) and base.size:
            return TransposedRows(base.path, base.offset or 0, dims(base), self.dtype.numpy(), base.name, few=few)
        return ArrayRows(base.numpy().transpose(self.perm))

    def compute_rows(self, lo: int, hi: int) -> Array:
        shape = dims(self)
        result = np.empty((hi - lo, *shape[1:]) if shape else (), self.dtype.numpy())
        with self.open_rows(few=True) as rows:
            rows.fill(lo, hi, result)
        return result


class _ComputedRows(RowsBase):
    """Rows of a tensor that makes arrays of its own."""

    def __init__(self, tensor: TiledTensor) -> None:
        self._tensor = tensor

    def fill(self, lo: int, hi: int, out: Array) -> None:
        out[...] = self._tensor.rows(lo, hi)
