"""Rounding a matrix so that its *products* change least: which neighbour each element goes to is free.

A layer computes y = W·x. With E = Q − W the error that rounding W to Q leaves, and H = Σ x·xᵀ over the inputs it sees,
the squared error of all its outputs is Σ‖E·x‖² = tr(E·H·Eᵀ). Every row of W is a closest-vector problem of its own:

1. :func:`round_with_feedback`: column by column, each column's rounding error is taken out of the columns that come
   after it, along the Cholesky factor of H⁻¹ (GPTQ: Frantar et al. 2022, algorithm 1; the same as Babai's nearest
   plane), those with the largest H[k, k] first.
2. Then coordinate descent: one column at a time, the rest fixed, goes to the grid point nearest to where tr(E·H·Eᵀ) is
   least. That never makes it larger.

Nothing here knows what the grid is: ``nearest`` rounds elements of one column.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loracc.dtypes import Array

__all__ = ["Nearest", "round_with_feedback"]

#: ``nearest(values, k, lo)`` rounds the elements W[lo : lo + len(values), k], or what has become of them, to the grid
#: points that may stand there; the result has the dtype of ``values``.
Nearest = Callable[[Array, int, int], Array]

#: Columns whose errors are passed on together: inside a block one by one, behind it by one product.
_BLOCK = 64
#: Rows that are done together: rows are independent, and this bounds what is in memory beside W and Q.
_ROWS = 2048


def round_with_feedback(
    exact: Array, moment: Array, nearest: Nearest, *, damping: float = 0.03, sweeps: int = 2
) -> Array:
    """Q on the grid with a small tr((Q − W)·H·(Q − W)ᵀ).

    Args:
        exact: W ``[out, in]``, float32 or float64; left as it is.
        moment: H ``[in, in]`` = Σ x·xᵀ, float64, symmetric and positive semidefinite.
        nearest: The grid.
        damping: H gets this part of its mean diagonal on its diagonal: directions that were seldom seen are not free.
        sweeps: Rounds of coordinate descent.

    Returns:
        Q ``[out, in]`` of ``exact``'s dtype.

    Raises:
        numpy.linalg.LinAlgError: ``moment`` is not finite or not positive semidefinite.

    >>> w, h = np.array([[0.4, 0.4]]), np.array([[1.0, 0.99], [0.99, 1.0]])
    >>> round_with_feedback(w, h, lambda values, k, lo: np.rint(values)).astype(int).tolist()  # nearest alone: 0 + 0
    [[0, 1]]
    """
    if not np.isfinite(moment).all():
        raise np.linalg.LinAlgError("the second moments are not finite")
    system = _damped(moment, damping)
    order = np.argsort(-np.diag(system), kind="stable")
    system = system[np.ix_(order, order)]
    # The rows of U behind the diagonal say how a column's error is made good by the later ones: H⁻¹ = UᵀU.
    factor = _inverse_factor(system).astype(exact.dtype)
    system = system.astype(exact.dtype)
    result = np.empty_like(exact)
    for lo in range(0, len(exact), _ROWS):
        columns = np.ascontiguousarray(exact[lo : lo + _ROWS].T[order])
        rounded = _feedback(columns.copy(), factor, order, nearest, lo)
        for _ in range(sweeps):
            if not _descend(columns, rounded, system, order, nearest, lo):
                break
        result[lo : lo + _ROWS].T[order] = rounded
    return result


def _damped(moment: Array, damping: float) -> Array:
    system: Array = moment.astype(np.float64)
    mean = float(np.diag(system).mean())
    # A scale of one keeps float32 in range whatever the number of rows was; inputs that are always zero stay solvable.
    system /= mean if mean > 0 else 1.0
    system[np.diag_indices(len(system))] += max(damping, np.finfo(np.float32).eps)
    return system


def _inverse_factor(system: Array) -> Array:
    """The upper triangular U of H⁻¹ = UᵀU, without H⁻¹: H = R·Rᵀ with R upper triangular, and U = R⁻¹."""
    upper = np.ascontiguousarray(np.linalg.cholesky(system[::-1, ::-1])[::-1, ::-1])
    _invert_upper(upper)
    return upper


def _invert_upper(upper: Array) -> None:
    """In place, by halves: what multiplies matrices costs a third of a general inverse, and no other square."""
    size = len(upper)
    if size <= _BLOCK:
        upper[...] = np.linalg.inv(upper)
        return
    half = size // 2
    first, corner, last = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    _invert_upper(first)
    _invert_upper(last)
    corner[...] = -(first @ corner) @ last


def _feedback(columns: Array, factor: Array, order: Array, nearest: Nearest, row: int) -> Array:
    """Step 1, on ``[in, rows]`` in processing order; ``columns`` is used up."""
    count = len(columns)
    rounded = np.empty_like(columns)
    for lo in range(0, count, _BLOCK):
        hi = min(lo + _BLOCK, count)
        errors = np.empty((hi - lo, columns.shape[1]), columns.dtype)
        for k in range(lo, hi):
            rounded[k] = nearest(columns[k], int(order[k]), row)
            errors[k - lo] = (columns[k] - rounded[k]) / factor[k, k]
            columns[k + 1 : hi] -= factor[k, k + 1 : hi, None] * errors[k - lo]
        columns[hi:] -= factor[lo:hi, hi:].T @ errors
    return rounded


def _descend(exact: Array, rounded: Array, system: Array, order: Array, nearest: Nearest, row: int) -> bool:
    """Step 2, one round, in place; whether anything changed."""
    count, changed = len(exact), False
    slope = system @ (rounded - exact)
    for lo in range(0, count, _BLOCK):
        hi = min(lo + _BLOCK, count)
        steps = np.empty((hi - lo, exact.shape[1]), exact.dtype)
        for k in range(lo, hi):
            best = nearest(rounded[k] - slope[k] / system[k, k], int(order[k]), row)
            steps[k - lo] = best - rounded[k]
            rounded[k] = best
            slope[k + 1 : hi] += system[k + 1 : hi, k, None] * steps[k - lo]
        if steps.any():
            changed = True
            slope[hi:] += system[hi:, lo:hi] @ steps
    return changed
