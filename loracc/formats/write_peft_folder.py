"""PEFT's folder from low-rank pairs (:mod:`loracc.formats.write_peft` writes the files).

Lost: whether the trainer used rsLoRA, and its defaults and patterns: rank and alpha are written for each module, and
alpha/r is the scale it came to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loracc.adapter import Delta, Entry
from loracc.deltas import DoRA, LowRank
from loracc.formats.factors import Factors, refuse
from loracc.formats.write_peft import write_peft

__all__ = ["write_peft_folder"]


def write_peft_folder(factors: Sequence[Factors], folder: Path) -> tuple[str, ...]:
    """Write into a folder that exists; returns what was lost.

    Raises:
        UnsupportedError: Stacked experts, a magnitude on PEFT's other axis, or DoRA on some modules only.
    """
    refuse("PEFT's format", "these factors of stacked experts", [one for one in factors if one.stacked])
    odd = [one for one in factors if one.magnitude is not None and one.axis != int(one.embedding)]
    refuse("PEFT's format", "a DoRA magnitude on this axis", odd)
    write_peft([_entry(one) for one in factors], folder, fan_in_fan_out=any(one.fan_in_fan_out for one in factors))
    return ()


def _entry(one: Factors) -> Entry:
    delta: Delta = LowRank(one.a, one.b, one.s)
    if one.magnitude is not None:
        delta = DoRA(LowRank(one.a, one.b, one.s), one.magnitude, one.axis)
    return Entry(one.module, "weight", delta, (), False if one.embedding else None)  # write_peft's mark of an embedding
