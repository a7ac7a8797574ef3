"""A rounded delta at its own strength: a few elements are moved so that the errors have none of its direction.

Rounding W + ΔW to Q on a coarse grid leaves errors E = Q − (W + ΔW) that are large beside ΔW, and by chance a part of
them points along it: the delta is there at 1 + ⟨E, ΔW⟩/‖ΔW‖² of its strength. Few elements undo that, and they are
chosen by what they cost in the products, tr(E·H·Eᵀ): moving element (i, j) by d adds 2·d·(E·H)ᵢⱼ + d²·Hⱼⱼ.
"""

from __future__ import annotations

import numpy as np

from loracc.dtypes import Array

__all__ = ["restore_strength"]

#: Of each row one element a round: what it costs is known from the round before.
_ROUNDS = 64


def restore_strength(error: Array, change: Array, moment: Array, moves: Array, tolerance: float) -> Array:
    """Which elements to move, each once.

    Args:
        error: E ``[out, in]``.
        change: ΔW, likewise.
        moment: H ``[in, in]``.
        moves: What each element may be moved by, against what is there too much (all ``moves · change`` have the sign
            that ⟨E, ΔW⟩ has not); 0 where it must stay.
        tolerance: Of |⟨E, ΔW⟩|/‖ΔW‖².

    Returns:
        A mask ``[out, in]``. Where the moves do not suffice, what is left is less than before all the same.

    >>> restore_strength(np.array([[.5, 0.]]), np.ones((1, 2)), np.diag([1., 9.]), -np.ones((1, 2)) / 2, .1).tolist()
    [[True, False]]
    """
    moved = np.zeros(error.shape, bool)
    power = float(np.vdot(change, change))
    left = abs(float(np.vdot(error, change)))
    if not power or not moment.any():
        return moved
    slopes, diagonal = error @ moment, np.diag(moment)
    worth = np.abs(moves * change)
    every = np.arange(len(error))
    for _ in range(_ROUNDS):
        if left <= tolerance * power:
            break
        able = (worth > 0) & ~moved & (worth <= left + tolerance * power)
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.where(able, (2.0 * moves * slopes + np.square(moves) * diagonal) / worth, np.inf)
        columns = price.argmin(axis=1)
        prices = price[every, columns]
        chosen = 0
        for row in np.argsort(prices, kind="stable"):
            column = columns[row]
            if not np.isfinite(prices[row]) or left <= tolerance * power:
                break
            if worth[row, column] > left + tolerance * power:
                continue
            moved[row, column] = True
            left = abs(left - float(worth[row, column]))
            slopes[row] += moves[row, column] * moment[column]
            chosen += 1
        if not chosen:
            break
    return moved
