"""How several task tensors become one: pruning, election of signs, disjoint means.

Facts: PEFT 0.21.2 ``utils/merge_utils.py``, which its ``add_weighted_adapter`` is made of. Arrays come in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from loracc.dtypes import Array

__all__ = ["dare_linear", "dare_ties", "magnitude_prune", "task_arithmetic", "ties"]

Tensors = Sequence[Array]
Weights = Sequence[float]
#: Uniform numbers in [0, 1) for the tensor of that index.
Draw = Callable[[int, tuple[int, ...]], Array]


def task_arithmetic(tensors: Tensors, weights: Weights) -> Array:
    """Σ wᵢ·Tᵢ (Ilharco et al. 2023, section 2)."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def magnitude_prune(tensors: Tensors, weights: Weights, density: float) -> Array:
    """Σ wᵢ·top(Tᵢ), top keeping the ``density`` part of the elements that is largest in magnitude."""
    return task_arithmetic([_largest(tensor, density) for tensor in tensors], weights)


def ties(tensors: Tensors, weights: Weights, density: float) -> Array:
    """TIES: trim, elect signs by total mass, disjoint mean (Yadav et al. 2023, algorithm 1), weighted as in PEFT."""
    return _elected([_largest(tensor, density) for tensor in tensors], weights)


def dare_linear(tensors: Tensors, weights: Weights, density: float, draw: Draw) -> Array:
    """Σ wᵢ·drop(Tᵢ)/density, each element kept with probability ``density`` (Yu et al. 2024, DARE, equation 2)."""
    return task_arithmetic(_dropped(tensors, density, draw), weights)


def dare_ties(tensors: Tensors, weights: Weights, density: float, draw: Draw) -> Array:
    """DARE's drop and rescale, then TIES' election and disjoint mean."""
    return _elected(_dropped(tensors, density, draw), weights)


def _largest(tensor: Array, density: float) -> Array:
    """The k = ⌊density·size⌋ elements of largest magnitude, the others 0; of equal ones the first."""
    if density >= 1.0:
        return tensor
    flat, kept = tensor.reshape(-1), int(density * tensor.size)
    result = np.zeros_like(flat)
    if kept:
        magnitude = np.abs(flat)
        least = np.partition(magnitude, flat.size - kept)[flat.size - kept]
        above = magnitude > least
        at = np.flatnonzero(magnitude == least)[: kept - int(np.count_nonzero(above))]
        result[above], result[at] = flat[above], flat[at]
    return result.reshape(tensor.shape)


def _dropped(tensors: Tensors, density: float, draw: Draw) -> list[Array]:
    if density >= 1.0:
        return list(tensors)
    return [np.where(draw(i, tensor.shape) < density, tensor / density, 0.0) for i, tensor in enumerate(tensors)]


def _elected(tensors: Tensors, weights: Weights) -> Array:
    """Σ wᵢ·Tᵢ over the tensors that have the sign of Σ Tᵢ at that element, divided by their number."""
    sign = np.where(task_arithmetic(tensors, [1.0] * len(tensors)) >= 0.0, 1.0, -1.0)
    total, count = np.zeros_like(tensors[0]), np.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = np.sign(tensor) == sign
        total += np.where(agrees, tensor * weight, 0.0)
        count += agrees
    total /= np.maximum(count, 1.0)
    return total
