"""Kinds that train vectors: IA3 scales a weight's outputs or inputs, VeRA scales two shared random matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loracc.adapter import Delta
from loracc.deltas import LowRank
from loracc.dtypes import Array
from loracc.kinds.base import no_strength

__all__ = ["IA3", "VeRA"]


@dataclass(frozen=True, eq=False)
class IA3(Delta):
    """W' = W ⊙ l: a factor per output or per input (Liu et al. 2022, section 3.3); LyCORIS' is l = 1 + s·w.

    Attributes:
        factor: l with the weight's number of axes, of length 1 on the axes that it does not tell apart.
        relative: A strength interpolates between 1 and l (LyCORIS), rather than being refused (PEFT).
    """

    kind: ClassVar[str] = "ia3"
    additive: ClassVar[bool] = False
    factor: Array
    relative: bool = False

    @property
    def shape(self) -> tuple[int | None, ...]:
        return tuple(None if n == 1 else n for n in self.factor.shape)

    def scaled(self, weight: float) -> IA3:
        if not self.relative:
            raise no_strength(self.kind, weight)
        return IA3(1.0 + weight * (self.factor.astype(np.float64) - 1.0), True)

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        factor = self.factor
        if w.ndim and factor.shape[axis] != 1:
            factor = np.take(factor, range(lo, hi), axis=axis)
        w *= factor.astype(w.dtype, copy=False)
        return w


class VeRA(LowRank):
    """ΔW = (λ_b ⊙ B)(λ_d ⊙ A) with A and B shared by all layers, cut to size (Kopiczko et al. 2024, equation 2)."""

    kind: ClassVar[str] = "vera"
