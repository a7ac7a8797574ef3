"""Orthogonal matrices from few parameters, and what they do to the columns of a weight (see :mod:`.low_rank`).

Everywhere a weight is a matrix ``[rows, n]``: convolutions are flattened behind their first axis.
"""

from __future__ import annotations

import math

import numpy as np

from loracc.dtypes import Array

__all__ = [
    "butterfly_permutation",
    "cayley",
    "cayley_neumann",
    "constrained_skew",
    "householder_chain",
    "orthonormal_columns",
    "rotate_blocks",
    "skew_from_triangle",
]


def skew_from_triangle(vectors: Array, size: int) -> Array:
    """Q = U − Uᵀ, U's strict upper triangle filled row by row: ``[n, b(b−1)/2]`` to ``[n, b, b]``."""
    q = np.zeros((vectors.shape[0], size, size), vectors.dtype)
    rows, columns = np.triu_indices(size, 1)
    q[:, rows, columns] = vectors
    return q - q.transpose(0, 2, 1)


def cayley(q: Array) -> Array:
    """R = (I − Q)(I + Q)⁻¹ for each skew ``q`` of ``[n, b, b]`` (Qiu et al. 2023, OFT, section 3.2)."""
    eye = np.eye(q.shape[-1], dtype=q.dtype)
    return np.linalg.solve(eye + q, eye - q)  # the two factors commute


def cayley_neumann(q: Array, terms: int) -> Array:
    """R = I + 2Q + 2Q² + … + 2Qᵏ⁻¹ + Qᵏ: a truncated Neumann series of the Cayley transform (Qiu et al. 2025, OFTv2).

    ``terms`` counts as PEFT's ``OFTRotationModule._cayley_batch`` does: k = terms − 1, but 3 terms give what 4 give.
    """
    r = np.broadcast_to(np.eye(q.shape[-1], dtype=q.dtype), q.shape).copy()
    if terms <= 1:
        return r
    r += 2 * q
    if terms == 2:
        return r
    power = q @ q
    r += 2 * power
    for _ in range(3, terms - 1):
        power = power @ q
        r += 2 * power
    return r + power @ q


def constrained_skew(q: Array, eps: float) -> Array:
    """COFT: each block is scaled down to ‖Q‖_F ≤ ε/√n where it is longer (Qiu et al. 2023, section 3.3)."""
    # PEFT forms the limit in float32, whatever the parameters' dtype.
    limit = float(np.float32(eps) * (np.float32(1) / np.sqrt(np.float32(q.shape[0]))))
    norm = np.sqrt(np.sum(q * q, axis=(1, 2), keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(norm <= limit, q, q * (limit / norm))


def rotate_blocks(w: Array, blocks: Array) -> Array:
    """W·blockdiag(R₁, …, Rₙ). ``w`` is ``[rows, n·b]``; ``blocks`` ``[n, b, b]``, or ``[1, b, b]`` shared by all."""
    size = blocks.shape[-1]
    split = w.reshape(w.shape[0], -1, size).transpose(1, 0, 2)  # [n, rows, b]
    return np.matmul(split, blocks).transpose(1, 0, 2).reshape(w.shape)


def butterfly_permutation(length: int, group: int, half: int) -> Array:
    """Within each ``group`` of indices, runs of ``half`` at even positions come before those at odd ones.

    The permutation that makes a block-diagonal factor of BOFT a butterfly factor (Liu et al. 2024, BOFT, section 3.2).
    """
    runs = np.arange(group).reshape(-1, half)
    order = np.concatenate([runs[0::2].ravel(), runs[1::2].ravel()])
    return (np.arange(0, length, group)[:, None] + order).ravel()


def householder_chain(u: Array) -> tuple[Array, Array]:
    """Π (I − 2uᵢuᵢᵀ) over the columns of ``u`` ``[n, r]``, in order, as I − U·T·Uᵀ: returns (U with unit columns, T).

    The compact WY form (Schreiber & Van Loan 1989): appending u to I − UTUᵀ gives T's new column −2T(Uᵀu) above 2.
    The product is HRA's adapter (Yuan et al. 2024, equation 5).
    """
    unit = u / np.sqrt(np.sum(u * u, axis=0))
    rank = u.shape[1]
    t = np.zeros((rank, rank), u.dtype)
    for i in range(rank):
        t[:i, i] = -2 * t[:i, :i] @ (unit[:, :i].T @ unit[:, i])
        t[i, i] = 2
    return unit, t


def orthonormal_columns(u: Array) -> Array:
    """Gram-Schmidt on the columns of ``u`` ``[n, r]`` (HRA with ``apply_GS``); signs as in the classical process."""
    q = np.empty_like(u)
    for i in range(u.shape[1]):
        column = u[:, i].copy()
        for j in range(i):
            column -= (q[:, j] @ column) * q[:, j]
        q[:, i] = column / math.sqrt(float(column @ column))
    return q
