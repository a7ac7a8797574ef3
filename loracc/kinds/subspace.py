"""Kinds that replace a subspace of the weight: DEFT, OSF, KaSA and FRoD."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from loracc.dtypes import Array
from loracc.kinds.base import SlabLocal

__all__ = ["DEFT", "OSF", "FRoD", "KaSA"]


@dataclass(frozen=True, eq=False)
class DEFT(SlabLocal):
    """W' = W + Q·(R − PᵀW): the subspace of Q is taken out and R put in (PEFT ``tuners/deft``).

    ``left`` Q and ``right`` P are float64 ``[out, r]``, ``injected`` R ``[r, in]`` or None (PaRa: only taken out).
    """

    kind: ClassVar[str] = "deft"
    tiles: ClassVar[int] = 1
    left: Array
    right: Array
    injected: Array | None

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.left.shape[0], None if self.injected is None else self.injected.shape[1])

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])

    def transform(self, w: Array, lo: int, hi: int) -> Array:
        inside = -(self.right.T.astype(w.dtype) @ w)
        if self.injected is not None:
            inside += self.injected[:, lo:hi].astype(w.dtype)
        w += self.left.astype(w.dtype) @ inside
        return w


class _Whole(SlabLocal):
    """A change for which no slab of W stands alone."""

    tiles: ClassVar[int] = -1


@dataclass(frozen=True, eq=False)
class OSF(_Whole):
    """W' = W_high + U·diag(S)·V: the smallest singular triplets of W are replaced (Nayak et al. 2025, OSF, equation 2).

    ``u`` ``[out, m]``, ``s`` ``[m]``, ``v`` ``[m, in]``; W_high keeps all singular triplets of W but the m smallest.
    """

    kind: ClassVar[str] = "osf"
    u: Array
    s: Array
    v: Array

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.u.shape[0], self.v.shape[1])

    def transform(self, w: Array, lo: int, hi: int) -> Array:
        return truncated(w, len(self.s)) + (self.u.astype(w.dtype) * self.s.astype(w.dtype)) @ self.v.astype(w.dtype)


def truncated(w: Array, count: int) -> Array:
    """``w`` without its ``count`` smallest singular triplets."""
    u, s, v = np.linalg.svd(w, full_matrices=False)
    keep = len(s) - count
    return (u[:, :keep] * s[:keep]) @ v[:keep]


@dataclass(frozen=True, eq=False)
class KaSA(_Whole):
    """W' = W_high + s·B·diag(d)·A, W_high without W's r smallest singular triplets (Wang et al. 2024, equation 4).

    ``a`` ``[r, in]``, ``b`` ``[out, r]``, ``diagonal`` ``[r]``. A strength acts on the product only, as PEFT's
    ``scale_layer`` does: the triplets stay out.
    """

    kind: ClassVar[str] = "kasa"
    a: Array
    b: Array
    diagonal: Array
    s: float

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.b.shape[0], self.a.shape[1])

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        return self.s

    def scaled(self, weight: float) -> KaSA:
        return replace(self, s=self.s * weight)

    def transform(self, w: Array, lo: int, hi: int) -> Array:
        a, b, diagonal = (x.astype(w.dtype) for x in (self.a, self.b, self.diagonal))
        return truncated(w, self.rank) + (b * (diagonal * w.dtype.type(self.s))) @ a


@dataclass(frozen=True, eq=False)
class FRoD(_Whole):
    """W' = U·(diag(λ) + S)·Vᵀ with U the normalised columns of W·V⁻ᵀ (PEFT ``tuners/frod``).

    ``basis`` V ``[in, in]`` is shared by the layers of a category; ``diagonal`` λ ``[in]``; S is sparse: ``places``
    ``[2, n]`` and ``values`` ``[n]``.
    """

    kind: ClassVar[str] = "frod"
    basis: Array
    diagonal: Array
    places: Array
    values: Array

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (None, self.basis.shape[0])

    def transform(self, w: Array, lo: int, hi: int) -> Array:
        v = self.basis.astype(np.float64)
        columns = np.linalg.solve(v, w.T.astype(np.float64)).T
        norms = np.linalg.norm(columns, axis=0)
        u = np.divide(columns, norms, out=np.zeros_like(columns), where=norms > 1e-12)
        inner = np.diag(self.diagonal.astype(np.float64))
        np.add.at(inner, tuple(self.places.astype(np.int64)), self.values.astype(np.float64))
        return (u @ inner @ v.T).astype(w.dtype)
