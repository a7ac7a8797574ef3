"""AdaLoRA: a low-rank product with singular values, at the rank its budget left it."""

from __future__ import annotations

from typing import ClassVar

from loracc.deltas import LowRank

__all__ = ["AdaLoRA"]


class AdaLoRA(LowRank):
    """ΔW = α/(n + 10⁻⁵)·B·(A ⊙ E) (Zhang et al. 2023, equation 3; the factor is PEFT's): E is multiplied into A."""

    kind: ClassVar[str] = "adalora"
