"""RoAd: pairs of outputs are rotated and scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loracc.dtypes import Array
from loracc.kinds.base import SlabLocal

__all__ = ["RoAd"]


@dataclass(frozen=True, eq=False)
class RoAd(SlabLocal):
    """y' = c₁ ⊙ y + c₂ ⊙ rot(y), and so on W's rows and on the bias (Liao & Monz 2024, RoAd, equation 4).

    rot turns each group's halves: (y₁, y₂) to (−y₂, y₁). ``first`` and ``second`` are c₁, c₂ of ``[out]``; the
    group has ``size`` outputs.
    """

    kind: ClassVar[str] = "road"
    tiles: ClassVar[int] = 1
    first: Array
    second: Array
    size: int
    ndim: int

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.first.shape[0], *[None] * (self.ndim - 1))

    def transform(self, w: Array, lo: int, hi: int) -> Array:
        halves = w.reshape(-1, 2, self.size // 2, *w.shape[1:])
        turned = np.stack([-halves[:, 1], halves[:, 0]], axis=1).reshape(w.shape)
        column = (-1, *[1] * (w.ndim - 1))
        return w * self.first.astype(w.dtype).reshape(column) + turned * self.second.astype(w.dtype).reshape(column)
