"""LyCORIS' orthogonal kinds, which rotate a layer's outputs: Diag-OFT and its butterfly form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from loracc.algebra.rotations import cayley
from loracc.dtypes import Array
from loracc.kinds.base import SlabLocal

__all__ = ["OutputButterfly", "OutputRotation"]


def rotations(blocks: Array, constraint: float) -> Array:
    """R = (I + Q)(I − Q)⁻¹ with Q = b − bᵀ, all of Q scaled down to ‖Q‖_F ≤ ``constraint`` where that is positive.

    ``blocks`` is ``[…, n, b, b]``; LyCORIS ``functional/diag_oft.get_r``, with its 10⁻⁸ in the norm.
    """
    b = blocks.astype(np.float64)
    q = b - b.swapaxes(-1, -2)
    norm = float(np.sqrt(np.sum(q * q))) + 1e-8
    if 0 < constraint < norm:
        q = q * (constraint / norm)
    return cayley(-q)


@dataclass(frozen=True, eq=False)
class OutputRotation(SlabLocal):
    """W' = ρ ⊙ blockdiag(I + s(R − I))ᵀ·W (Qiu et al. 2023, on outputs, as LyCORIS "diag-oft").

    Attributes:
        blocks: b, ``[n, b, b]``.
        rescale: ρ, ``[out]``, or None.
        constraint: The bound on ‖Q‖, 0 for none.
        target: The weight's shape.
        s: LyCORIS' multiplier: it interpolates between no rotation and R; the rescaling stays.
    """

    kind: ClassVar[str] = "oft"
    tiles: ClassVar[int] = 1
    blocks: Array
    rescale: Array | None
    constraint: float
    target: tuple[int, ...]
    s: float = 1.0

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.target

    @property
    def scale(self) -> float:
        return self.s

    def scaled(self, weight: float) -> OutputRotation:
        return replace(self, s=self.s * weight)

    @cached_property
    def _matrices(self) -> Array:
        """I + s(R − I), float64."""
        r = rotations(self.blocks, self.constraint)
        eye = np.eye(r.shape[-1])
        return eye + self.s * (r - eye)

    def transform(self, w: Array, lo: int, hi: int) -> Array:
        blocks, size, _ = self.blocks.shape
        turned = np.matmul(self._matrices.swapaxes(1, 2).astype(w.dtype), w.reshape(blocks, size, -1))
        return _rescaled(turned.reshape(w.shape), self.rescale)

    def arrays(self) -> dict[str, Array]:
        return {"oft_blocks": self.blocks} | ({} if self.rescale is None else {"rescale": self.rescale})


class OutputButterfly(OutputRotation):
    """W' = ρ ⊙ Bₘ…B₁·W with butterfly factors of I + s(R − I) (Liu et al. 2024, on outputs, as LyCORIS "boft").

    ``blocks`` is ``[m, n, b, b]``. Factor i pairs rows 2ⁱ·b/2 apart.
    """

    kind: ClassVar[str] = "boft"

    def transform(self, w: Array, lo: int, hi: int) -> Array:
        factors, blocks, size, _ = self.blocks.shape
        flat = w.reshape(w.shape[0], -1)
        for i in range(factors):
            order = _pairing(w.shape[0], (size // 2) << i)
            turned = np.matmul(self._matrices[i].astype(w.dtype), flat[order].reshape(blocks, size, -1))
            flat = np.empty_like(flat)
            flat[order] = turned.reshape(flat.shape)
        return _rescaled(flat.reshape(w.shape), self.rescale)


def _pairing(length: int, distance: int) -> Array:
    """The row order in which x and x + distance stand side by side: a transposed ``[…, 2, distance]`` grid."""
    return np.arange(length).reshape(-1, 2, distance).transpose(0, 2, 1).ravel()


def _rescaled(w: Array, rescale: Array | None) -> Array:
    if rescale is None:
        return w
    return w * rescale.astype(w.dtype).reshape(-1, *[1] * (w.ndim - 1))
