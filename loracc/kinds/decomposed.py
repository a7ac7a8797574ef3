"""Weight decomposition on top of any additive kind, as LyCORIS does it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from loracc.adapter import Delta, ReadSlab
from loracc.algebra import dora_norm_terms
from loracc.dtypes import Array

__all__ = ["Decomposed"]


@dataclass(frozen=True, eq=False)
class Decomposed(Delta):
    """W' = V ⊙ (s·(m/(‖V‖ + ε) − 1) + 1) with V = W + ΔW (LyCORIS ``weight_decompose``); ‖·‖ over axes not ``axis``.

    Unlike PEFT's DoRA there is an ε, either axis can be the kept one, and a strength s acts on the factor, not on ΔW.

    Attributes:
        inner: Gives ΔW; an additive kind.
        magnitude: m, ``[n]`` with n the weight's length on ``axis``.
        axis: 0 (``wd_on_out``) or 1.
        eps: The machine epsilon of the dtype that LyCORIS computed in.
        s: Strength.
    """

    kind: ClassVar[str] = "dora"
    additive: ClassVar[bool] = False
    inner: Delta
    magnitude: Array
    axis: int
    eps: float
    s: float = 1.0

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.inner.shape

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def scale(self) -> float:
        return self.inner.scale

    def scaled(self, weight: float) -> Decomposed:
        return replace(self, s=self.s * weight)

    def converted(self, dtype: np.dtype[np.generic]) -> Decomposed:
        return replace(self, inner=self.inner.converted(dtype))

    def prepare(self, read: ReadSlab, axis: int, length: int, step: int) -> Array | None:
        """‖V‖² per kept index; None where a slab holds whole vectors to be normed."""
        if axis == self.axis:
            return None
        total = np.zeros(self.magnitude.shape[0], np.float64)
        for lo in range(0, length, step):
            hi = min(lo + step, length)
            total += dora_norm_terms(self.inner.apply_slab(read(lo, hi), axis, lo, hi), self.axis)
        return total

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        v = self.inner.apply_slab(w, axis, lo, hi)
        magnitude = self.magnitude
        if axis == self.axis:
            magnitude, statistic = magnitude[lo:hi], dora_norm_terms(v, self.axis)
        if statistic is None:
            raise TypeError("a decomposed weight needs the norms that prepare() returns")
        factor = self.s * (magnitude.astype(np.float64) / (np.sqrt(statistic) + self.eps) - 1.0) + 1.0
        v *= factor.astype(v.dtype).reshape([-1 if i == self.axis else 1 for i in range(v.ndim)])
        return v

    def arrays(self) -> dict[str, Array]:
        return {**self.inner.arrays(), "dora_scale": self.magnitude}
