"""What calibrated rounding promises of a weight, and the check of it. No element need be the nearest one; but

1. no element is further from W + ΔW than :data:`STEPS` steps of the grid at the weight's largest element;
2. the rounding errors together are at most :data:`NOISE` times those of rounding to nearest (in ‖E‖);
3. the delta is there at strength 1: what the errors E have of its direction, ⟨E, ΔW⟩/‖ΔW‖², is at most
   :data:`DEVIATIONS` standard deviations of what errors of their size have by chance, ‖E‖/(‖ΔW‖·√elements).

Whoever rounds gives up what would break them (:mod:`loracc.calibration`), and the verifier tests every weight for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array, round_to, unit_roundoff
from loracc.proof.oracle import half_ulp

__all__ = ["DEVIATIONS", "NOISE", "STEPS", "Noise", "furthest", "relative_tolerance"]

STEPS, NOISE, DEVIATIONS = 2.0, 3.0, 5.0
#: Of the largest element: what arithmetic in float32 before the rounding may add (DESIGN.md 4).
_SLACK = 2.0**-20


def furthest(largest: float, dtype: ir.DataType) -> float:
    """Rule 1: how far an element may be from W + ΔW, whose largest element is ``largest``."""
    return 2.0 * STEPS * float(half_ulp(np.array([largest]), dtype)[0])


def relative_tolerance(dtype: ir.DataType) -> float:
    """Rule 1, relative to the largest element, at most."""
    return 2.0 * STEPS * unit_roundoff(dtype) + _SLACK


@dataclass(frozen=True)
class Noise:
    """The rounding errors E = W' − (W + ΔW) of a site, or of a part of it: what the rules ask.

    Attributes:
        elements: How many.
        error, largest: max|E| and max|W + ΔW|.
        lost, nearest: ‖E‖² and the same with every element rounded to nearest.
        change, along: ‖ΔW‖² and ⟨E, ΔW⟩.
    """

    elements: int = 0
    error: float = 0.0
    largest: float = 0.0
    lost: float = 0.0
    nearest: float = 0.0
    change: float = 0.0
    along: float = 0.0

    @classmethod
    def of(cls, original: Array, exact: Array, rounded: Array, dtype: ir.DataType) -> Noise:
        """Of W, W + ΔW and W', all of one shape, not empty."""
        wide, change = exact.astype(np.float64), exact.astype(np.float64) - original
        lost, nearest = rounded.astype(np.float64) - wide, round_to(exact, dtype).astype(np.float64) - wide
        return cls(
            exact.size,
            float(np.abs(lost).max()),
            float(np.abs(wide).max()),
            float(np.vdot(lost, lost)),
            float(np.vdot(nearest, nearest)),
            float(np.vdot(change, change)),
            float(np.vdot(lost, change)),
        )

    def __add__(self, other: Noise) -> Noise:
        return Noise(
            self.elements + other.elements,
            max(self.error, other.error),
            max(self.largest, other.largest),
            self.lost + other.lost,
            self.nearest + other.nearest,
            self.change + other.change,
            self.along + other.along,
        )

    def excess(self, dtype: ir.DataType) -> float:
        """Largest error over what rule 1 allows."""
        return self.error / (furthest(self.largest, dtype) + _SLACK * self.largest)

    def broken(self, dtype: ir.DataType, *, margin: float = 1.0) -> list[str]:
        """The rules that do not hold, in words; ``margin`` below 1 asks for more than the rules do."""
        found = []
        if not (excess := self.excess(dtype)) <= 1.0:
            found.append(f"an element is {excess:.3g} times further from W + ΔW than calibrated rounding may put it")
        slack = _SLACK * self.largest * math.sqrt(self.elements)
        if not math.sqrt(self.lost) <= margin * NOISE * math.sqrt(self.nearest) + slack:
            ratio = math.sqrt(self.lost / self.nearest) if self.nearest else math.inf
            found.append(f"its rounding errors are {ratio:.3g} times those of rounding to nearest ({NOISE:g} may be)")
        if self.change:
            off = self.along / self.change
            chance = math.sqrt(self.lost / self.change / self.elements)
            if not abs(off) <= margin * DEVIATIONS * chance + _SLACK:
                found.append(f"the delta is there at {1.0 + off:.4g} of its strength")
        return found
