"""Where the weights lie in a plan: looked for, and compared byte for byte where they seem to be.

The builder writes a weight that needs no repacking as it is, at a multiple of 8 bytes. So one pass over the plan looks
at every eighth byte for eight bytes of each weight, and only those places are compared whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array

__all__ = ["find_places"]

_GRID = 8
#: Below this many bytes a match may be chance.
_SMALLEST = 32
#: Grid points looked at in one go.
_CHUNK = 1 << 22
_LOW = np.uint64((1 << 20) - 1)


def find_places(
    plan: bytes, tensors: Mapping[str, ir.TensorProtocol]
) -> dict[str, tuple[ir.TensorProtocol, str, int | None]]:
    """Each tensor with the sha256 of its bytes and its offset in the plan; None where it is not there as it is.

    Args:
        plan: The serialized engine.
        tensors: By name; each is read once.
    """
    wanted: dict[int, list[tuple[str, int, Array]]] = {}
    digests: dict[str, str] = {}
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        data = _bytes(tensor)
        digests[name] = hashlib.sha256(data.data).hexdigest()
        if data.size >= _SMALLEST:
            offset = _telling(data)
            key = int(data[offset : offset + 8].view(np.uint64)[0])
            wanted.setdefault(key, []).append((name, offset, data))
    whole = np.frombuffer(plan, np.uint8)
    grid = whole[: whole.size // _GRID * _GRID].view(np.uint64)
    keys = np.array(sorted(wanted), np.uint64)
    likely = np.zeros(int(_LOW) + 1, bool)  # by the low bits, which are the mantissa's of some element
    likely[keys & _LOW] = True
    for start in range(0, grid.size, _CHUNK):
        part = grid[start : start + _CHUNK]
        maybe = np.flatnonzero(likely[part & _LOW])
        for index in maybe[np.isin(part[maybe], keys)]:
            for name, offset, data in wanted[int(part[index])]:
                at = (start + int(index)) * _GRID - offset
                if name not in found and at >= 0 and np.array_equal(whole[at : at + data.size], data):
                    found[name] = at
    return {name: (tensor, digests[name], found.get(name)) for name, tensor in tensors.items()}


def _bytes(tensor: ir.TensorProtocol) -> Array:
    """The tensor's bytes as they are stored, without a copy where there need be none."""
    if tensor.dtype.bitwidth < 8:  # packed
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _telling(data: Array) -> int:
    """A multiple of the grid where the data is not what is found everywhere: no zeros, not eight times the same."""
    words = data[: data.size // _GRID * _GRID].view(np.uint64)
    sampled = words[: 1 << 16]
    values, first, counts = np.unique(sampled, return_index=True, return_counts=True)
    order = np.lexsort((first, counts, values == 0))
    return int(first[order[0]]) * _GRID
