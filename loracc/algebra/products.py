"""Products of small factors that make a whole ΔW: Hadamard, Kronecker, Tucker (conventions: :mod:`.low_rank`)."""

from __future__ import annotations

import numpy as np

from loracc.dtypes import Array

__all__ = ["block_diagonal", "circulant_blocks", "hadamard", "kronecker", "tucker"]


def hadamard(left: tuple[Array, Array], right: tuple[Array, Array], scale: float) -> Array:
    """ΔW = s·(A₁B₁) ⊙ (A₂B₂) (FedPara, Hyeon-Woo et al. 2022, proposition 1; LyCORIS "LoHa").

    Each side is ``([out, r], [r, n])``; returns ``[out, n]``.
    """
    product = left[0] @ left[1]
    product *= right[0] @ right[1]
    product *= product.dtype.type(scale)
    return product


def tucker(core: Array, out_factor: Array, in_factor: Array) -> Array:
    """Σᵢⱼ T[i, j, *k]·P[i, p]·R[j, c], a Tucker-2 convolution kernel (LyCORIS ``make_weight_cp``).

    ``core`` is ``[r, r, *k]``, ``out_factor`` ``[r, out]``, ``in_factor`` ``[r, in]``; returns ``[out, in, *k]``.
    """
    partial = np.tensordot(out_factor, core, axes=(0, 0))  # [out, r, *k]
    return np.moveaxis(np.tensordot(partial, in_factor, axes=(1, 0)), -1, 1)


def kronecker(w1: Array, w2: Array, scale: float) -> Array:
    """s·W₁ ⊗ W₂ (LyCORIS "LoKr", Yeh et al. 2024, section 3.2); where one has fewer axes, its last ones are aligned."""
    return np.kron(w1 * w1.dtype.type(scale), w2)


def circulant_blocks(kernels: Array) -> Array:
    """Block-circulant matrix from ``[m, n, b]`` kernels: block (i, j) is C with C[p, q] = k[(q − p) mod b].

    C³A (Chen et al. 2024) as PEFT computes it, y = F(F⁻¹(x) ⊙ F(k)); returns ``[m·b, n·b]``.
    """
    m, n, size = kernels.shape
    index = (np.arange(size)[None, :] - np.arange(size)[:, None]) % size
    return kernels[:, :, index].transpose(0, 2, 1, 3).reshape(m * size, n * size)


def block_diagonal(stacked: Array, blocks: int) -> Array:
    """A factor of BD-LoRA whole: ``[rows, columns/blocks]`` cut by rows into blocks that lie on a diagonal.

    Returns ``[rows, columns]`` (Wang et al. 2025, BD-LoRA; PEFT ``tuners/lora/variants.py``, ``BlockDiagonalLinear``).
    """
    rows, width = stacked.shape
    result = np.zeros((blocks, rows // blocks, blocks, width), stacked.dtype)
    index = np.arange(blocks)
    result[index, :, index] = stacked.reshape(blocks, rows // blocks, width)
    return result.reshape(rows, blocks * width)
