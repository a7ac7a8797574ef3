"""Changes that multiply the weight element by element: HiRA and PEFT's GLoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from loracc.adapter import Delta
from loracc.dtypes import Array
from loracc.kinds.base import no_strength

__all__ = ["GatedGLoRA", "HiRA"]


@dataclass(frozen=True, eq=False)
class HiRA(Delta):
    """W' = W ⊙ (1 + s·M) with M = ``inner``'s ΔW (Huang et al. 2025, HiRA, equation 4). PEFT has no s: 1."""

    kind: ClassVar[str] = "hira"
    additive: ClassVar[bool] = False
    inner: Delta

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.inner.shape

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def scale(self) -> float:
        return self.inner.scale

    def scaled(self, weight: float) -> HiRA:
        return replace(self, inner=self.inner.scaled(weight))

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        w *= self.inner.apply_slab(np.ones_like(w), axis, lo, hi)
        return w

    def arrays(self) -> dict[str, Array]:
        return self.inner.arrays()


@dataclass(frozen=True, eq=False)
class GatedGLoRA(Delta):
    """W' = W + W ⊙ A + B (Chavan et al. 2023, GLoRA, in PEFT's form), A and B anything that broadcasts to the weight.

    ``gate`` and ``shift`` are deltas that give A and B; a weight of one axis is a bias: b' = b + b ⊙ D + E.
    """

    kind: ClassVar[str] = "glora"
    additive: ClassVar[bool] = False
    gate: Delta
    shift: Delta

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.gate.shape

    def scaled(self, weight: float) -> Delta:
        raise no_strength(self.kind, weight)

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        w *= self.gate.apply_slab(np.ones_like(w), axis, lo, hi)
        return self.shift.apply_slab(w, axis, lo, hi)

    def arrays(self) -> dict[str, Array]:
        gates = {f"gate.{role}": array for role, array in self.gate.arrays().items()}
        return gates | {f"shift.{role}": array for role, array in self.shift.arrays().items()}
