"""Where the weights lie in a plan: looked for, and compared byte for byte where they seem to be.

The builder writes a weight that needs no repacking as it is, at a multiple of 8 bytes. Products with the same input
(query, key and value) it fuses: their weights lie side by side, row after row of each. A product whose columns the
graph splits (GPT-2's query, key and value in one) it takes apart and fuses anew: blocks of columns, in another order.
So a weight is looked for whole, then by its rows at one distance, then by blocks of its columns, each as wide as all
rows agree. One pass over the plan looks at every eighth byte for eight bytes of each weight, and only those places are
compared whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.tensors import dims

__all__ = ["Place", "find_places", "seen"]

_GRID = 8
#: Below this many bytes a match may be chance.
_SMALLEST = 32
#: Grid points looked at in one go.
_CHUNK = 1 << 22
#: Blocks of columns that a weight may be in.
_MOST_BLOCKS = 16
_LOW = np.uint64((1 << 20) - 1)


@dataclass(frozen=True)
class Place:
    """Bytes of a plan: ``rows`` runs of ``run`` bytes, ``stride`` bytes apart, from ``at`` on."""

    at: int
    rows: int
    run: int
    stride: int

    def view(self, plan: Array) -> Array | None:
        """These bytes of an array of bytes (or of flags for bytes) as ``[rows, run]``; None where they do not fit."""
        end = self.at + (self.rows - 1) * self.stride + self.run
        if self.at < 0 or self.rows < 1 or self.stride < self.run or self.run < 1 or end > plan.size:
            return None
        return np.lib.stride_tricks.as_strided(plan[self.at : end], (self.rows, self.run), (self.stride, 1))


def seen(places: Sequence[Place], plan: Array) -> list[Array]:
    """The blocks of a weight, in the order of its columns, as views of the plan; none where one does not fit."""
    views = [place.view(plan) for place in places]
    found = [view for view in views if view is not None]
    alike = len({len(view) for view in found}) == 1
    return found if alike and len(found) == len(views) else []


def find_places(
    plan: bytes, tensors: Mapping[str, ir.TensorProtocol]
) -> dict[str, tuple[ir.TensorProtocol, str, Sequence[Place]]]:
    """Each tensor with the sha256 of its bytes and the places of its blocks; none where it is not there as it is.

    Args:
        plan: The serialized engine.
        tensors: By name; each is read once.
    """
    whole = np.frombuffer(plan, np.uint8)
    data = {name: _bytes(tensor) for name, tensor in tensors.items()}
    found: dict[str, Sequence[Place]] = {}

    def contiguous(name: str, at: int) -> None:
        place = Place(at, 1, data[name].size, data[name].size)
        if name not in found and _same(place.view(whole), data[name]):
            found[name] = (place,)

    _scan(whole, {name: array for name, array in data.items() if array.size >= _SMALLEST}, contiguous)
    rows = {name: _rows(tensors[name], data[name]) for name in data if name not in found}
    _find_rows(whole, {name: array for name, array in rows.items() if array is not None}, found)
    left = {name: array for name, array in rows.items() if array is not None and name not in found}
    _find_blocks(whole, left, found)
    return {name: (tensor, _digest(data[name]), found.get(name, ())) for name, tensor in tensors.items()}


def _find_rows(whole: Array, rows: Mapping[str, Array], found: dict[str, Sequence[Place]]) -> None:
    """Weights whose rows lie at one distance: told by the first two."""
    firsts, seconds = _starts(whole, rows)
    for name, array in rows.items():
        for at in firsts[name]:
            second = _next(seconds[name], at + array.shape[1])
            if second is None or name in found:
                continue
            place = Place(at, len(array), array.shape[1], second - at)
            if _same(place.view(whole), array):
                found[name] = (place,)


def _find_blocks(whole: Array, rows: Mapping[str, Array], found: dict[str, Sequence[Place]]) -> None:
    """Weights whose columns lie in blocks: each is looked for from where the one before ends, as wide as it goes."""
    blocks: dict[str, list[Place]] = {name: [] for name in rows}
    left = dict(rows)
    for _ in range(_MOST_BLOCKS):
        heads = {name: array[:2, :_SMALLEST] for name, array in left.items() if array.shape[1] >= _SMALLEST}
        firsts, seconds = _starts(whole, heads)
        ahead: dict[str, Array] = {}
        for name in heads:
            tried = (_widest(whole, left[name], at, _next(seconds[name], at + _SMALLEST)) for at in firsts[name])
            place = max((one for one in tried if one is not None), key=lambda one: one.run, default=None)
            if place is None:
                continue
            blocks[name].append(place)
            if place.run == left[name].shape[1]:
                found[name] = tuple(blocks[name])
            else:
                ahead[name] = left[name][:, place.run :]
        left = ahead
        if not left:
            return


def _widest(whole: Array, rows: Array, at: int, second: int | None) -> Place | None:
    """The block at ``at``: the first columns of all rows, as many as are there; None where they are too few."""
    if second is None:
        return None
    stride = second - at
    width = min(rows.shape[1], stride, whole.size - at - (len(rows) - 1) * stride)
    view = Place(at, len(rows), width, stride).view(whole)
    if view is None:
        return None
    differ = np.flatnonzero((view != rows[:, :width]).any(axis=0))
    # A few bytes more may agree by chance: blocks begin on the grid.
    run = int(differ[0]) // _GRID * _GRID if differ.size else width
    return Place(at, len(rows), run, stride) if run >= _SMALLEST else None


def _starts(whole: Array, rows: Mapping[str, Array]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Where the first row of each may lie, and the second."""
    firsts: dict[str, list[int]] = {name: [] for name in rows}
    seconds: dict[str, list[int]] = {name: [] for name in rows}
    _scan(whole, {name: array[0] for name, array in rows.items()}, lambda name, at: firsts[name].append(at))
    _scan(whole, {name: array[1] for name, array in rows.items()}, lambda name, at: seconds[name].append(at))
    return firsts, seconds


def _next(places: Sequence[int], start: int) -> int | None:
    """The first of some places from ``start`` on."""
    return min((at for at in places if at >= start), default=None)


def _scan(whole: Array, wanted: Mapping[str, Array], tell: Callable[[str, int], None]) -> None:
    """Tell of every place where eight telling bytes of an array are; most are where all of it is."""
    keys: dict[int, list[tuple[str, int]]] = {}
    for name, array in wanted.items():
        offset = _telling(array)
        keys.setdefault(int(array[offset : offset + _GRID].view(np.uint64)[0]), []).append((name, offset))
    grid = whole[: whole.size // _GRID * _GRID].view(np.uint64)
    known = np.array(sorted(keys), np.uint64)
    likely = np.zeros(int(_LOW) + 1, bool)  # by the low bits, which are the mantissa's of some element
    likely[known & _LOW] = True
    for start in range(0, grid.size, _CHUNK):
        part = grid[start : start + _CHUNK]
        maybe = np.flatnonzero(likely[part & _LOW])
        for index in maybe[np.isin(part[maybe], known)]:
            for name, offset in keys[int(part[index])]:
                tell(name, (start + int(index)) * _GRID - offset)


def _same(view: Array | None, data: Array) -> bool:
    return view is not None and bool(np.array_equal(view.reshape(-1) if data.ndim == 1 else view, data))


def _rows(tensor: ir.TensorProtocol, data: Array) -> Array | None:
    """The tensor's bytes as ``[rows, bytes of a row]``; None where its rows cannot be told."""
    shape = dims(tensor)
    if len(shape) < 2 or tensor.dtype.bitwidth < 8:
        return None
    run = int(shape[-1]) * int(tensor.dtype.itemsize)
    return data.reshape(-1, run) if run >= _SMALLEST and data.size >= 2 * run else None


def _bytes(tensor: ir.TensorProtocol) -> Array:
    """The tensor's bytes as they are stored, without a copy where there need be none."""
    if tensor.dtype.bitwidth < 8:  # packed
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _digest(data: Array) -> str:
    return hashlib.sha256(data.data).hexdigest()


def _telling(data: Array) -> int:
    """A multiple of the grid where the data is not what is found everywhere: no zeros, not eight times the same."""
    words = data[: data.size // _GRID * _GRID].view(np.uint64)
    values, first, counts = np.unique(words[: 1 << 16], return_index=True, return_counts=True)
    order = np.lexsort((first, counts, values == 0))
    return int(first[order[0]]) * _GRID
