"""The LoRA family of deltas: low rank, stacks of experts, DoRA, replacement and plain addition."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from loracc.adapter import Delta, ReadSlab, slab_index
from loracc.algebra.low_rank import add_low_rank, dora_factor, dora_norm_terms, low_rank, stacked_low_rank
from loracc.dtypes import Array
from loracc.errors import UnsupportedError

__all__ = ["Addition", "Decomposition", "DoRA", "LowRank", "Replacement", "RowReplacement", "StackedLowRank"]


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """ΔW = s·B·A. ``a`` is ``[r, *rest]``, ``b`` is ``[out, r]``; the weight is ``[out, *rest]``."""

    kind: ClassVar[str] = "lora"
    a: Array
    b: Array
    s: float

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.b.shape[0], *self.a.shape[1:])

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        return self.s

    def scaled(self, weight: float) -> LowRank:
        return replace(self, s=self.s * weight)

    def resolve(self, shape: tuple[int, ...]) -> LowRank:
        """A 1×1 convolution and a linear layer are one product: A takes the weight's number of axes."""
        a, (rows, columns) = self.a, self.a.shape[:2] if self.a.ndim > 1 else (0, 0)
        if len(shape) != a.ndim and len(shape) > 1 and a.size == rows * columns and math.prod(shape[2:]) == 1:
            return replace(self, a=a.reshape(rows, columns, *(1,) * (len(shape) - 2)))
        return self

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        return low_rank(self.b.astype(dtype), self.a.astype(dtype), self.s)

    def converted(self, dtype: np.dtype[np.generic]) -> LowRank:
        b = self.b.astype(dtype)
        return LowRank(self.a.astype(dtype), b * b.dtype.type(self.s), 1.0)

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        b, a = (self.b[lo:hi], self.a) if axis == 0 else (self.b, self.a[slab_index(self.a.ndim, axis, lo, hi)])
        add_low_rank(w, b.astype(w.dtype, copy=False), a.astype(w.dtype, copy=False), self.s)
        return w


@dataclass(frozen=True, eq=False)
class StackedLowRank(Delta):
    """ΔW[e] = s·B[e]·A[e] on expert weights ``[E, rows, cols]``. ``b`` is ``[E, rows, r]``, ``a`` ``[E, r, cols]``."""

    kind: ClassVar[str] = "lora"
    a: Array
    b: Array
    s: float

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.b.shape[0], self.b.shape[1], self.a.shape[2])

    @property
    def rank(self) -> int:
        return int(self.a.shape[1])

    @property
    def scale(self) -> float:
        return self.s

    def scaled(self, weight: float) -> StackedLowRank:
        return replace(self, s=self.s * weight)

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        return stacked_low_rank(self.b.astype(dtype), self.a.astype(dtype), self.s)

    def converted(self, dtype: np.dtype[np.generic]) -> StackedLowRank:
        b = self.b.astype(dtype)
        return StackedLowRank(self.a.astype(dtype), b * b.dtype.type(self.s), 1.0)

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        b, a = self.b, self.a
        if axis == 0:
            b, a = b[lo:hi], a[lo:hi]
        elif axis == 1:
            b = b[:, lo:hi]
        else:
            a = a[:, :, lo:hi]
        w += stacked_low_rank(b.astype(w.dtype, copy=False), a.astype(w.dtype, copy=False), self.s)
        return w


class Decomposition(Delta):
    """V = W + ΔW with a factor on every slice along ``axis`` that depends on the slice's norm.

    Attributes:
        inner: Gives ΔW; an additive kind.
        magnitude: ``[n]``, n the weight's length on ``axis``.
        axis: The kept one; norms are over all others.
    """

    additive: ClassVar[bool] = False
    inner: Delta
    magnitude: Array
    axis: int

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.inner.shape

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def scale(self) -> float:
        return self.inner.scale

    @abc.abstractmethod
    def factor(self, magnitude: Array, squares: Array) -> Array:
        """The factors of some slices, in float64, from their magnitudes and ‖V‖²."""

    def prepare(self, read: ReadSlab, axis: int, length: int, step: int) -> Array | None:
        """‖V‖² per kept index. None where a slab holds whole vectors to be normed: no first pass is needed then."""
        if axis == self.axis:
            return None
        total = np.zeros(self.magnitude.shape[0], np.float64)
        for lo in range(0, length, step):
            hi = min(lo + step, length)
            total += dora_norm_terms(self.inner.apply_slab(read(lo, hi), axis, lo, hi), self.axis)
        return total

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        v = self.inner.apply_slab(w, axis, lo, hi)
        magnitude = self.magnitude
        if axis == self.axis:
            magnitude, statistic = magnitude[lo:hi], dora_norm_terms(v, self.axis)
        if statistic is None:
            raise TypeError("a decomposed weight needs the norms that prepare() returns")
        factor = self.factor(magnitude.astype(np.float64), statistic)
        v *= factor.astype(v.dtype).reshape([-1 if i == self.axis else 1 for i in range(v.ndim)])
        return v


@dataclass(frozen=True, eq=False)
class DoRA(Decomposition):
    """W' = (m / ‖V‖) ⊙ V with V = W + ΔW (Liu et al. 2024); ‖·‖ over every axis but ``axis``.

    ``axis`` 0 is PEFT's linear and convolution (one factor per output), 1 its embedding (one per embedding column).
    ``magnitude`` is 1-D, of the weight's length on ``axis``.
    """

    kind: ClassVar[str] = "dora"
    inner: LowRank
    magnitude: Array
    axis: int = 0

    def scaled(self, weight: float) -> DoRA:
        """As PEFT's ``scale_layer``: the weight acts on ΔW inside the norm, the magnitude stays."""
        return replace(self, inner=self.inner.scaled(weight))

    def resolve(self, shape: tuple[int, ...]) -> DoRA:
        return replace(self, inner=self.inner.resolve(shape))

    def converted(self, dtype: np.dtype[np.generic]) -> DoRA:
        return replace(self, inner=self.inner.converted(dtype))

    def factor(self, magnitude: Array, squares: Array) -> Array:
        return dora_factor(magnitude, squares)

    def arrays(self) -> dict[str, Array]:
        return {**self.inner.arrays(), "magnitude": self.magnitude}


@dataclass(frozen=True, eq=False)
class Addition(Delta):
    """W' = W + s·D with a full-size D (a LoRA bias, LyCORIS ``diff``)."""

    kind: ClassVar[str] = "full"
    d: Array
    s: float = 1.0

    @property
    def shape(self) -> tuple[int | None, ...]:
        return tuple(self.d.shape)

    @property
    def scale(self) -> float:
        return self.s

    def scaled(self, weight: float) -> Addition:
        return replace(self, s=self.s * weight)

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        d = self.d.astype(dtype)
        return d * d.dtype.type(self.s)

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        d = self.d[slab_index(self.d.ndim, axis, lo, hi)].astype(w.dtype, copy=False)
        w += d if self.s == 1.0 else d * w.dtype.type(self.s)
        return w


@dataclass(frozen=True, eq=False)
class Replacement(Delta):
    """W' = N: a fully trained parameter (PEFT ``modules_to_save``, ``bias``) takes the weight's place.

    ``of_base`` marks a copy of the base's own parameter that the trainer saved beside the deltas (a resized embedding):
    it is no part of the adapter's strength, and it goes to every site of a tied weight.
    """

    kind: ClassVar[str] = "replace"
    additive: ClassVar[bool] = False
    replaces: ClassVar[bool] = True
    new: Array
    of_base: bool = False

    @property
    def shape(self) -> tuple[int | None, ...]:
        return tuple(self.new.shape)

    @property
    def follows_tying(self) -> bool:
        return self.of_base

    def scaled(self, weight: float) -> Replacement:
        if self.of_base or weight == 1.0:
            return self
        raise UnsupportedError(
            f"a weight of {weight} on an adapter that replaces whole parameters (modules_to_save or bias) has no "
            "meaning: a replacement is not a delta.",
            hint="Use the adapter without @WEIGHT.",
        )

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        w[...] = self.new[slab_index(self.new.ndim, axis, lo, hi)]
        return w


@dataclass(frozen=True, eq=False)
class RowReplacement(Delta):
    """W'[rows] = new rows (PEFT ``trainable_token_indices``). ``rows`` int64 ``[n]``, ``new`` ``[n, dim]``."""

    kind: ClassVar[str] = "rows"
    additive: ClassVar[bool] = False
    replaces: ClassVar[bool] = True
    rows: Array
    new: Array

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (None, *self.new.shape[1:])

    @property
    def follows_tying(self) -> bool:
        """PEFT ties the token rows of every module that is tied to the embedding."""
        return True

    def scaled(self, weight: float) -> RowReplacement:
        if weight == 1.0:
            return self
        raise UnsupportedError(
            f"a weight of {weight} on an adapter with trained token rows has no meaning: the rows are replaced, not "
            "added to.",
            hint="Use the adapter without @WEIGHT.",
        )

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        if axis == 0:
            inside = (self.rows >= lo) & (self.rows < hi)
            w[self.rows[inside] - lo] = self.new[inside]
        else:
            w[self.rows] = self.new[slab_index(self.new.ndim, axis, lo, hi)]
        return w
