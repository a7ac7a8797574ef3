"""GLoRA: a low-rank change of the weight and a low-rank product with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from loracc.dtypes import Array
from loracc.kinds.base import SlabLocal

__all__ = ["GLoRA"]


@dataclass(frozen=True, eq=False)
class GLoRA(SlabLocal):
    """W' = W + s·(W·A₁A₂ + B₁B₂) (Chavan et al. 2023, GLoRA, in LyCORIS' form); on a kernel A acts on input channels.

    ``a1`` ``[in, r]``, ``a2`` ``[r, in]``, ``b1`` ``[out, r]``, ``b2`` ``[r, in, *k]``.
    """

    kind: ClassVar[str] = "glora"
    a1: Array
    a2: Array
    b1: Array
    b2: Array
    s: float

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.b1.shape[0], *self.b2.shape[1:])

    @property
    def rank(self) -> int:
        return int(self.a1.shape[1])

    @property
    def scale(self) -> float:
        return self.s

    def scaled(self, weight: float) -> GLoRA:
        return replace(self, s=self.s * weight)

    def transform(self, w: Array, lo: int, hi: int) -> Array:
        a1, a2, b1, b2 = (x.astype(w.dtype) for x in (self.a1, self.a2, self.b1[lo:hi], self.b2))
        inputs = w.reshape(w.shape[0], w.shape[1], -1).swapaxes(1, 2)  # [rows, Πk, in]
        product = (inputs @ a1 @ a2).swapaxes(1, 2).reshape(w.shape)
        product += (b1 @ b2.reshape(b2.shape[0], -1)).reshape(w.shape)
        w += w.dtype.type(self.s) * product
        return w
