"""The best low-rank approximation of a matrix, without its whole decomposition where the matrix is large.

Small matrices are decomposed exactly. For large ones the range is found by subspace iteration from seeded random
vectors (Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1), repeated until the energy it captures stops growing.
"""

from __future__ import annotations

import numpy as np

from loracc.dtypes import Array

__all__ = ["truncated_svd"]

#: Matrices whose shorter side is at most this are decomposed exactly.
_EXACT = 512
#: Directions beyond the wanted rank: they make the iteration converge faster.
_SPARE = 16
_ROUNDS = 12
#: Growth of the captured energy, relative to the whole, that is no growth.
_SETTLED = 1e-12


def truncated_svd(matrix: Array, rank: int | None, energy: float | None) -> tuple[Array, Array, Array]:
    """``(u, s, v)`` with ``u`` ``[m, k]``, ``s`` ``[k]`` descending, ``v`` ``[k, n]``: the k largest singular triplets.

    Args:
        matrix: ``[m, n]``, float32 or float64, of finite values that are not all zero.
        rank: k, or the shorter side where that is smaller.
        energy: In place of ``rank``: the smallest k with Σ s² ≥ ``energy``·‖matrix‖².
    """
    short = min(matrix.shape)
    total = float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64))
    guess = min(rank if rank is not None else _SPARE, short)
    while short > _EXACT and 4 * (guess + _SPARE) < short:
        u, s, v = _iterated(matrix, guess + _SPARE, total)
        kept = _count(s, rank, energy, total)
        if kept is not None and kept <= guess:
            return u[:, :kept], s[:kept], v[:kept]
        guess = 2 * guess if kept is None else kept
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    kept = _count(s, rank, energy, total) or short
    return u[:, :kept], s[:kept], v[:kept]


def _count(s: Array, rank: int | None, energy: float | None, total: float) -> int | None:
    """k; None where the values at hand do not hold the energy."""
    if energy is None:
        return min(rank if rank is not None else len(s), len(s))
    captured = np.cumsum(s.astype(np.float64) ** 2)
    enough = np.flatnonzero(captured >= energy * total * (1.0 - 1e-12))
    return int(enough[0]) + 1 if len(enough) else None


def _iterated(matrix: Array, width: int, total: float) -> tuple[Array, Array, Array]:
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], width)).astype(matrix.dtype)
    basis = np.linalg.qr(matrix @ start)[0]
    captured = -1.0
    for _ in range(_ROUNDS):
        back = np.linalg.qr(matrix.T @ basis)[0]
        basis, inner = np.linalg.qr(matrix @ back)
        now = float(np.sum(inner.astype(np.float64) ** 2))
        if now - captured <= _SETTLED * total:
            break
        captured = now
    u, s, v = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, v
