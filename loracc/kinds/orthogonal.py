"""Orthogonal kinds: the weight's inputs are rotated by block-diagonal, butterfly or Householder matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from loracc.adapter import Delta, ReadSlab
from loracc.algebra.rotations import butterfly_permutation, cayley, rotate_blocks
from loracc.dtypes import Array
from loracc.kinds.base import SlabLocal, no_strength

__all__ = ["BOFT", "HRA", "BlockRotation"]


@dataclass(frozen=True, eq=False)
class BlockRotation(SlabLocal):
    """W' = W·blockdiag(M₁ … Mₙ), the weight flattened behind its first axis: OFT (Qiu et al. 2023, equation 4).

    PEFT rotates a layer's input, x·R, so M = Rᵀ there, and an embedding's output, so M = R.

    Attributes:
        blocks: M, float64 ``[n, b, b]``, or ``[1, b, b]`` shared by every block.
        target: The weight's shape.
        parameters: The trained tensor the blocks were made of.
    """

    kind: ClassVar[str] = "oft"
    blocks: Array
    target: tuple[int | None, ...]
    parameters: Array

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.target

    def transform(self, w: Array, lo: int, hi: int) -> Array:
        return rotate_blocks(w.reshape(w.shape[0], -1), self.blocks.astype(w.dtype)).reshape(w.shape)

    def arrays(self) -> dict[str, Array]:
        return {"R": self.parameters}


@dataclass(frozen=True, eq=False)
class BOFT(SlabLocal):
    """W' = s ⊙ W·B₁ᵀB₂ᵀ…Bₘᵀ with butterfly factors Bᵢ = Pᵢ·blockdiag(cayley(Qᵢ))·Pᵢᵀ (Liu et al. 2024, equation 4).

    ``r`` is ``[m, n, b, b]``; Q = (R − Rᵀ)/2. ``s`` is ``[out]``.
    """

    kind: ClassVar[str] = "boft"
    r: Array
    s: Array
    rest: tuple[int, ...]

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.s.shape[0], *self.rest)

    @cached_property
    def _rotations(self) -> Array:
        r = self.r.astype(np.float64)
        return cayley((0.5 * (r - r.swapaxes(2, 3))).reshape(-1, *r.shape[2:])).reshape(r.shape)

    def transform(self, w: Array, lo: int, hi: int) -> Array:
        factors, blocks, size, _ = self.r.shape
        flat = w.reshape(w.shape[0], -1)
        for i in range(factors):
            transposed = self._rotations[i].swapaxes(1, 2).astype(w.dtype)
            if factors == 1:
                flat = rotate_blocks(flat, transposed)
                continue
            perm = butterfly_permutation(blocks * size, size << i, size // 2)
            flat = rotate_blocks(flat[:, np.argsort(perm)], transposed)[:, perm]
        return (flat * self.s[lo:hi, None].astype(w.dtype)).reshape(w.shape)

    def arrays(self) -> dict[str, Array]:
        return {"R": self.r, "s": self.s}


@dataclass(frozen=True, eq=False)
class HRA(Delta):
    """W' = W·(I − U·T·Uᵀ): a chain of Householder reflections of the input (Yuan et al. 2024, HRA, equation 5).

    The first pass over a weight tiled across its rows collects W·U, which is all the rest needs.

    Attributes:
        unit: U with unit columns, float64 ``[n, r]``, n the weight's length behind its first axis.
        t: T, ``[r, r]``.
        rest: The weight's shape behind its first axis.
        u: The trained tensor, ``[n, r]``.
    """

    kind: ClassVar[str] = "hra"
    additive: ClassVar[bool] = False
    unit: Array
    t: Array
    rest: tuple[int, ...]
    u: Array

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (None, *self.rest)

    @property
    def rank(self) -> int:
        return int(self.u.shape[1])

    def scaled(self, weight: float) -> HRA:
        raise no_strength(self.kind, weight)

    def prepare(self, read: ReadSlab, axis: int, length: int, step: int) -> Array | None:
        """W·U, summed over the slabs; nothing for a weight tiled by rows."""
        if axis == 0:
            return None
        total: Array | None = None
        for lo in range(0, length, step):
            slab = read(lo, min(lo + step, length))
            part = slab.reshape(slab.shape[0], -1) @ self._part(axis, lo, lo + slab.shape[axis]).astype(slab.dtype)
            total = part if total is None else total + part
        return total

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        unit = self._part(axis, lo, hi).astype(w.dtype)
        projected = w.reshape(w.shape[0], -1) @ unit if axis == 0 else statistic
        if projected is None:
            raise TypeError("HRA on a weight tiled by columns needs what prepare() returns")
        w -= (projected @ self.t.astype(w.dtype) @ unit.T).reshape(w.shape)
        return w

    def _part(self, axis: int, lo: int, hi: int) -> Array:
        """The rows of U that a slab meets, flattened as the slab is."""
        if axis == 0:
            return self.unit
        grid = self.unit.reshape(*self.rest, -1)
        return np.take(grid, range(lo, hi), axis=axis - 1).reshape(-1, self.unit.shape[1])

    def arrays(self) -> dict[str, Array]:
        return {"u": self.u}
