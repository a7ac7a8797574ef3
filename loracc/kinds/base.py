"""What the kinds share: a factor on a whole ΔW, and changes that work slice by slice.

``Scaled`` is for additive kinds that form ΔW whole from small factors. ``SlabLocal`` is for changes in which a slice of
W' along one axis depends on the same slice of W only (rows, for a rotation of the input; columns, for one of the
output): they fold tile by tile when the weight is tiled along that axis, and over the whole weight when it is not.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from loracc.adapter import Delta, ReadSlab, slab_index
from loracc.dtypes import Array
from loracc.errors import UnsupportedError

__all__ = ["Scaled", "SlabLocal", "no_strength", "read_whole"]


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


class SlabLocal(Delta):
    """A change that treats the weight's slices along the axis ``tiles`` one by one (see the module's docstring)."""

    additive: ClassVar[bool] = False
    #: The canonical axis whose slices are independent: 0 for what acts on inputs, 1 for what acts on outputs.
    tiles: ClassVar[int] = 0

    @abc.abstractmethod
    def transform(self, w: Array, lo: int, hi: int) -> Array:
        """W' between ``lo`` and ``hi`` of the axis ``tiles``; ``w`` is that slab of W and may be changed."""

    def scaled(self, weight: float) -> Delta:
        raise no_strength(self.kind, weight)

    def prepare(self, read: ReadSlab, axis: int, length: int, step: int) -> Array | None:
        """W' whole when the weight is tiled along another axis, else nothing."""
        if axis == self.tiles:
            return None
        whole = read_whole(read, axis, length, step)
        return self.transform(whole, 0, whole.shape[self.tiles] if whole.ndim > self.tiles else 1)

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        if axis == self.tiles:
            return self.transform(w, lo, hi)
        if statistic is None:
            raise TypeError(f"{self.kind} tiled along axis {axis} needs what prepare() returns")
        w[...] = statistic[slab_index(w.ndim, axis, lo, hi)]
        return w
