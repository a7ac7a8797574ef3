"""From the terms of a linear map to deltas on its base weight.

The sum was ``g·x·W + Σ sᵢ·uᵢ·x·Mᵢ`` and what stays of it is ``c·x·W'``, g − c and the terms having been lost.
So ``W' = (g·W + Σ sᵢ·uᵢ·Mᵢ) / c``:

1. g = c: plain sums, one delta per term; a chain of factors is low-rank.
2. g/c is a vector: DoRA, ``W' = (m/‖V‖)·V`` with ``V = W + Σ (c·sᵢ·uᵢ/g)·Mᵢ`` and ``m = (g/c)·‖V‖`` (Liu et al.
   2024). Where g has zeros or V a zero row there is no such m, and the change is written out.
3. Deltas of one weight add up, each on the stored weight. A factor g/c that comes after other deltas (a second DoRA
   adapter) multiplies those too: the whole change is written out, and stands for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from loracc.adapter import Delta
from loracc.algebra.low_rank import dora_norm_terms
from loracc.deltas import DoRA, LowRank
from loracc.dtypes import Array
from loracc.passes.linear_forms import Product
from loracc.passes.lora_groups import Base
from loracc.passes.raised import RaisedAddition
from loracc.tensors import dims

__all__ = ["narrowed", "stacked", "weight_deltas"]

#: Relative differences of float64 computations that are their rounding.
_ROUNDING = 1e-12
#: Relative differences between a factor and the same factor computed by another path in the graph.
_SAME = 1e-9


def weight_deltas(
    lost: Sequence[Product], kept: Array, base: Base, earlier: Sequence[Delta] = ()
) -> list[tuple[Delta, Product | None]]:
    """The deltas on a base weight, each with the term that it is (None: all of them, ``earlier`` included).

    Args:
        lost: The terms that were taken out of the sum, the base's own among them where its coefficient changed.
        kept: The coefficient c with which the base's product stays in the graph, without zeros: a number or a vector.
        base: The weight.
        earlier: Deltas that were found at this weight and node before, in sums inside of this one.
    """
    ratio = np.asarray(sum((p.coefficient for p in lost if p.key == base.key), kept)) / kept
    products = [p for p in _merged(lost) if p.key != base.key]
    products = [p.stretched(1.0 / kept) if kept.ndim else p.scaled(1.0 / float(kept)) for p in products]
    if np.all(np.abs(ratio - 1.0) <= _ROUNDING):
        return [(_additive(product, base), product) for product in products]
    return [(_rescaled(products, ratio, base, earlier), None)]


def _merged(products: Sequence[Product]) -> list[Product]:
    """Terms with the same matrices as one: what came in twice, or in and out again."""
    groups: dict[tuple[ir.Node, ...], list[Product]] = {}
    for product in products:
        groups.setdefault(product.key, []).append(product)
    merged = []
    for group in groups.values():
        if len(group) == 1:
            merged += group
        else:
            total = np.asarray(sum((p.coefficient for p in group[1:]), group[0].coefficient))
            plain = replace(group[0], scale=1.0, out=None)
            merged.append(plain.stretched(total) if total.ndim else plain.scaled(float(total)))
    return merged


def _additive(product: Product, base: Base) -> Delta:
    if len(product.factors) > 1:
        return _low_rank(product, base)
    return RaisedAddition(narrowed(_canonical(product.dense(), base)))


def _low_rank(product: Product, base: Base) -> LowRank:
    """``left [in, r] · right [r, out]`` as B and A of the canonical weight."""
    left, right = product.halves()
    if product.out is not None:
        right = right * product.out
    if base.kind == "embedding":  # canonical [num, dim] = left · right
        return LowRank(narrowed(right), narrowed(left), product.scale)
    a = left.T
    if base.kind == "conv":
        a = a.reshape(a.shape[0], -1, *_kernel(base))
    return LowRank(narrowed(a), narrowed(right.T), product.scale)


def _rescaled(products: list[Product], ratio: Array, base: Base, earlier: Sequence[Delta]) -> Delta:
    """Rules 2 and 3."""
    weight = _canonical(base.factor.read(), base)
    axis = 1 if base.kind == "embedding" else 0
    ratio = np.broadcast_to(ratio, (weight.shape[axis],))
    if not earlier and np.isfinite(ratio).all() and ratio.all() and all(len(p.factors) > 1 for p in products):
        inner = stacked([_low_rank(_divided(p, ratio), base) for p in products])
        squared = dora_norm_terms(inner.apply(weight), axis)
        if squared.all():
            return DoRA(inner, ratio * np.sqrt(squared), axis)
    factor = ratio.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    current = sum((delta.apply(weight.copy()) - weight for delta in earlier), weight)
    change = current * factor - weight if earlier else weight * (factor - 1.0)
    for product in products:
        change = change + _canonical(product.dense(), base)
    return RaisedAddition(narrowed(change))


def _divided(product: Product, ratio: Array) -> Product:
    """The term over the base's own factor; a term that carries the same factor loses it without a trace."""
    out = np.ones_like(ratio) if product.out is None else np.broadcast_to(product.out, ratio.shape)
    rest = out / ratio
    first = float(rest[0])
    if np.all(np.abs(rest - first) <= _SAME * abs(first)):
        number = 1.0 if abs(first - 1.0) <= _SAME else first
        return replace(product, out=None, scale=product.scale * number)
    return replace(product, out=rest)


def stacked(deltas: list[LowRank]) -> LowRank:
    """One low-rank delta that is the sum of several: ranks side by side, scales in B."""
    if len(deltas) == 1:
        return deltas[0]
    a = np.concatenate([d.a.astype(np.float64) for d in deltas])
    b = np.concatenate([d.b.astype(np.float64) * d.s for d in deltas], axis=1)
    return LowRank(narrowed(a), narrowed(b), 1.0)


def _canonical(matrix: Array, base: Base) -> Array:
    """``[in, out]`` in the orientation of a site."""
    if base.kind == "embedding":
        return matrix
    if base.kind == "conv":
        return matrix.T.reshape(matrix.shape[1], -1, *_kernel(base))
    return matrix.T


def _kernel(base: Base) -> tuple[int, ...]:
    assert base.initializer.const_value is not None
    shape = dims(base.initializer.const_value)
    return tuple(shape[axis] for axis in base.perm[2:])


def narrowed(array: Array) -> Array:
    """float32 where that holds every element exactly, as it does for a factor straight from a file."""
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    return narrow if np.array_equal(narrow, array) else np.ascontiguousarray(array)
