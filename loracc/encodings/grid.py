"""The numbers that codes can mean: ``value = (code - zero) · scale``, one scale and zero point for a block of elements.

:class:`Blocks` says which elements share a scale, :class:`Grid` holds the scales, :class:`Rule` makes new ones for new
values. Rounding, fitting and (elsewhere) packing are functions of their own, so that a rounding that compensates its
errors can use the same grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array, round_to

__all__ = ["Blocks", "Grid", "Rule", "used_range"]


@dataclass(frozen=True)
class Blocks:
    """Which elements of a weight share a scale.

    Attributes:
        shape: The weight's.
        axis: The axis along which scales differ; None where there is one for the whole tensor.
        block: Elements of ``axis`` that share one scale, which then differ along every other axis too; 0 where each
            index of ``axis`` has one of its own (per channel).
    """

    shape: tuple[int, ...]
    axis: int | None = None
    block: int = 0

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the scales, with as many axes as the weight: they broadcast once ``expand`` has repeated blocks."""
        if self.axis is None:
            return (1,) * len(self.shape)
        if self.block:
            return tuple(-(-n // self.block) if i == self.axis else n for i, n in enumerate(self.shape))
        return tuple(n if i == self.axis else 1 for i, n in enumerate(self.shape))

    @property
    def by_rows(self) -> bool:
        """Whether different rows (runs of ``row_step`` of them) never share a scale."""
        return self.axis == 0 or bool(self.block)

    @property
    def row_step(self) -> int:
        """Rows that belong together."""
        return self.block if self.block and self.axis == 0 else 1

    def rows(self, lo: int, hi: int) -> slice:
        """The rows of the scales that rows ``lo`` to ``hi`` of the weight use; ``lo`` begins a block."""
        if not self.by_rows:
            return slice(0, 1)
        return slice(lo // self.row_step, -(-hi // self.row_step))

    def expand(self, values: Array, count: int) -> Array:
        """Scales of ``count`` rows, repeated so that they broadcast against these rows."""
        if not self.block:
            return values
        assert self.axis is not None
        length = count if self.axis == 0 else self.shape[self.axis]
        shape = (*values.shape[: self.axis + 1], self.block, *values.shape[self.axis + 1 :])
        wide = np.broadcast_to(np.expand_dims(values, self.axis + 1), shape)
        repeated = wide.reshape(*values.shape[: self.axis], -1, *values.shape[self.axis + 1 :])
        return repeated[(slice(None),) * self.axis + (slice(0, length),)]

    def reduce(self, function: np.ufunc, values: Array) -> Array:
        """``function`` over each block of some rows: an array shaped as their scales."""
        if self.block:
            starts = np.arange(0, values.shape[self.axis or 0], self.block)
            result: Array = function.reduceat(values, starts, axis=self.axis or 0)
            return result
        axes = tuple(i for i in range(values.ndim) if i != self.axis)
        reduced: Array = function.reduce(values, axis=axes, keepdims=True)
        return reduced


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of some rows, in float64 and shaped as :attr:`Blocks.grid` says.

    Attributes:
        blocks: Of the whole weight.
        scales: In float64, exactly what is stored.
        zeros: Likewise.
        low, high: The codes there are.
    """

    blocks: Blocks
    scales: Array
    zeros: Array
    low: int
    high: int

    def part(self, lo: int, hi: int) -> Grid:
        """The grid of rows ``lo`` to ``hi``."""
        rows = self.blocks.rows(lo, hi)
        return Grid(self.blocks, self.scales[rows], self.zeros[rows], self.low, self.high)

    def decode(self, codes: Array) -> Array:
        """Codes of these rows to float64 values."""
        scales, zeros = (self.blocks.expand(values, len(codes)) for values in (self.scales, self.zeros))
        values: Array = codes - zeros
        values *= scales
        return values

    def position(self, values: Array) -> Array:
        """Where values lie on the scale of codes: not rounded, not clipped; NaN where the scale is zero."""
        with np.errstate(divide="ignore"):
            inverse = 1.0 / self.scales
        inverse[~np.isfinite(inverse) | (inverse == 0)] = np.nan
        inverse, zeros = (self.blocks.expand(array, len(values)) for array in (inverse, self.zeros))
        with np.errstate(invalid="ignore", over="ignore"):
            found: Array = values * inverse
            found += zeros
        return found

    def nearest(self, values: Array) -> Array:
        """The codes (float64, whole) whose meaning is nearest; a tie goes to the even code, NaN where none is."""
        codes = self.position(values)
        np.rint(codes, out=codes)
        return np.clip(codes, self.low, self.high, out=codes)


@dataclass(frozen=True)
class Rule:
    """How round-to-nearest quantizers choose scales: the smallest grid that holds a block's values.

    * symmetric (the zero point is fixed): ``scale = max(max/(high - zero), min/(low - zero))``; where scales may be
      negative (MatMulNBits' own quantizer), the element of largest magnitude is put on the lowest code:
      ``scale = extreme/(low - zero)``;
    * asymmetric: ``scale = (max - min)/(high - low)`` with ``min ≤ 0 ≤ max``, ``zero = low - min/scale``, rounded where
      zero points are integers.

    (onnxruntime: ``MlasBlockwiseQuantizer``, ``quantization.quant_utils.compute_scale_zp``.)

    Attributes:
        low, high: The codes that the quantizer uses.
        symmetric: Zero points stay as they are.
        negative_scales: See above.
        scale_dtype: What scales are stored in; they are rounded to it first, and codes are those of the stored scale.
        zero_dtype: A float type of the zero points, None for integers.
    """

    low: int
    high: int
    symmetric: bool
    negative_scales: bool
    scale_dtype: ir.DataType
    zero_dtype: ir.DataType | None = None

    def fit(self, minimum: Array, maximum: Array, old: Grid) -> Grid:
        """The grid for blocks of these extremes; a block of zeros keeps its old one."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            exact = self._scales(minimum, maximum, old.zeros)
            scales = round_to(exact, self.scale_dtype).astype(np.float64)
        smallest = 2.0**-24 if self.scale_dtype == ir.DataType.FLOAT16 else 2.0**-126
        scales = np.where((scales == 0) & (exact != 0), np.copysign(smallest, exact), scales)
        fits = np.isfinite(scales) & (scales != 0)
        zeros = old.zeros
        if not self.symmetric:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                wanted = self.low - np.minimum(minimum, 0) / scales
            if self.zero_dtype is None:
                zeros = np.clip(np.rint(wanted), self.low, self.high)
            else:
                zeros = round_to(wanted, self.zero_dtype).astype(np.float64)
        return Grid(old.blocks, np.where(fits, scales, old.scales), np.where(fits, zeros, old.zeros), old.low, old.high)

    def _scales(self, minimum: Array, maximum: Array, zeros: Array) -> Array:
        if not self.symmetric:
            span: Array = (np.maximum(maximum, 0) - np.minimum(minimum, 0)) / (self.high - self.low)
            return span
        if self.negative_scales:
            extreme: Array = np.where(np.abs(maximum) > np.abs(minimum), maximum, minimum) / (self.low - zeros)
            return extreme
        above, below = self.high - zeros, self.low - zeros
        up = np.where(above > 0, np.maximum(maximum, 0) / np.where(above > 0, above, 1), 0.0)
        down = np.where(below < 0, np.minimum(minimum, 0) / np.where(below < 0, below, -1), 0.0)
        return np.maximum(up, down)


def used_range(low: int, high: int, used_low: int, used_high: int, zero: int) -> tuple[int, int]:
    """The codes that a quantizer seems to choose from: all, all but the lowest (symmetric), or one bit fewer.

    onnxruntime's symmetric quantization leaves out -128; with ``reduce_range`` codes have seven bits, so that products
    do not saturate on older processors, and have to stay so.

    >>> used_range(-128, 127, -127, 127, 0), used_range(-128, 127, -64, 63, 0), used_range(0, 255, 3, 200, 117)
    ((-127, 127), (-64, 64), (0, 255))
    """
    half = (high - low + 1) // 4
    if high - low >= 255:
        reduced = (0, 2 * half - 1) if low == 0 else (-half, half)
        if used_low >= reduced[0] and used_high <= reduced[1]:
            return reduced
    narrow = (2 * zero - high, high)
    if low < narrow[0] <= used_low:
        return narrow
    return low, high
