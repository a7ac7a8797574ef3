"""Scales and zero points for inputs that are known: an error in a column costs what is multiplied with it.

Round-to-nearest takes the smallest grid that holds a block's values. A smaller one cuts off the outliers and is finer
for the rest; here each block gets, of nearest's grid and of some smaller ones, that with the least Σ Hⱼⱼ·E²ᵢⱼ.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loracc.dtypes import Array
from loracc.encodings.encoded_weight import EncodedWeight
from loracc.encodings.grid import Blocks, Grid
from loracc.requantized import Settled
from loracc.sites import Layout

__all__ = ["FACTORS", "owned", "shrunk", "taken"]

#: What the extremes of a block are multiplied with.
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def shrunk(weight: EncodedWeight, settled: Settled, exact: Array, power: Array, axis: int) -> Grid:
    """The grid with the least weighted error, block by block; what no delta changes keeps its own.

    Args:
        weight: The base's.
        settled: Nearest's decision.
        exact: W + ΔW, float64, with the axes of the codes.
        power: Hⱼⱼ for each input feature.
        axis: That of the input features.
    """
    if weight.pinned:
        return settled.grid
    blocks, old, rule = weight.blocks, weight.grid(), weight.rule()
    costly = np.expand_dims(power, 1 - axis)
    least, most = (_reduced(weight, function, exact) for function in (np.minimum, np.maximum))
    best, cost = settled.grid, _cost(weight, settled.grid, exact, costly)
    for factor in FACTORS:
        grid = rule.fit(least * factor, most * factor, old)
        new = _cost(weight, grid, exact, costly)
        better = settled.touched & (new < cost)
        scales, zeros = np.where(better, grid.scales, best.scales), np.where(better, grid.zeros, best.zeros)
        best, cost = Grid(blocks, scales, zeros, best.low, best.high), np.where(better, new, cost)
    return best


def _reduced(weight: EncodedWeight, function: np.ufunc, values: Array) -> Array:
    """``function`` over each block of a whole weight."""
    found = [weight.blocks.reduce(function, values[lo:hi]) for lo, hi in weight.spans()]
    if weight.blocks.by_rows:
        return np.concatenate(found)
    result: Array = function.reduce(found)
    return result


def _cost(weight: EncodedWeight, grid: Grid, exact: Array, power: Array) -> Array:
    """Per block, Σ Hⱼⱼ·E² of the nearest codes; inf where the grid has no codes."""
    total = np.zeros(weight.blocks.grid)
    for lo, hi in weight.spans():
        part = grid.part(lo, hi)
        off = part.decode(part.nearest(exact[lo:hi]))
        off -= exact[lo:hi]
        np.square(off, out=off)
        off *= power if len(power) == 1 else power[lo:hi]
        total[weight.blocks.rows(lo, hi)] += weight.blocks.reduce(np.add, off)
    return np.where(np.isnan(total), np.inf, total)


def owned(blocks: Blocks, layout: Layout) -> tuple[slice, ...] | None:
    """The blocks that are a site's own, as an index of the scales; None where it shares some with other rows."""
    index = [slice(None), slice(None)]
    if layout.whole:
        return tuple(index)
    axis = layout.perm[0] if layout.perm else 0
    step = blocks.block if blocks.block and blocks.axis == axis else 1
    stop = blocks.shape[axis] if layout.stop is None else layout.stop
    if blocks.grid[axis] == 1 or layout.start % step or (stop % step and stop != blocks.shape[axis]):
        return None
    index[axis] = slice(layout.start // step, -(-stop // step))
    return tuple(index)


def taken(grid: Grid, new: Grid, index: tuple[slice, ...]) -> Grid:
    """``grid`` with the scales and zero points of ``new`` at ``index``."""
    scales, zeros = grid.scales.copy(), grid.zeros.copy()
    scales[index], zeros[index] = new.scales[index], new.zeros[index]
    return replace(grid, scales=scales, zeros=zeros)
