"""LoCon with a Tucker core: a convolution's low-rank change with the kernel in the middle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loracc.algebra.products import tucker
from loracc.dtypes import Array
from loracc.kinds.base import Scaled

__all__ = ["TuckerLoRA"]


@dataclass(frozen=True, eq=False)
class TuckerLoRA(Scaled):
    """ΔW = s·Σᵢⱼ up[:, i]·mid[i, j]·down[j, :] (LyCORIS LoCon ``use_tucker``).

    ``up`` ``[out, r]``, ``mid`` ``[r, r, *k]``, ``down`` ``[r, in]``.
    """

    kind: ClassVar[str] = "locon"
    up: Array
    mid: Array
    down: Array

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.up.shape[0], self.down.shape[1], *self.mid.shape[2:])

    @property
    def rank(self) -> int:
        return int(self.mid.shape[0])

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        up, mid, down = (x.astype(dtype) for x in (self.up, self.mid, self.down))
        return tucker(mid, up.T * up.dtype.type(self.s), down)
