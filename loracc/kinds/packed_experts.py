"""PEFT's LoRA on the stacked weights of a mixture of experts, before the stack's shape is known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from loracc.adapter import Delta
from loracc.algebra.low_rank import expert_factors
from loracc.deltas import LowRank, StackedLowRank
from loracc.dtypes import Array
from loracc.errors import BindingError

__all__ = ["PackedExperts"]


@dataclass(frozen=True, eq=False)
class PackedExperts(Delta):
    """All experts' factors in one pair: A ``[r·E, in]``, B ``[out, r·E]`` (PEFT ``ParamWrapper``).

    The weight is ``[E, out, in]`` or ``[E, in, out]``. Its shape tells which, but for square experts; then
    ``input_first`` does, where the file or a sibling parameter of the module tells. A two-dimensional parameter is one
    expert, ``[out, in]``.
    """

    kind: ClassVar[str] = "lora"
    a: Array
    b: Array
    s: float
    r: int
    input_first: bool | None = None

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (self.a.shape[0] // self.r, None, None)

    @property
    def rank(self) -> int:
        return self.r

    @property
    def scale(self) -> float:
        return self.s

    def scaled(self, weight: float) -> PackedExperts:
        return replace(self, s=self.s * weight)

    def orientations(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Values of ``input_first`` that fit a weight of this shape: none, one or both."""
        packed = self.a.shape[0]
        if len(shape) == 2:
            return (False,) if (self.b.shape[0], self.a.shape[1]) == shape and packed == self.r else ()
        if len(shape) != 3 or packed != self.r * shape[0] or self.b.shape[1] != packed:
            return ()
        out_first = (self.b.shape[0], self.a.shape[1]) == shape[1:]
        in_first = (self.a.shape[1], self.b.shape[0]) == shape[1:]
        fitting = [value for value, fits in ((False, out_first), (True, in_first)) if fits]
        return tuple(value for value in fitting if self.input_first in (None, value))

    def resolve(self, shape: tuple[int, ...]) -> Delta:
        """The stacked or plain factors for a weight of ``shape``; itself where they do not fit.

        Raises:
            BindingError: The experts are square and nothing tells which axis is the input.
        """
        fitting = self.orientations(shape)
        if not fitting:
            return self
        if len(fitting) > 1:
            raise BindingError(
                f"the experts {list(shape)} are square, and nothing tells whether they are stored as [out, in] or "
                "[in, out].",
                hint="It is told by a second, oblong parameter of the same module in the adapter.",
            )
        if len(shape) == 2:
            return LowRank(self.a, self.b, self.s)
        b, a = expert_factors(self.a, self.b, shape[0], input_first=fitting[0])
        return StackedLowRank(a, b, self.s)

    def apply_slab(self, w: Array, axis: int, lo: int, hi: int, statistic: Array | None = None) -> Array:
        raise TypeError("packed experts cannot be applied before resolve()")
