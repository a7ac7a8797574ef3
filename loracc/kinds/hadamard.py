"""LoHa: ΔW is the elementwise product of two low-rank matrices or Tucker kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loracc.adapter import slab_index
from loracc.algebra.products import hadamard, tucker
from loracc.dtypes import Array
from loracc.kinds.base import Scaled

__all__ = ["LoHa", "TuckerLoHa"]


@dataclass(frozen=True, eq=False)
class LoHa(Scaled):
    """ΔW = s·(W₁ₐW₁ᵦ) ⊙ (W₂ₐW₂ᵦ), reshaped. ``w?_a`` are ``[out, r]``, ``w?_b`` ``[r, n]``, n = Π rest."""

    kind: ClassVar[str] = "loha"
    w1_a: Array
    w1_b: Array
    w2_a: Array
    w2_b: Array
    rest: tuple[int, ...]

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.w1_a.shape[0], *self.rest)

    @property
    def rank(self) -> int:
        return int(self.w1_b.shape[0])

    def _rows(self, dtype: np.dtype[np.generic], rows: slice) -> Array:
        left = self.w1_a[rows].astype(dtype), self.w1_b.astype(dtype)
        right = self.w2_a[rows].astype(dtype), self.w2_b.astype(dtype)
        return hadamard(left, right, self.s).reshape(-1, *self.rest)

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        return self._rows(dtype, slice(None))

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        if axis == 0:
            w += self._rows(w.dtype, slice(lo, hi))
        else:
            w += self.materialize(w.dtype)[slab_index(w.ndim, axis, lo, hi)]
        return w


@dataclass(frozen=True, eq=False)
class TuckerLoHa(Scaled):
    """ΔW = s·tucker(T₁, W₁ₐ, W₁ᵦ) ⊙ tucker(T₂, W₂ₐ, W₂ᵦ) on a kernel ``[out, in, *k]``.

    ``t?`` are ``[r, r, *k]`` (PEFT keeps a trailing 1 for Conv1d), ``w?_a`` ``[r, out]``, ``w?_b`` ``[r, in]``.
    """

    kind: ClassVar[str] = "loha"
    t1: Array
    w1_a: Array
    w1_b: Array
    t2: Array
    w2_a: Array
    w2_b: Array
    kernel: tuple[int, ...]

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.w1_a.shape[1], self.w1_b.shape[1], *self.kernel)

    @property
    def rank(self) -> int:
        return int(self.t1.shape[0])

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        product = tucker(self.t1.astype(dtype), self.w1_a.astype(dtype), self.w1_b.astype(dtype))
        product *= tucker(self.t2.astype(dtype), self.w2_a.astype(dtype), self.w2_b.astype(dtype))
        product *= product.dtype.type(self.s)
        return product.reshape(*product.shape[:2], *self.kernel)
