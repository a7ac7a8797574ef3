"""Weights that were one tensor in the model that an adapter was trained on, and are several in this graph.

A tied head reads the embedding turned round, and exporters often store that as a second initializer. Deltas that follow
the tie (``Delta.follows_tying``) are meant for both. The tie is seen in where the numbers lie, or in the numbers: two
matrices of one shape and equal in every element.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.sites import Site
from loracc.tensors import PermutedTensor, dims

__all__ = ["tied_sites"]

#: Rows that are compared before all of them are.
_SAMPLE = 16


def tied_sites(model: ir.Model, site: Site, others: Iterable[Site]) -> list[Site]:
    """Which of the other sites hold the same weight in another initializer."""
    tensor = model.graph.initializers[site.initializer].const_value
    if tensor is None:
        return []
    found = []
    for other in others:
        twin = model.graph.initializers[other.initializer].const_value
        if twin is None or other.initializer == site.initializer or twin.dtype != tensor.dtype:
            continue
        shapes = (s.layout.canonical_shape(dims(t)) for s, t in ((site, tensor), (other, twin)))
        if len(set(shapes)) == 1 and (_root(twin) is _root(tensor) or _equal(site, tensor, other, twin)):
            found.append(other)
    return found


def _root(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    while isinstance(tensor, PermutedTensor):
        tensor = tensor.base
    return tensor


def _equal(one: Site, first: ir.TensorProtocol, two: Site, second: ir.TensorProtocol) -> bool:
    left, right = one.layout.view(_array(first)), two.layout.view(_array(second))
    step = max(1, left.shape[0] // _SAMPLE)
    if not np.array_equal(left[::step], right[::step]):
        return False
    return all(np.array_equal(left[lo : lo + step], right[lo : lo + step]) for lo in range(0, left.shape[0], step))


def _array(tensor: ir.TensorProtocol) -> Array:
    """The stored tensor; a view of a file's bytes, where it lies in one."""
    return _array(tensor.base).transpose(tensor.perm) if isinstance(tensor, PermutedTensor) else tensor.numpy()
