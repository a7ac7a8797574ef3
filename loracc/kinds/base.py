"""What the kinds share: a factor on a whole ΔW, and changes that work row by row.

``Scaled`` is for additive kinds that form ΔW whole from small factors. ``RowLocal`` is for changes in which row i of W'
depends on row i of W only (rotations of the input, scalings): they fold tile by tile when the weight is tiled by rows,
and over the whole weight when it is stored transposed.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from loracc.adapter import Delta, ReadSlab, slab_index
from loracc.dtypes import Array
from loracc.errors import UnsupportedError

__all__ = ["RowLocal", "Scaled", "no_strength", "read_whole"]


def no_strength(kind: str, weight: float) -> UnsupportedError:
    """The refusal of ``PATH@0.7`` for a kind that is no delta times a factor."""
    return UnsupportedError(
        f"a weight of {weight} on a {kind} adapter has no meaning: it transforms the weights, and the library that "
        "trains it defines no strength for it.",
        hint="Use the adapter without @WEIGHT.",
    )


def read_whole(read: ReadSlab, axis: int, length: int, step: int) -> Array:
    """The whole weight from its slabs; a copy that may be changed."""
    step = max(step, 1)
    slabs = [read(lo, min(lo + step, length)) for lo in range(0, length, step)]
    return np.concatenate(slabs, axis=axis) if slabs[0].ndim else slabs[0].copy()


@dataclass(frozen=True, eq=False)
class Scaled(Delta):
    """An additive kind with a factor ``s`` on ΔW."""

    s: float

    @property
    def scale(self) -> float:
        return self.s

    def scaled(self, weight: float) -> Self:
        return replace(self, s=self.s * weight)


class RowLocal(Delta):
    """W'[i] = f(W[i]) row by row, along the first canonical axis."""

    additive: ClassVar[bool] = False

    @abc.abstractmethod
    def transform(self, w: Array, lo: int, hi: int) -> Array:
        """Rows ``lo`` to ``hi`` of W', from those rows of W in the compute dtype; ``w`` may be changed."""

    def scaled(self, weight: float) -> Delta:
        raise no_strength(self.kind, weight)

    def prepare(self, read: ReadSlab, axis: int, length: int, step: int) -> Array | None:
        """W' whole when the weight is tiled across its rows, else nothing."""
        if axis == 0:
            return None
        whole = read_whole(read, axis, length, step)
        return self.transform(whole, 0, whole.shape[0])

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        if axis == 0:
            return self.transform(w, lo, hi)
        if statistic is None:
            raise TypeError(f"{self.kind} on a weight tiled by columns needs what prepare() returns")
        w[...] = statistic[slab_index(w.ndim, axis, lo, hi)]
        return w
