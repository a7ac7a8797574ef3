"""All of a stretch of an initializer against a tensor of the checkpoint, streamed in tiles of rows."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array, unit_roundoff
from loracc.passes.content_places import Place
from loracc.passes.content_samples import agree, step_of
from loracc.tensors import PermutedTensor, dims, open_rows, tile_rows

__all__ = ["digest", "first_difference"]

#: Share of a quantized weight's elements that may be further than a step from the original's.
_OUTLIERS = 0.01


def first_difference(
    stored: ir.TensorProtocol, place: Place, tensor: ir.TensorProtocol, *, turned: bool
) -> tuple[int, ...] | None:
    """Index into the initializer of the first element that is not the tensor's; None when all are.

    Of a quantized weight some elements may be further than a step from the original's: it was clipped, or rounded with
    a view to its neighbours' errors.

    Args:
        stored: The initializer's tensor.
        place: Which stretch of it.
        tensor: The checkpoint's tensor.
        turned: It is compared transposed.
    """
    other = PermutedTensor(tensor, (1, 0)) if turned else tensor
    shape = dims(other)  # of the stretch, as stored
    step = tile_rows(shape, max(int(stored.dtype.itemsize), int(other.dtype.itemsize)))
    quantized, budget = step_of(stored), int(_OUTLIERS * math.prod(shape))
    along = place.start if place.axis == 0 else 0
    columns = slice(place.start, place.stop) if place.axis == 1 else slice(None)
    width = dims(stored)[1:]
    with open_rows(stored) as mine, open_rows(other) as theirs:
        for lo in range(0, shape[0], step):
            hi = min(lo + step, shape[0])
            one = np.empty((hi - lo, *width), stored.dtype.numpy())
            two = np.empty((hi - lo, *shape[1:]), other.dtype.numpy())
            mine.fill(lo + along, hi + along, one)
            theirs.fill(lo, hi, two)
            part = one[:, columns] if place.axis == 1 else one
            at, count = _first(part, two, (stored.dtype, other.dtype), quantized)
            budget -= count if quantized else 0
            if at is not None and (not quantized or budget < 0):
                start = [lo + along, *(0 for _ in shape[1:])]
                if place.axis == 1:
                    start[1] = place.start
                return tuple(int(i) + offset for i, offset in zip(at, start, strict=True))
    return None


def _first(
    one: Array, two: Array, dtypes: tuple[ir.DataType, ir.DataType], step: float
) -> tuple[tuple[int, ...] | None, int]:
    """Where two tiles differ first, and at how many elements."""
    if not step and _equal(one, two, *dtypes):
        return None, 0
    same = agree(one.astype(np.float64), two.astype(np.float64), *dtypes, step)
    count = int(same.size - np.count_nonzero(same))
    return (tuple(int(i) for i in np.argwhere(~same)[0]) if count else None), count


def _equal(one: Array, two: Array, first: ir.DataType, second: ir.DataType) -> bool:
    """Equal bit for bit, or by the cast that exporters do; without any float64, which is a tenth as fast."""
    if first == second:
        return bool((_bits(one) == _bits(two)).all())
    narrow, wide = (one, two) if unit_roundoff(first) > unit_roundoff(second) else (two, one)
    if bool((narrow.astype(wide.dtype) == wide).all()):
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        return bool((wide.astype(narrow.dtype) == narrow).all())


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def digest(tensor: ir.TensorProtocol) -> str:
    """A digest of the tensor's dtype, shape and bytes."""
    shape, found = dims(tensor), hashlib.sha256()
    found.update(f"{tensor.dtype.name}{shape}".encode())
    step = tile_rows(shape, int(tensor.dtype.itemsize))
    with open_rows(tensor) as rows:
        for lo in range(0, shape[0], step):
            tile = np.empty((min(lo + step, shape[0]) - lo, *shape[1:]), tensor.dtype.numpy())
            rows.fill(lo, lo + len(tile), tile)
            found.update(np.ascontiguousarray(tile).view(np.uint8).data)
    return found.hexdigest()
