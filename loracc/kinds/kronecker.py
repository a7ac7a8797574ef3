"""LoKr: ΔW is a Kronecker product of a small matrix and a (possibly factored) block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loracc.algebra.products import kronecker, tucker
from loracc.dtypes import Array
from loracc.kinds.base import Scaled

__all__ = ["LoKr"]


@dataclass(frozen=True, eq=False)
class LoKr(Scaled):
    """ΔW = s·W₁ ⊗ W₂, reshaped to the weight.

    ``w1`` is one array ``[a, c]`` or the factors ``([a, r], [r, c])``; ``w2`` is one array ``[b, d, *k]``, the factors
    ``([b, r], [r, d, *k])`` with d and k merged or not, or Tucker's ``(T [r, r, *k], [r, b], [r, d])``.

    W₁ acts on W₂'s first two axes. ``last_axes`` is PEFT's Conv1d with a full W₂ of three axes: there ``torch.kron``
    aligns W₁ with the last two, and PEFT reshapes what comes out.
    """

    kind: ClassVar[str] = "lokr"
    w1: tuple[Array, ...]
    w2: tuple[Array, ...]
    target: tuple[int, ...]
    last_axes: bool = False

    @property
    def shape(self) -> tuple[int | None, ...]:
        return self.target

    @property
    def rank(self) -> int | None:
        """The rank of the factored side; None when both are full."""
        if len(self.w2) > 1:
            return int(self.w2[0].shape[0] if len(self.w2) == 3 else self.w2[1].shape[0])
        return int(self.w1[1].shape[0]) if len(self.w1) > 1 else None

    def materialize(self, dtype: np.dtype[np.generic]) -> Array:
        one = [factor.astype(dtype) for factor in self.w1]
        two = [factor.astype(dtype) for factor in self.w2]
        w1 = one[0] if len(one) == 1 else one[0] @ one[1]
        w2 = two[0] if len(two) == 1 else _product(*two) if len(two) == 2 else tucker(*two)
        if not self.last_axes:
            w1 = w1.reshape(*w1.shape, *[1] * (w2.ndim - 2))
        return kronecker(w1, w2, self.s).reshape(self.target)

    def arrays(self) -> dict[str, Array]:
        one, two = (("w1",), ("w1_a", "w1_b")), (("w2",), ("w2_a", "w2_b"), ("t2", "w2_a", "w2_b"))
        names = (*one[len(self.w1) - 1], *two[len(self.w2) - 1])
        return dict(zip(names, (*self.w1, *self.w2), strict=True))


def _product(a: Array, b: Array) -> Array:
    """``a`` ``[n, r]`` times ``b`` ``[r, *rest]``."""
    return (a @ b.reshape(b.shape[0], -1)).reshape(a.shape[0], *b.shape[1:])
