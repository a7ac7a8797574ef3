"""W + ΔW in float64, straight from the definition: what the verifier holds the output's weights against.

The oracle shares nothing with the fold but the delta's own formula: it takes the canonical weight in float64 and
applies the deltas of :mod:`loracc.deltas` to it. Slabs are as small as the delta allows; only one that needs the whole
weight (DoRA's norms) gets the whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from loracc.adapter import Delta
from loracc.deltas import LowRank, StackedLowRank
from loracc.dtypes import Array, unit_roundoff
from loracc.folded import Binding
from loracc.sites import Layout
from loracc.tensors import dims, read_rows

__all__ = ["half_ulp", "in_small_slabs", "oracle_slabs"]

#: Elements of one slab: its float64 temporaries stay in the caches and below what malloc maps anew (13 ns per element
#: of a bfloat16 weight, against 18 with half as many or four times as many).
_SLAB_ELEMENTS = 1 << 14
#: For kinds whose every slab costs a whole ΔW.
_COSTLY_SLAB_ELEMENTS = 1 << 24
_FACTORED = (LowRank, StackedLowRank)


def half_ulp(values: Array, dtype: ir.DataType) -> Array:
    """Half the distance of neighbours in ``dtype`` around each value; that of the subnormals at least."""
    smallest = float(ml_dtypes.finfo(dtype.numpy()).smallest_normal)  # type: ignore[no-untyped-call]  # untyped upstream
    _, exponent = np.frexp(np.maximum(np.abs(values), smallest))
    return np.ldexp(unit_roundoff(dtype), exponent - 1)


def in_small_slabs(deltas: Sequence[Delta]) -> bool:
    """Whether no more of a weight with these deltas is in memory at a time than fits the caches."""
    return all(delta.replaces or isinstance(delta, _FACTORED) for delta in deltas)


def oracle_slabs(
    base: ir.TensorProtocol, after: ir.TensorProtocol, layout: Layout, bindings: Sequence[Binding]
) -> Iterator[tuple[Array, Array, Array, Callable[[Array], Array]]]:
    """(W, oracle, W', |W|+|s|Σ|B||A|) of each slab of one site's rows, all canonical and in float64.

    The last is a function of a mask: it is only needed where an element is not the correctly rounded one.
    """
    deltas = [binding.delta for binding in bindings]
    first, rest = [d for d in deltas if d.replaces], [d for d in deltas if not d.replaces]
    whole = not all(delta.additive for delta in rest)
    axis = layout.tiled_axis
    for lo, hi in _ranges(base, layout, whole=whole, cheap=in_small_slabs(rest)):
        offset = layout.start if axis == 0 else 0
        original = _read(base, layout, lo + offset, hi + offset)
        actual = _read(after, layout, lo + offset, hi + offset)
        replaced = original.copy() if first else original
        for delta in first:
            replaced = delta.apply(replaced) if whole else delta.apply_slab(replaced, axis, lo, hi)
        values = [delta.apply(replaced) if whole else delta.apply_slab(replaced.copy(), axis, lo, hi) for delta in rest]
        exact = values[0] if len(values) == 1 else replaced + sum((v - replaced for v in values), np.zeros(()))

        def magnitude(where: Array, replaced: Array = replaced, values: list[Array] = values, lo: int = lo) -> Array:
            total = np.abs(replaced[where])
            for delta, value in zip(rest, values, strict=True):
                total = total + _magnitude(delta, replaced, value, where, axis, lo)
            return total

        yield original, exact, actual, magnitude


def _magnitude(delta: Delta, replaced: Array, value: Array, where: Array, axis: int, lo: int) -> Array:
    """|s|Σ|B||A| at the chosen elements; for other kinds |ΔW| and the largest |W|, which a rotation may mix in."""
    if not isinstance(delta, LowRank):
        return np.abs(value[where] - replaced[where]) + np.abs(replaced).max(initial=0.0)
    index = list(np.nonzero(where))
    index[axis] = index[axis] + lo
    rest = np.ravel_multi_index(index[1:], delta.a.shape[1:]) if len(index) > 1 else np.zeros(len(index[0]), np.int64)
    a = np.abs(delta.a.reshape(delta.rank, -1)[:, rest].astype(np.float64))
    return abs(delta.s) * np.einsum("kr,rk->k", np.abs(delta.b[index[0]].astype(np.float64)), a)


def _ranges(base: ir.TensorProtocol, layout: Layout, *, whole: bool, cheap: bool) -> Iterator[tuple[int, int]]:
    """Slabs along the canonical axis that is stored first."""
    shape = dims(base)
    if not shape:
        yield 0, 1
        return
    length = layout.canonical_shape(shape)[layout.tiled_axis]
    elements = _SLAB_ELEMENTS if cheap else _COSTLY_SLAB_ELEMENTS
    step = length if whole else max(1, elements // max(math.prod(shape[1:]), 1))
    for lo in range(0, length, max(step, 1)):
        yield lo, min(lo + step, length)


def _read(tensor: ir.TensorProtocol, layout: Layout, lo: int, hi: int) -> Array:
    """Stored rows ``lo`` to ``hi`` as a canonical slab in float64."""
    stored = read_rows(tensor, lo, hi)
    permuted = stored.transpose(layout.perm) if layout.perm else stored
    if permuted.ndim and layout.tiled_axis != 0:
        permuted = permuted[layout.start : layout.stop]
    return permuted.astype(np.float64, order="C")
