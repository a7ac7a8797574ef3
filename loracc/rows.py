"""Readers of weight rows that fill the caller's buffer: plain from a file, transposed from a file, from memory.

A reader is opened for one pass over (a part of) one tensor and closed after it. It fills what the caller hands it,
since fresh memory costs more (page faults) than the arithmetic done on it.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from loracc.dtypes import Array
from loracc.errors import InputError

__all__ = [
    "ArrayRows",
    "FileRows",
    "Rows",
    "RowsBase",
    "TransposedRows",
    "give_back",
    "mapped",
    "transpose_into",
]

#: Bytes of the output panel that a transposing reader keeps.
PANEL_BYTES = 8 << 20
#: Bytes of a mapped source that may be resident at once.
_RESIDENT_BYTES = 16 << 20
#: Source rows turned at a time.
_SLAB_ROWS = 128


def mapped(path: str | os.PathLike[str]) -> Array:
    """The bytes of a file as a read-only array that is read when looked at; see :func:`give_back`.

    The caller has checked that what it will look at lies inside the file.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def give_back(array: Array) -> None:
    """Free the memory that a look at a :func:`mapped` array took; it is read again at the next look.

    Without effect on any other array: only the map itself knows that its pages can be had again.
    """
    base: object = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise") and array.flags.c_contiguous and array.nbytes:
        start = array.ctypes.data - np.frombuffer(base, np.uint8, 1).ctypes.data
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        base.madvise(mmap.MADV_DONTNEED, first, start + array.nbytes - first)


class Rows(Protocol):
    """An open pass over the rows of a tensor (axis 0; a scalar has one row)."""

    def fill(self, lo: int, hi: int, out: Array) -> None:
        """Rows ``lo`` to ``hi`` into ``out``: C-contiguous, of the tensor's own dtype, ``[hi - lo, *shape[1:]]``."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class RowsBase:
    """A context manager that calls ``close``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to close."""


class ArrayRows(RowsBase):
    """Rows of an array in memory."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def fill(self, lo: int, hi: int, out: Array) -> None:
        out[...] = self._array[lo:hi] if self._array.ndim else self._array


class FileRows(RowsBase):
    """Rows that lie one after the other in a file, from ``offset`` on."""

    def __init__(self, path: str | os.PathLike[str], offset: int, name: str = "") -> None:
        self._path = path
        self._offset = offset
        self._name = name
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def close(self) -> None:
        os.close(self._fd)

    def fill(self, lo: int, hi: int, out: Array) -> None:
        """Fill ``out`` from the file.

        Raises:
            InputError: The file ends before the rows do.
        """
        count = hi - lo
        if not out.nbytes:
            return
        at = self._offset + lo * (out.nbytes // max(count, 1))
        view = out.reshape(-1).view(np.uint8).data
        while view:
            got = os.preadv(self._fd, [view], at)
            if got <= 0:
                raise _truncated(self._path, self._name)
            view, at = view[got:], at + got


class TransposedRows(RowsBase):
    """Rows of the transpose of a matrix ``[m, n]`` in a file: row i is the file's column i.

    The file is mapped and turned one panel of output rows at a time, so that each page is touched once per panel and
    not once per row, and pages are given back as soon as they are turned.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        offset: int,
        shape: Sequence[int],
        dtype: np.dtype[np.generic],
        name: str = "",
        *,
        few: bool = False,
    ) -> None:
        """``few``: only some rows will be asked for, so that no more are turned than that."""
        self._rows, self._columns = shape
        length = math.prod(shape) * dtype.itemsize
        page = offset % mmap.ALLOCATIONGRANULARITY
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < offset + length:
                raise _truncated(path, name)
            # An empty map is impossible; one byte stands for it and is never read.
            self._map = mmap.mmap(file.fileno(), page + length, access=mmap.ACCESS_READ, offset=offset - page)
        self._page = page
        bits = np.dtype(f"u{dtype.itemsize}")
        self._source = np.frombuffer(self._map, bits, math.prod(shape), page).reshape(shape)
        group = max(16 // dtype.itemsize, 1)
        padded = -(-self._rows // group) * group
        height = 8 if few else max(8, PANEL_BYTES // max(padded * dtype.itemsize, 1) // 8 * 8)
        self._panel = np.empty((min(height, self._columns), padded), bits)
        self._held = (0, 0)

    def fill(self, lo: int, hi: int, out: Array) -> None:
        bits = out.view(self._panel.dtype)
        height = len(self._panel)
        at = lo
        while at < hi:
            if not self._held[0] <= at < self._held[1]:
                self._turn(at // height * height)
            first, stop = self._held[0], min(hi, self._held[1])
            bits[at - lo : stop - lo] = self._panel[at - first : stop - first, : self._rows]
            at = stop

    def _turn(self, first: int) -> None:
        """Hold the panel of output rows from ``first`` on."""
        stop = min(first + len(self._panel), self._columns)
        row_bytes = self._columns * self._source.itemsize
        step = max(_SLAB_ROWS, _RESIDENT_BYTES // max(row_bytes, 1) // _SLAB_ROWS * _SLAB_ROWS)
        for at in range(0, self._rows, step):
            end = min(at + step, self._rows)
            transpose_into(self._source[at:end, first:stop], self._panel[: stop - first, at:end])
            self._give_back(at * row_bytes, end * row_bytes)
        self._held = (first, stop)

    def _give_back(self, start: int, stop: int) -> None:
        """Unmap the pages of these source bytes; they stay in the page cache."""
        if hasattr(self._map, "madvise"):
            first = (self._page + start) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, self._page + stop - first)


def transpose_into(source: Array, out: Array) -> None:
    """``out[...] = source.T`` for a C-ordered matrix of unsigned integers.

    numpy's own strided copy takes 2 to 7 ns per two-byte element here, this 1 ns: groups of rows are interleaved into
    16-byte items first (long inner loops, in cache), then whole items are scattered.
    """
    rows, columns = source.shape
    group = 16 // source.itemsize if source.itemsize in (2, 4, 8) else 0
    fits = group and out.strides[0] % 16 == 0 and out.ctypes.data % 16 == 0
    even = rows // group * group if fits else 0
    for at in range(0, even, _SLAB_ROWS):
        end = min(at + _SLAB_ROWS, even)
        groups = (end - at) // group
        stacked = source[at:end].reshape(groups, group, columns)
        items = np.empty((groups, columns, group), source.dtype)
        for k in range(group):
            items[:, :, k] = stacked[:, k]
        out[:, at:end].view(np.complex128)[...] = items.view(np.complex128)[..., 0].T
    if even < rows:
        out[:, even:] = source[even:].T


def _truncated(path: str | os.PathLike[str], name: str) -> InputError:
    where = f" inside tensor {name!r}" if name else " too early"
    return InputError(f"{path}: the file ends{where}.", hint="The file is truncated: fetch it again.")
