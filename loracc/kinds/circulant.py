"""C³A: ΔW in circulant blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loracc.algebra.products import circulant_blocks
from loracc.dtypes import Array
from loracc.kinds.base import Scaled

__all__ = ["C3A"]


@dataclass(frozen=True, eq=False)
class C3A(Scaled):
    """ΔW = s/in·circulant blocks (Chen et al. 2024, section 3.2; the 1/in is PEFT's). ``kernel`` is ``[m, n, b]``."""

    kind: ClassVar[str] = "c3a"
    kernel: Array

    @property
    def shape(self) -> tuple[int | None, ...]:
        m, n, size = self.kernel.shape
        return (m * size, n * size)

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        blocks = circulant_blocks(self.kernel.astype(dtype))
        return blocks * blocks.dtype.type(self.s / blocks.shape[1])
