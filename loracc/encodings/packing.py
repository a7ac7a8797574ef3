"""Codes of fewer than eight bits in bytes: the first code in the lowest bits, as ONNX's int4 and MatMulNBits do."""

from __future__ import annotations

import numpy as np

from loracc.dtypes import Array

__all__ = ["pack", "unpack"]


def unpack(packed: Array, bits: int) -> Array:
    """Unsigned codes along the last axis: uint8 ``[..., n]`` to uint8 ``[..., n · 8/bits]``.

    >>> unpack(np.array([0x21, 0x43], np.uint8), 4)
    array([1, 2, 3, 4], dtype=uint8)
    """
    if bits == 8:
        return packed
    count, mask = 8 // bits, np.uint8((1 << bits) - 1)
    codes = np.empty((*packed.shape, count), np.uint8)
    for index in range(count):
        np.bitwise_and(packed >> np.uint8(index * bits), mask, out=codes[..., index])
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * count)


def pack(codes: Array, bits: int) -> Array:
    """The inverse of :func:`unpack`; a last byte that is not full has zeros in its upper bits.

    >>> pack(np.array([1, 2, 3], np.uint8), 4).tolist()
    [33, 3]
    """
    if bits == 8:
        return codes
    count = 8 // bits
    if short := -codes.shape[-1] % count:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], short), np.uint8)], axis=-1)
    groups = codes.reshape(*codes.shape[:-1], -1, count)
    packed = np.zeros(groups.shape[:-1], np.uint8)
    for index in range(count):
        packed |= groups[..., index] << np.uint8(index * bits)
    return packed
