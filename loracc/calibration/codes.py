"""One quantized weight of a stage, its codes chosen: rules 2 and 3 of :mod:`loracc.calibration.calibrate`, for codes.

1. Every block has the scale and zero point that it has when it is rounded to nearest. (Smaller scales that minimise the
   error weighted by the inputs' mean squares were tried: 0 to 5 % more error in blocks of 16 and 32, 1 % less in int8.)
2. The codes are chosen with feedback, none further than the promise allows from where W + ΔW lies.
3. A few codes are moved so that the delta is there at its own strength (:mod:`loracc.algebra.strength`): on a grid
   whose steps are large beside the delta, chance would leave it at some other one.
4. A site where all that is not clearly better on held-out inputs has nearest's codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loracc.algebra.feedback import Nearest
from loracc.algebra.strength import restore_strength
from loracc.calibrated import Gain
from loracc.calibrated_codes import CalibratedCodes
from loracc.calibration.second_moments import Moments, Sums
from loracc.calibration.weight import MARGIN, CalibrateOptions, by_layout, judged, with_feedback
from loracc.dtypes import Array
from loracc.encodings.site_grid import SiteGrid
from loracc.proof.chosen_codes import STEPS, STRENGTH, CodeNoise, site_noise
from loracc.requantized import RequantizedTensor, Settled, Totals
from loracc.sites import Layout

__all__ = ["round_codes"]

#: Elements of a matrix above which float32 serves to choose its codes.
_FLOAT32_ELEMENTS = 1 << 20
#: Rows that are judged together.
_ROWS = 512


def round_codes(
    fold: RequantizedTensor, fit: Sums, held_out: Sums, path: Path, options: CalibrateOptions
) -> CalibratedCodes:
    """The fold with the codes that are better on held-out inputs, site by site.

    Args:
        fold: A matrix; its sites' inputs are the moments'.
        fit, held_out: The sums to choose with, and those to judge with.
        path: A file for the codes.
        options: See :class:`CalibrateOptions`.
    """
    whole, gains = _Whole.of(fold), dict[str, Gain]()
    for layout, names in by_layout(fold.at_codes).items():
        site = _Site.of(whole, layout)
        own_fit, own_held_out = (part.of(layout, site.exact) for part in (fit, held_out))
        codes, gain = site.choose(own_fit, own_held_out, options)
        gains |= dict.fromkeys(names, gain)
        if gain.used:
            layout.view(whole.codes)[...] = codes
    return CalibratedCodes(fold, whole.codes, whole.totals(), path, gains)


@dataclass
class _Whole:
    """A weight with nearest's codes, all with the axes of the codes: int32 codes, W and W + ΔW in float64."""

    fold: RequantizedTensor
    settled: Settled
    original: Array
    exact: Array
    codes: Array

    @classmethod
    def of(cls, fold: RequantizedTensor) -> _Whole:
        exact = np.empty(fold.weight.shape)
        codes = np.empty(fold.weight.shape, np.int32)
        for lo, hi, part in fold.exact_spans(fold.weight.spans()):
            exact[lo:hi], codes[lo:hi] = part, fold.codes_of(part, lo, hi)
        return cls(fold, fold.settled, fold.decoded.exact().numpy(), exact, codes)

    def touched(self) -> Array:
        """Whether each element is in a block that a delta changes."""
        blocks = self.settled.grid.blocks
        return np.broadcast_to(blocks.expand(self.settled.touched, len(self.codes)), self.codes.shape)

    def totals(self) -> Totals:
        """What the codes lose as they are now."""
        totals, touched, grid = Totals(), self.touched(), self.settled.grid
        for lo, hi in self.fold.weight.spans():
            change = self.exact[lo:hi] - self.original[lo:hi]
            off = np.where(touched[lo:hi], grid.part(lo, hi).decode(self.codes[lo:hi]) - self.exact[lo:hi], 0.0)
            totals.weight += float(np.vdot(self.original[lo:hi], self.original[lo:hi]))
            totals.change += float(np.vdot(change, change))
            totals.lost += float(np.vdot(off, off))
            totals.along += float(np.vdot(off, change)) + float(np.vdot(change, change))
        return totals


@dataclass
class _Site:
    """A site's part of it, ``[out, in]``: views of the whole, its grid, and the codes that may be chosen."""

    grid: SiteGrid
    low: int
    high: int
    original: Array
    exact: Array
    codes: Array
    free: Array

    @classmethod
    def of(cls, whole: _Whole, layout: Layout) -> _Site:
        views = (layout.view(values) for values in (whole.original, whole.exact, whole.codes, whole.touched()))
        # A quantizer may leave codes out (-128, or a bit, so that products do not saturate).
        rule, used = whole.fold.weight.rule(), layout.view(whole.codes)
        low, high = min(rule.low, int(used.min())), max(rule.high, int(used.max()))
        return cls(SiteGrid.of(whole.settled.grid, layout), low, high, *views)

    def choose(self, fit: Moments, held_out: Moments, options: CalibrateOptions) -> tuple[Array, Gain]:
        """The codes, and whether they are better than to nearest."""
        dtype = np.float32 if self.exact.size > _FLOAT32_ELEMENTS else np.float64
        values = with_feedback(self.exact.astype(dtype), fit, self._nearest(dtype), options)
        codes = self._codes(values)
        self._at_strength(codes, fit)
        gain = judged(held_out, self.exact, self.grid.decode(self.codes), self.grid.decode(codes))
        return codes, gain if not gain.used else replace(gain, used=not self._noise(codes).broken(margin=MARGIN))

    def _rows(self) -> Iterator[tuple[int, int]]:
        for lo in range(0, len(self.exact), _ROWS):
            yield lo, min(lo + _ROWS, len(self.exact))

    def _nearest(self, dtype: type[np.floating]) -> Nearest:
        """Rounding to the grid, near W + ΔW; codes of blocks without a change stay."""
        grid, reach = self.grid, STEPS - 0.5  # rounding what is at the edge may add half a step to it

        def nearest(values: Array, column: int, row: int) -> Array:
            stop = row + len(values)
            scales, zeros = grid.column(column, row, len(values))
            free = self.free[row:stop, column] & (scales != 0)
            scales = np.where(free, scales, 1.0)
            ideal = np.clip(self.exact[row:stop, column] / scales + zeros, grid.low, grid.high)
            codes = np.rint(np.clip(values / scales + zeros, ideal - reach, ideal + reach))
            np.clip(codes, self.low, self.high, out=codes)
            codes = np.where(free, codes, self.codes[row:stop, column])
            kept, _ = grid.column(column, row, len(values))
            result: Array = ((codes - zeros) * kept).astype(dtype)
            return result

        return nearest

    def _codes(self, values: Array) -> Array:
        """Of values that lie on the grid."""
        codes = np.empty(values.shape, np.int32)
        for lo, hi in self._rows():
            found = self.grid.part(lo, hi).ideal(values[lo:hi].astype(np.float64))
            fixed = ~self.free[lo:hi] | np.isnan(found)
            codes[lo:hi] = np.where(fixed, self.codes[lo:hi], np.rint(np.where(fixed, 0.0, found)))
        return codes

    def _noise(self, codes: Array) -> CodeNoise:
        return site_noise(self.grid, codes, self.original, self.exact, self.free)[0]

    def _at_strength(self, codes: Array, fit: Moments) -> None:
        """Rule 3, in place."""
        tolerance = 0.25 * STRENGTH
        noise = self._noise(codes)
        if abs(noise.strength - 1.0) <= tolerance:
            return
        scales, _ = self.grid.expanded()
        ideal, change = self.grid.ideal(self.exact), self.exact - self.original
        free = self.free & ~np.isnan(ideal)
        error = np.where(free, self.grid.decode(codes) - self.exact, 0.0)
        steps = np.where(noise.along * change * scales > 0, -1, 1)
        new = codes + steps
        free &= (new >= self.low) & (new <= self.high) & (np.abs(new - ideal) <= STEPS)
        moved = restore_strength(error, change, fit.own, np.where(free, steps * scales, 0.0), tolerance)
        codes[moved] = new[moved]
