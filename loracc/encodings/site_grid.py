"""The grid of one site's matrix ``[out, in]``, whatever way the codes lie: what a choice of codes asks of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loracc.dtypes import Array
from loracc.encodings.grid import Grid
from loracc.sites import Layout

__all__ = ["SiteGrid"]


@dataclass(frozen=True)
class SiteGrid:
    """Scales and zero points with the matrix's own axes.

    Attributes:
        scales, zeros: Float64 ``[groups of rows, groups of columns]``.
        rows, columns: For each row and column of the matrix, its group.
        low, high: The codes there are.
    """

    scales: Array
    zeros: Array
    rows: Array
    columns: Array
    low: int
    high: int

    @classmethod
    def of(cls, grid: Grid, layout: Layout) -> SiteGrid:
        """The part of a whole weight's grid that is a site's; ``layout`` says how the site lies in the codes."""
        blocks, perm = grid.blocks, layout.perm or (0, 1)
        groups = []
        for axis in (0, 1):
            length, step = blocks.shape[axis], blocks.block if blocks.block and blocks.axis == axis else 1
            groups.append(np.arange(length) // step if blocks.grid[axis] > 1 else np.zeros(length, np.intp))
        scales, zeros = grid.scales.transpose(perm), grid.zeros.transpose(perm)
        rows = groups[perm[0]][layout.start : layout.stop]
        return cls(scales, zeros, rows, groups[perm[1]], grid.low, grid.high)

    def part(self, lo: int, hi: int) -> SiteGrid:
        """The grid of rows ``lo`` to ``hi``."""
        return SiteGrid(self.scales, self.zeros, self.rows[lo:hi], self.columns, self.low, self.high)

    def expanded(self) -> tuple[Array, Array]:
        """Scale and zero point of every element: float64 ``[out, in]`` each."""
        index = np.ix_(self.rows, self.columns)
        return self.scales[index], self.zeros[index]

    def column(self, k: int, lo: int, count: int) -> tuple[Array, Array]:
        """Scales and zero points of ``count`` elements of column ``k``, from row ``lo``."""
        groups = self.rows[lo : lo + count]
        return self.scales[groups, self.columns[k]], self.zeros[groups, self.columns[k]]

    def ideal(self, values: Array) -> Array:
        """Where values lie among the codes, between the lowest and the highest; not rounded; NaN where a scale is 0."""
        scales, zeros = self.expanded()
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            found: Array = np.where(scales != 0, values / scales + zeros, np.nan)
        return np.clip(found, self.low, self.high, out=found)

    def decode(self, codes: Array) -> Array:
        """What codes ``[out, in]`` mean, in float64."""
        scales, zeros = self.expanded()
        values: Array = (codes - zeros) * scales
        return values
