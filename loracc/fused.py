"""Which folds are nothing but products of two factors on rectangles of the stored matrix, as the kernel takes them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from loracc.deltas import LowRank
from loracc.kernel import Product, has_kernel
from loracc.rows import give_back

if TYPE_CHECKING:
    from loracc.folded import Binding

__all__ = ["products_of"]


def products_of(
    bindings: Sequence[Binding], shape: Sequence[int], stored: np.dtype[np.generic], sums: np.dtype[np.generic]
) -> list[Product] | None:
    """The products of a fold; None where it is anything else, or where there is no kernel for it.

    A block of a fused weight is a rectangle: rows where outputs are stored first, columns where inputs are. Rectangles
    that overlap (two adapters at one site) are rounded together, and so are none.

    Args:
        bindings: All that acts on the weight.
        shape: The stored matrix's.
        stored: Its dtype, before and after.
        sums: The dtype that ΔW is computed in.
    """
    if len(shape) != 2 or not bindings or not has_kernel(stored, sums):
        return None
    products = []
    for binding in bindings:
        delta, layout = binding.delta, binding.site.layout
        if type(delta) is not LowRank or delta.a.ndim != 2 or layout.perm not in ((), (0, 1), (1, 0)):
            return None
        factors = delta.converted(sums)
        if layout.perm == (1, 0):
            products.append(Product(factors.a.T, factors.b.T, 0, layout.start, stored))
        else:
            products.append(Product(factors.b, factors.a, layout.start, 0, stored))
        for array in delta.arrays().values():
            give_back(array)
    return None if any(_overlap(one, other) for one, other in combinations(products, 2)) else products


def _overlap(one: Product, other: Product) -> bool:
    return all(
        max(a.start, b.start) < min(a.stop, b.stop) for a, b in ((one.rows, other.rows), (one.columns, other.columns))
    )
