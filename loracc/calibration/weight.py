"""One weight of a stage, its rounding chosen: rules 2 and 3 of :mod:`.calibrate`, for 16-bit weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.algebra.feedback import Nearest, round_with_feedback
from loracc.calibrated import CalibratedTensor, Gain
from loracc.calibration.second_moments import Moments, Sums
from loracc.dtypes import Array, round_to
from loracc.folded import FoldedTensor
from loracc.proof.calibrated import STEPS, Noise, furthest
from loracc.sites import Layout
from loracc.tensors import dims, read_rows

__all__ = ["MARGIN", "CalibrateOptions", "by_layout", "clearly", "judged", "round_weight", "with_feedback"]

#: The promises are held with room to spare: the verifier's sums differ in their last bits.
MARGIN = 0.9


@dataclass(frozen=True)
class CalibrateOptions:
    """How the rounding is chosen.

    Attributes:
        damping, sweeps: Of :func:`loracc.algebra.feedback.round_with_feedback`.
        correction: Which part of the error that the stages before left is taken back.
        ridge: As damping, for what is taken back: few samples say little of seldom directions.
    """

    damping: float = 0.03
    sweeps: int = 2
    correction: float = 1.0
    ridge: float = 0.1


def round_weight(
    fold: FoldedTensor, fit: Sums, held_out: Sums, path: Path, options: CalibrateOptions
) -> CalibratedTensor:
    """The fold with the rounding that is better on held-out inputs, site by site.

    Args:
        fold: A matrix; its sites' inputs are the sums'.
        fit, held_out: The sums to round with, and those to judge with.
        path: A file for the values.
        options: See :class:`CalibrateOptions`.

    Raises:
        NumericsError: A value is not finite.
    """
    length = dims(fold)[0]
    exact = fold.exact_rows(0, length)
    original = read_rows(fold.base, 0, length).astype(exact.dtype)
    rounded = round_to(exact, fold.dtype)
    gains: dict[str, Gain] = {}
    for layout, names in by_layout(fold).items():
        before, matrix, nearest = (layout.view(values) for values in (original, exact, rounded))
        own_fit, own_held_out = (part.of(layout, matrix) for part in (fit, held_out))
        chosen, gain = _choose(before, matrix, nearest, own_fit, own_held_out, fold.dtype, options)
        gains |= dict.fromkeys(names, gain)
        if gain.used:
            nearest[...] = chosen.astype(rounded.dtype)
    return CalibratedTensor(fold, rounded, path, gains)


def by_layout(fold: FoldedTensor) -> dict[Layout, list[str]]:
    """Names of the sites that lie in one place: readers of a shared weight are rounded as one."""
    found: dict[Layout, list[str]] = {}
    for binding in fold.bindings:
        found.setdefault(binding.site.layout, []).append(binding.site.name)
    return found


def _grid(exact: Array, dtype: ir.DataType) -> Nearest:
    """The grid around the exact values: nothing goes further than rule 1 of :mod:`loracc.proof.calibrated` allows."""
    # Rounding what is at the edge may add half a step to it.
    reach = furthest(float(np.abs(exact).max(initial=0.0)), dtype) * (1.0 - 0.5 / STEPS)

    def nearest(values: Array, column: int, row: int) -> Array:
        middle = exact[row : row + len(values), column]
        return round_to(np.clip(values, middle - reach, middle + reach), dtype).astype(values.dtype)

    return nearest


def _choose(
    original: Array,
    exact: Array,
    nearest: Array,
    fit: Moments,
    held_out: Moments,
    dtype: ir.DataType,
    options: CalibrateOptions,
) -> tuple[Array, Gain]:
    """One site's matrix ``[out, in]``, rounded with feedback, and whether that is better than to nearest."""
    grid = _grid(exact, dtype)
    chosen = with_feedback(exact, fit, grid, options)
    gain = judged(held_out, exact, nearest, chosen)
    broken = gain.used and Noise.of(original, exact, chosen, dtype).broken(dtype, margin=MARGIN)
    return chosen, replace(gain, used=False) if broken else gain


def judged(held_out: Moments, exact: Array, nearest: Array, chosen: Array) -> Gain:
    """Whether a rounding is clearly better than to nearest.

    What the layers before left, and no rounding takes back, is in both errors: of nearest's own part, enough must be
    won.
    """
    before, after = held_out.output_error(nearest, exact), held_out.output_error(chosen, exact)
    own = replace(held_out, cross=None, drift=0.0).output_error(nearest, exact)
    used = after < before - (1.0 - clearly(held_out.rows) ** 2) * own
    power = held_out.output_power(exact) or 1.0
    return Gain(math.sqrt(before / power), math.sqrt(after / power), used)


def clearly(rows: int) -> float:
    """What part of nearest's error is less for sure: a gain on a few held-out rows may be chance.

    >>> [round(clearly(rows), 3) for rows in (4, 16, 100, 10_000)]
    [0.75, 0.875, 0.95, 0.95]
    """
    return min(0.95, 1.0 - 0.5 / math.sqrt(max(rows, 1)))


def with_feedback(exact: Array, moments: Moments, grid: Nearest, options: CalibrateOptions) -> Array:
    """A site's matrix ``[out, in]`` on its grid: what the stages before left is taken back, then feedback."""
    return round_with_feedback(
        _corrected(exact, moments, options), moments.own, grid, damping=options.damping, sweeps=options.sweeps
    )


def _corrected(exact: Array, moments: Moments, options: CalibrateOptions) -> Array:
    """W + c·(C⁻¹·K)ᵀ: what takes δ back best, in the directions that the inputs have."""
    if not options.correction or moments.cross is None or not moments.cross.any():
        return exact
    system = moments.own.copy()
    system[np.diag_indices(len(system))] += max(options.ridge, 1e-6) * float(np.diag(system).mean())
    shift = options.correction * np.linalg.solve(system, moments.cross)
    return exact + shift.T.astype(exact.dtype)
