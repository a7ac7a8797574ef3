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
from loracc.errors import InputError

__all__ = ["PermutedTensor", "TiledTensor", "dims", "file_tensor", "read_rows", "tile_rows"]

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


def read_rows(tensor: ir.TensorProtocol, lo: int, hi: int) -> Array:
    """Rows ``lo`` to ``hi`` of a tensor in its own dtype, reading no more than they need where it lies in a file.

    A scalar counts as one row. The result may be read-only.

    Raises:
        InputError: The file ends before the rows do.
    """
    if isinstance(tensor, TiledTensor):
        return tensor.rows(lo, hi)
    shape = dims(tensor)
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8 and shape:
        row_bytes = int(tensor.dtype.itemsize) * math.prod(shape[1:])
        wanted = (hi - lo) * row_bytes
        with open(tensor.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), wanted, (tensor.offset or 0) + lo * row_bytes)
        if len(data) != wanted:
            raise InputError(
                f"{tensor.path}: the file ends inside tensor {tensor.name!r}.",
                hint="The file is truncated: fetch it again.",
            )
        return np.frombuffer(data, dtype=tensor.dtype.numpy()).reshape(hi - lo, *shape[1:])
    array: Array = tensor.numpy()
    return array[lo:hi] if shape else array


class TiledTensor(ir.LazyTensor):
    """A tensor that computes itself in tiles of rows, and checks that each has the declared shape and dtype.

    ``onnx_ir.LazyTensor`` does not check what its thunk returns, and ``ir.save`` then writes a corrupt file without a
    word (docs/upstream.md); this class does.
    """

    def __init__(self, dtype: ir.DataType, shape: Sequence[int], name: str | None) -> None:
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)

    @abc.abstractmethod
    def compute_rows(self, lo: int, hi: int) -> Array:
        """Rows ``lo`` to ``hi`` in the tensor's dtype."""

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
        """``(lo, hi, rows)`` over the whole tensor, in order."""
        shape = dims(self)
        length = shape[0] if shape else 1
        step = tile_rows(shape, int(self.dtype.itemsize), tile_bytes)
        for lo in range(0, length, step):
            hi = min(lo + step, length)
            yield lo, hi, self.rows(lo, hi)

    def _whole(self) -> ir.TensorProtocol:
        return ir.Tensor(self.numpy(), dtype=self.dtype, name=self.name)

    def numpy(self) -> Array:
        result = np.empty(dims(self), self.dtype.numpy())
        for lo, hi, rows in self.tiles():
            if result.ndim:
                result[lo:hi] = rows
            else:
                result[...] = rows
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

    def compute_rows(self, lo: int, hi: int) -> Array:
        # ExternalTensor.numpy() is a memory map: only the pages under these columns are touched.
        return np.ascontiguousarray(self.base.numpy().transpose(self.perm)[lo:hi])
