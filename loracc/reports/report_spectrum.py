"""A delta's singular values from its factors: ΔW = s·B·A is never formed.

With thin QR decompositions B = Q₁R₁ and Aᵀ = Q₂R₂, the singular values of s·B·A are those of the r × r matrix
s·R₁R₂ᵀ. Other kinds are decomposed whole while they are small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loracc.adapter import Delta
from loracc.blas import one_blas_thread
from loracc.deltas import DoRA, LowRank, StackedLowRank
from loracc.dtypes import Array

__all__ = ["Spectrum", "effective_rank", "spectrum_of", "stable_rank"]

#: A ΔW without factors is decomposed up to this many elements.
_WHOLE_ELEMENTS = 1 << 19
#: Singular values kept in a report.
_KEPT = 256


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one delta.

    Attributes:
        values: Descending, at most 256; empty where they were not computed.
        effective_rank: exp of the entropy of σ/Σσ (Roy & Vetterli 2007): how many directions it is spread over.
        stable_rank: ‖ΔW‖_F² / ‖ΔW‖₂².
        reason: Why there are none, or of what they are.
    """

    values: tuple[float, ...] = ()
    effective_rank: float | None = None
    stable_rank: float | None = None
    reason: str = ""


def spectrum_of(delta: Delta) -> Spectrum:
    """The spectrum of ΔW as a matrix ``[out, everything else]``; of stacked experts the strongest one's."""
    if isinstance(delta, DoRA):
        return _of_values(_low_rank_values(delta.inner.a, delta.inner.b, delta.inner.s), "of B·A, before DoRA's norms")
    if isinstance(delta, LowRank):
        return _of_values(_low_rank_values(delta.a, delta.b, delta.s))
    if isinstance(delta, StackedLowRank):
        each = [_low_rank_values(a, b, delta.s) for a, b in zip(delta.a, delta.b, strict=True)]
        return _of_values(max(each, key=lambda values: float(values @ values)), "of the strongest expert")
    if not delta.additive:
        return Spectrum(reason=f"{delta.kind}: ΔW depends on W")
    shape = delta.shape
    if len(shape) < 2 or None in shape:
        return Spectrum(reason=f"{delta.kind}: no matrix")
    if math.prod(size or 0 for size in shape) > _WHOLE_ELEMENTS:
        return Spectrum(reason=f"{delta.kind}: too large to decompose without factors")
    with one_blas_thread():
        whole = delta.materialize(np.dtype(np.float64))
        return _of_values(np.linalg.svd(whole.reshape(len(whole), -1), compute_uv=False))


def _low_rank_values(a: Array, b: Array, s: float) -> Array:
    """σ(s·B·A) for ``a`` ``[r, *rest]`` and ``b`` ``[out, r]``, float64."""
    with one_blas_thread():
        right = np.linalg.qr(a.reshape(len(a), -1).T.astype(np.float64)).R
        left = np.linalg.qr(b.astype(np.float64)).R
        return np.linalg.svd(s * (left @ right.T), compute_uv=False)


def _of_values(values: Array, reason: str = "") -> Spectrum:
    if not values.size or not values[0] > 0:
        return Spectrum(reason="ΔW is zero")
    kept = tuple(float(f"{value:.6g}") for value in values[:_KEPT])
    return Spectrum(kept, effective_rank(values), stable_rank(values), reason)


def effective_rank(values: Array) -> float:
    """exp(−Σ p·log p) with p = σ/Σσ.

    >>> round(effective_rank(np.array([1.0, 1.0, 1.0, 0.0])), 12)
    3.0
    """
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def stable_rank(values: Array) -> float:
    """Σσ² / σ₁².

    >>> stable_rank(np.array([2.0, 2.0, 0.0]))
    2.0
    """
    return float((values @ values) / values.max() ** 2)
