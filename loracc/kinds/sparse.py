"""Sparse changes: single elements of the weight (SHiRA, SuperTuning), or of its spectrum (FourierFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loracc.adapter import Delta
from loracc.deltas import Addition
from loracc.dtypes import Array
from loracc.kinds.base import Scaled

__all__ = ["FourierFT", "SHiRA", "SuperTuning", "WaveFT"]


@dataclass(frozen=True, eq=False)
class SHiRA(Scaled):
    """ΔW[rows, columns] = s·values, repeated places added up (Bhardwaj et al. 2024, SHiRA). Three arrays of ``[n]``."""

    kind: ClassVar[str] = "shira"
    rows: Array
    columns: Array
    values: Array
    target: tuple[int, ...]

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.target

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        return self.apply_slab(np.zeros(self.target, dtype), 0, 0, self.target[0])

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        place = [self.rows, self.columns]
        inside = (place[axis] >= lo) & (place[axis] < hi)
        index = [positions[inside] for positions in place]
        index[axis] = index[axis] - lo
        np.add.at(w, tuple(index), self.values[inside].astype(w.dtype) * w.dtype.type(self.s))
        return w


class SuperTuning(SHiRA):
    """The same, on the weight's largest or smallest elements (PEFT ``tuners/supertuning`` without LoRA)."""

    kind: ClassVar[str] = "supertuning"


class WaveFT(SHiRA):
    """The same, on seeded random places: WaveFT without its wavelet transform (``use_idwt=False``)."""

    kind: ClassVar[str] = "waveft"


class FourierFT(SHiRA):
    """ΔW = s·Re(F⁻¹(S)) with S sparse, its places distinct (Gao et al. 2024, FourierFT, equation 4)."""

    kind: ClassVar[str] = "fourierft"

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        spectrum = np.zeros(self.target, np.float64)
        spectrum[self.rows, self.columns] = self.values
        return (np.fft.ifft2(spectrum).real * self.s).astype(dtype)

    def converted(self, dtype: np.dtype[np.generic]) -> Delta:
        return Addition(self.materialize(dtype))

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        whole = self.materialize(w.dtype)
        w += whole[lo:hi] if axis == 0 else whole[:, lo:hi]
        return w
