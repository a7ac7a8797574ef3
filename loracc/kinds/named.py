"""Kinds that come down to a low-rank product of factors made from other tensors: the making tells them apart."""

from __future__ import annotations

from typing import ClassVar

from loracc.deltas import LowRank

__all__ = ["DeLoRA", "GraLoRA", "PVeRA", "RandLoRA", "TinyLoRA", "UniLoRA", "VBLoRA"]


class VBLoRA(LowRank):
    """ΔW = B·A with factors put together from a shared bank of vectors (Li et al. 2024, VB-LoRA, equations 2 and 3)."""

    kind: ClassVar[str] = "vblora"


class RandLoRA(LowRank):
    """ΔW = s·Σⱼ Bⱼ·Λⱼ·Aⱼ·Γⱼ over random bases side by side (Albert et al. 2025, RandLoRA, equation 3)."""

    kind: ClassVar[str] = "randlora"


class PVeRA(LowRank):
    """VeRA whose λ_d is the mean of a distribution, which is what inference uses (PEFT ``tuners/pvera``)."""

    kind: ClassVar[str] = "pvera"


class DeLoRA(LowRank):
    """ΔW = λ/r·B·Ξ·A·diag(‖W₀‖ per column), Ξ = 1/(‖aᵢ‖‖bᵢ‖) (Bini et al. 2025, DeLoRA, equation 9)."""

    kind: ClassVar[str] = "delora"


class UniLoRA(LowRank):
    """ΔW = B·A with every element of both picked from one vector (PEFT ``tuners/unilora``)."""

    kind: ClassVar[str] = "unilora"


class TinyLoRA(LowRank):
    """ΔW = B·(Σᵢ vᵢPᵢ)·A with frozen A, B and P (PEFT ``tuners/tinylora``)."""

    kind: ClassVar[str] = "tinylora"


class GraLoRA(LowRank):
    """ΔW in k×k blocks, each a product of rank r/k (Jung et al. 2025, GraLoRA, section 3), as one of rank k·r."""

    kind: ClassVar[str] = "gralora"
