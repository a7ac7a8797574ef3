"""The delta algebra: pure functions on arrays, each with its formula and where the formula comes from.

Canonical shapes throughout (PyTorch's own): a linear weight W is ``[out, in]``, an embedding ``[num, dim]``, a
convolution ``[out, in/groups, *k]``, a stack of experts ``[E, rows, cols]``. ``r`` is the rank and ``s`` the scale.
Nothing here knows about files, graphs or dtypes: arrays come in float32 or float64 and leave in the same dtype.
"""

from __future__ import annotations

import math

import numpy as np

from loracc.dtypes import Array

__all__ = [
    "add_low_rank",
    "dora_factor",
    "dora_norm_terms",
    "expert_factors",
    "lora_scale",
    "low_rank",
    "low_rank_norm",
    "stacked_low_rank",
]

#: OpenBLAS multiplies up to this many (rows × columns × rank) without packing: twice as fast for a small rank.
_PRODUCT_SIZE = 1_000_000


def lora_scale(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """s = α/r (Hu et al. 2021, section 4.1), or α/√r with rsLoRA (Kalajdzievski 2023, theorem 3.2).

    >>> lora_scale(16, 8), lora_scale(16, 4, rslora=True)
    (2.0, 8.0)
    """
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def low_rank(b: Array, a: Array, scale: float) -> Array:
    """ΔW = s·B·A (Hu et al. 2021, equation 3). ``b`` is ``[out, r]``, ``a`` ``[r, *rest]``; returns ``[out, *rest]``.

    A k×k convolution is the same product with ``rest = (in, *k)``: PEFT applies A as the k×k convolution and B as a
    1×1 one after it. An embedding is the same product with the roles swapped, ΔW = s·(B·A)ᵀ = s·AᵀBᵀ.
    """
    scaled = b if scale == 1.0 else b * b.dtype.type(scale)
    return (scaled @ a.reshape(a.shape[0], -1)).reshape(b.shape[0], *a.shape[1:])


def add_low_rank(w: Array, b: Array, a: Array, scale: float) -> None:
    """``w += s·B·A`` in place, for ``w`` of ``[out, *rest]``; the product is formed in the order w has in memory."""
    scaled = b if scale == 1.0 else b * b.dtype.type(scale)
    if w.ndim == 2 and w.strides[0] < w.strides[1]:
        _add_product(w.T, a.T, scaled.T)
    elif w.ndim == 2:
        _add_product(w, scaled, a)
    else:
        w += low_rank(scaled, a, 1.0)


def _add_product(w: Array, left: Array, right: Array) -> None:
    """``w += left @ right`` in pieces, whose sizes depend on the shapes only."""
    rank = max(right.shape[0], 1)
    columns = max(min(w.shape[1], _PRODUCT_SIZE // (8 * rank)), 1)
    rows = max(_PRODUCT_SIZE // (columns * rank), 1)
    for row in range(0, w.shape[0], rows):
        for column in range(0, w.shape[1], columns):
            piece = w[row : row + rows, column : column + columns]
            piece += left[row : row + rows] @ right[:, column : column + columns]


def stacked_low_rank(b: Array, a: Array, scale: float) -> Array:
    """ΔW[e] = s·B[e]·A[e] for each expert e. ``b`` is ``[E, rows, r]``, ``a`` is ``[E, r, cols]``."""
    return np.matmul(b * b.dtype.type(scale), a)


def low_rank_norm(b: Array, a: Array, scale: float) -> float:
    """‖s·B·A‖_F without forming the product: ‖BA‖² = tr((BᵀB)(AAᵀ)), in float64."""
    b64 = b.astype(np.float64)
    a64 = a.reshape(a.shape[0], -1).astype(np.float64)
    squared = float(np.sum((b64.T @ b64) * (a64 @ a64.T)))
    return abs(scale) * math.sqrt(max(squared, 0.0))


def expert_factors(a: Array, b: Array, experts: int, *, input_first: bool) -> tuple[Array, Array]:
    """PEFT's packed MoE factors as stacks ``(B [E, rows, r], A [E, r, cols])``.

    PEFT 0.21 (``tuners/lora/layer.py``, ``ParamWrapper``) stores A ``[r·E, in]`` expert-major and B ``[out, r·E]``
    rank-major: ``A.reshape(E, r, in)``, ``B.reshape(out, r, E)``. ``input_first`` says that the parameter is
    ``[E, in, out]`` (einsum ``o r e, e r i -> e i o``); otherwise it is ``[E, out, in]``.
    """
    rank = a.shape[0] // experts
    stacked_a = a.reshape(experts, rank, a.shape[1])  # [E, r, in]
    stacked_b = np.ascontiguousarray(b.reshape(b.shape[0], rank, experts).transpose(2, 0, 1))  # [E, out, r]
    if input_first:
        return stacked_a.transpose(0, 2, 1), stacked_b.transpose(0, 2, 1)
    return stacked_b, stacked_a


def dora_norm_terms(v: Array, axis: int) -> Array:
    """Σ v² over every axis but ``axis``, in float64: the part of ‖V‖² that this slab of V contributes."""
    moved = np.moveaxis(v, axis, 0).reshape(v.shape[axis], -1)
    return np.einsum("ij,ij->i", moved, moved, dtype=np.float64)


def dora_factor(magnitude: Array, squared_norm: Array) -> Array:
    """m / ‖V‖₂ (Liu et al. 2024, DoRA, equation 5); V = W + s·B·A, one factor per kept index. No epsilon, as PEFT."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return magnitude / np.sqrt(squared_norm)
