"""What the writers of adapter formats are given: low-rank pairs by module, and nothing that no format can hold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from loracc.adapter import Adapter, Delta, Entry
from loracc.deltas import DoRA, LowRank, StackedLowRank
from loracc.dtypes import Array
from loracc.errors import UnsupportedError
from loracc.formats.embedding_names import names_embedding
from loracc.formats.mlx import MLXPair
from loracc.formats.tensors import some

__all__ = ["Factors", "alpha_of", "factors_of", "refuse"]


@dataclass(frozen=True, eq=False)
class Factors:
    """ΔW = s·B·A of one module, in PyTorch's orientation.

    Attributes:
        module: Its path in the base model.
        a: ``[r, *rest]``; of stacked experts ``[E, r, cols]``.
        b: ``[out, r]``; of stacked experts ``[E, rows, r]``.
        s: The whole factor.
        embedding: The weight is ``[num, dim]``: ``b`` has a row for each token.
        magnitude: DoRA's, over the weight's axis ``axis``.
        fan_in_fan_out: The trainer's model stores the weight as ``[in, out]``.
    """

    module: str
    a: Array
    b: Array
    s: float
    embedding: bool = False
    magnitude: Array | None = None
    axis: int = 0
    fan_in_fan_out: bool = False

    @property
    def stacked(self) -> bool:
        """Whether these are the factors of a stack of experts."""
        return self.b.ndim == 3

    @property
    def convolution(self) -> bool:
        """Whether A is a convolution's kernel."""
        return self.a.ndim > 2 and not self.stacked

    @property
    def rank(self) -> int:
        """r."""
        return int(self.b.shape[-1])


def factors_of(adapter: Adapter) -> list[Factors]:
    """The adapter's pairs, in its order.

    Raises:
        UnsupportedError: Some of it is no low-rank pair on a weight; all of that is named.
    """
    found: list[Factors] = []
    odd: list[str] = []
    for entry in adapter.entries:
        if entry.optional and not entry.keys:
            continue  # a condition on the model, and no tensor
        factors = _factors(entry, adapter.format)
        if factors is None:
            odd.append(f"{entry.name} ({_kind(entry.delta)})")
        else:
            found.append(factors)
    if odd:
        raise UnsupportedError(
            f"{adapter.path}: {len(odd)} deltas are no low-rank pairs, and no format that loracc writes holds them: "
            f"{some(odd)}.",
            hint="Where only their shapes are open (loralib, LyCORIS, stacked experts), --model MODEL settles them.",
        )
    return found


def _factors(entry: Entry, format_name: str) -> Factors | None:
    delta = entry.delta
    embedding = any(".lora_embedding_" in key for key in entry.keys)
    embedding |= format_name != "peft" and names_embedding(entry.module)
    if isinstance(delta, MLXPair):
        embedding = delta.embedding
        delta = delta.oriented(embedding=embedding)
    inner = delta.inner if isinstance(delta, DoRA) else delta
    if entry.parameter != "weight" or type(inner) not in (LowRank, StackedLowRank):
        return None
    assert isinstance(inner, LowRank | StackedLowRank)
    magnitude, axis = (delta.magnitude, delta.axis) if isinstance(delta, DoRA) else (None, 0)
    return Factors(entry.module, inner.a, inner.b, inner.s, embedding, magnitude, axis, bool(entry.fan_in_fan_out))


def _kind(delta: Delta) -> str:
    inner = delta.inner if isinstance(delta, DoRA) else delta
    return type(inner).__name__ if inner.kind in ("lora", "pending") else inner.kind


def refuse(format_name: str, what: str, factors: Iterable[Factors]) -> None:
    """Refuse the factors that a format cannot hold, if there are any.

    Raises:
        UnsupportedError: There are; they are named.
    """
    names = [one.module for one in factors]
    if names:
        raise UnsupportedError(f"{format_name} cannot hold {what}: {some(names)}.")


def alpha_of(s: float, rank: int) -> float:
    """The alpha that a reader divides by the rank to get ``s`` back: exactly, or where no float64 does, as near as any.

    Every s that came from an alpha and a rank has an exact one.

    >>> alpha_of(2.0, 8), alpha_of(16 / 3, 3), alpha_of(0.7 / 3, 3)
    (16.0, 16.0, 0.7)
    """
    near = s * rank
    candidates = (float(round(near)), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return min(candidates, key=lambda alpha: abs(alpha / rank - s))
