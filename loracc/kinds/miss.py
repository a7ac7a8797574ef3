"""MiSS: one small matrix repeated over the weight, and its variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loracc.dtypes import Array
from loracc.kinds.base import Scaled, SlabLocal

__all__ = ["MiSS", "MiSSBat"]


@dataclass(frozen=True, eq=False)
class MiSS(Scaled):
    """ΔW[o, i] = s·D[i mod r, o mod n]: the shard ``d`` ``[r, n]`` repeated over inputs (Kang & Yin 2025, section 3).

    n is the number of outputs, or ``mini_r`` in the "mini" variant, whose shard also repeats over outputs. PEFT has no
    strength for it; ΔW is linear in D, so that s is what D is multiplied by.
    """

    kind: ClassVar[str] = "miss"
    d: Array
    target: tuple[int, int]

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.target

    @property
    def rank(self) -> int:
        return int(self.d.shape[0])

    def _part(self, dtype: np.dtype[np.generic], rows: range, columns: range) -> Array:
        r, n = self.d.shape
        picked = self.d.T.astype(dtype)[np.ix_(np.asarray(rows) % n, np.asarray(columns) % r)]
        return picked * picked.dtype.type(self.s)

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        return self._part(dtype, range(self.target[0]), range(self.target[1]))

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        rows = range(lo, hi) if axis == 0 else range(self.target[0])
        columns = range(lo, hi) if axis == 1 else range(self.target[1])
        w += self._part(w.dtype, rows, columns)
        return w


@dataclass(frozen=True, eq=False)
class MiSSBat(SlabLocal):
    """W'[block i, block j] = W[i, j]·(I + Dᵢ) + Dᵢ, in blocks of r×r (Kang 2024, Bat). ``d`` is ``[out/r, r, r]``."""

    kind: ClassVar[str] = "miss"
    d: Array
    columns: int

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.d.shape[0] * self.d.shape[1], self.columns)

    @property
    def rank(self) -> int:
        return int(self.d.shape[1])

    def transform(self, w: Array, lo: int, hi: int) -> Array:
        r = self.d.shape[1]
        block = np.arange(lo, hi) // r
        d = self.d.astype(w.dtype)
        split = w.reshape(hi - lo, -1, r)  # [rows, in/r, r]
        result = np.empty_like(split)
        for i in np.unique(block):
            rows = block == i
            result[rows] = split[rows] @ d[i] + split[rows]
        result += d.reshape(-1, r)[lo:hi, None, :]
        return result.reshape(w.shape)
