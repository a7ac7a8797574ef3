"""What calibrated rounding promises of a quantized weight. No code need be the nearest one; but

1. in a block that a delta changes, no code is further than :data:`STEPS` steps from where W + ΔW lies among the codes;
2. such a block has the scale and zero point that it has when it is rounded to nearest;
3. the errors together are at most :data:`NOISE` times those of rounding to nearest on the same grid, or, where that is
   more, of rounding just any values to it (a twelfth of a step squared each);
4. the delta is there at strength 1: of its direction the errors have at most :data:`STRENGTH`, ⟨E, ΔW⟩/‖ΔW‖²;
5. a block that no delta changes has the base's bytes.

Whoever chooses (:mod:`loracc.calibration.codes`) gives up what would break them. A site whose codes are those of
rounding to nearest need not hold rules 3 and 4: its grid may be too coarse for the delta, and that is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loracc.dtypes import Array
from loracc.encodings.site_grid import SiteGrid

__all__ = ["NOISE", "STEPS", "STRENGTH", "CodeNoise", "site_noise"]

STEPS, NOISE, STRENGTH = 2.0, 3.0, 0.01
#: Of float64 arithmetic on a position among the codes.
_SLACK = 1e-9
#: Rows that are looked at together.
_ROWS = 512


@dataclass(frozen=True)
class CodeNoise:
    """The errors E = W' − (W + ΔW) of a site, or of some of its rows: what the rules ask.

    Attributes:
        furthest: The largest distance of a code from where W + ΔW lies, in steps.
        lost, nearest: ‖E‖² where a delta changes a block, and the same with the nearest codes.
        anything: What rounding any values to the grid costs there.
        change, along: ‖ΔW‖² and ⟨E, ΔW⟩.
    """

    furthest: float = 0.0
    lost: float = 0.0
    nearest: float = 0.0
    anything: float = 0.0
    change: float = 0.0
    along: float = 0.0

    @classmethod
    def of(cls, grid: SiteGrid, codes: Array, original: Array, exact: Array, free: Array) -> CodeNoise:
        """Of some rows, all ``[rows, in]``; ``free`` tells the elements of blocks that change."""
        scales, _ = grid.expanded()
        ideal, change = grid.ideal(exact), exact - original
        free = free & ~np.isnan(ideal)
        off = np.where(free, np.abs(codes - ideal), 0.0)
        error = np.where(free, grid.decode(codes) - exact, 0.0)
        best = np.where(free, grid.decode(np.rint(ideal)) - exact, 0.0)
        return cls(
            float(off.max(initial=0.0)),
            float(np.vdot(error, error)),
            float(np.vdot(best, best)),
            float(np.square(np.where(free, scales, 0.0)).sum()) / 12.0,
            float(np.vdot(change, change)),
            float(np.vdot(error, change)),
        )

    def __add__(self, other: CodeNoise) -> CodeNoise:
        return CodeNoise(
            max(self.furthest, other.furthest),
            self.lost + other.lost,
            self.nearest + other.nearest,
            self.anything + other.anything,
            self.change + other.change,
            self.along + other.along,
        )

    @property
    def strength(self) -> float:
        """At what part of its strength the delta is there."""
        return 1.0 + self.along / self.change if self.change else 1.0

    def broken(self, *, margin: float = 1.0) -> list[str]:
        """The rules that do not hold, in words; ``margin`` below 1 asks for more than rules 3 and 4 do."""
        found = []
        if not self.furthest <= STEPS * (1.0 + _SLACK):
            found.append(f"a code is {self.furthest:.3g} steps from W + ΔW ({STEPS:g} may be)")
        usual = max(self.nearest, self.anything)
        if not math.sqrt(self.lost) <= margin * NOISE * math.sqrt(usual):
            ratio = math.sqrt(self.lost / usual) if usual else math.inf
            found.append(f"its rounding errors are {ratio:.3g} times those that its grid costs ({NOISE:g} may be)")
        if not abs(self.strength - 1.0) <= margin * STRENGTH:
            found.append(f"the delta is there at {self.strength:.4g} of its strength")
        return found


def site_noise(grid: SiteGrid, codes: Array, original: Array, exact: Array, free: Array) -> tuple[CodeNoise, bool]:
    """Of all rows of a site; and whether every code is the nearest one."""
    total, nearest = CodeNoise(), True
    for lo in range(0, len(exact), _ROWS):
        rows = slice(lo, lo + _ROWS)
        part = grid.part(lo, lo + _ROWS)
        total += CodeNoise.of(part, codes[rows], original[rows], exact[rows], free[rows])
        ideal = part.ideal(exact[rows])
        judged = free[rows] & ~np.isnan(ideal)
        nearest &= bool((np.abs(codes[rows] - ideal) <= 0.5 + _SLACK * (1.0 + np.abs(ideal)))[judged].all())
    return total, nearest
