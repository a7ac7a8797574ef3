"""The scale of a file that does not say its own: the user's answer, or the question."""

from __future__ import annotations

from pathlib import Path

from loracc.algebra.low_rank import lora_scale
from loracc.errors import InputError
from loracc.formats.adapter_options import AdapterOptions

__all__ = ["require_scale", "told_scale"]


def require_scale(path: Path, options: AdapterOptions, why: str) -> None:
    """Refuse a file without a scale when the user did not give one.

    Args:
        path: For the message.
        options: The user's answers.
        why: What the format is, as the start of "... does not say the scale".

    Raises:
        InputError: Neither ``--alpha`` nor ``--scale`` was given, and the adapter is to be used.
    """
    if options.alpha is None and options.scale is None and not options.describe:
        raise InputError(
            f"{path}: {why} does not say the scale.",
            hint="Give --alpha (lora_alpha; the scale is alpha/r) or --scale (the whole factor).",
        )


def told_scale(options: AdapterOptions, rank: int) -> float:
    """s by what the user said; 1 where nothing was said and the adapter is only looked at.

    >>> told_scale(AdapterOptions(alpha=16), 8), told_scale(AdapterOptions(scale=0.5), 8)
    (2.0, 0.5)
    """
    if options.scale is not None:
        return options.scale
    return lora_scale(options.alpha, rank) if options.alpha is not None else 1.0
