"""Weight decomposition on top of any additive kind, as LyCORIS does it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from loracc.adapter import Delta
from loracc.deltas import Decomposition
from loracc.dtypes import Array

__all__ = ["Decomposed"]


@dataclass(frozen=True, eq=False)
class Decomposed(Decomposition):
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
    inner: Delta
    magnitude: Array
    axis: int
    eps: float
    s: float = 1.0

    def scaled(self, weight: float) -> Decomposed:
        return replace(self, s=self.s * weight)

    def converted(self, dtype: np.dtype[np.generic]) -> Decomposed:
        return replace(self, inner=self.inner.converted(dtype))

    def factor(self, magnitude: Array, squares: Array) -> Array:
        return self.s * (magnitude / (np.sqrt(squares) + self.eps) - 1.0) + 1.0

    def arrays(self) -> dict[str, Array]:
        return {**self.inner.arrays(), "dora_scale": self.magnitude}
