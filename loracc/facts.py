"""What a fold did at each site, for the report: rank, scale, ‖ΔW‖/‖W‖, and how much of ΔW survived the rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.folded import Binding, FoldedTensor
from loracc.tensors import dims, read_rows, tile_rows

__all__ = ["SiteFacts", "site_facts"]

#: How much of each weight is read for the two norms; spread evenly over its rows.
SAMPLE_BYTES = 1 << 18


@dataclass(frozen=True)
class SiteFacts:
    """One row of the report.

    Attributes:
        name: ``module.parameter`` of the site.
        kind: The delta's kind.
        rank: The delta's rank, None where it has none.
        scale: The factor on the delta, user's weight included.
        relative_norm: ‖ΔW‖_F / ‖W‖_F; None for a weight of zeros.
        survived: 1 − ‖(W' − W) − ΔW‖_F / ‖ΔW‖_F: 1 is everything, 0 nothing; None when ΔW is zero.
        adapter: Where the delta comes from.
        way: How its key found the site.
    """

    name: str
    kind: str
    rank: int | None
    scale: float
    relative_norm: float | None
    survived: float | None
    adapter: str
    way: str

    def to_json(self) -> dict[str, Any]:
        """The row of ``--json``."""
        return asdict(self)


def site_facts(folded: Iterable[FoldedTensor]) -> list[SiteFacts]:
    """Facts about every binding. The two norms are estimated from evenly spread rows (the same ones at every run).

    Deltas that share an initializer share its norms: they are rounded together.
    """
    rows = []
    for tensor in folded:
        relative_norm, survived = _norms(tensor)
        rows += [_row(binding, relative_norm, survived) for binding in tensor.bindings]
    return rows


def _row(binding: Binding, relative_norm: float | None, survived: float | None) -> SiteFacts:
    delta = binding.delta
    return SiteFacts(
        binding.site.name, delta.kind, delta.rank, delta.scale, relative_norm, survived, binding.adapter, binding.way
    )


def _norms(tensor: FoldedTensor) -> tuple[float | None, float | None]:
    base = tensor.base
    weight = change = lost = 0.0
    for lo, hi in _sampled_rows(base):
        original = read_rows(base, lo, hi).astype(np.float64)
        exact = tensor.exact_rows(lo, hi).astype(np.float64)
        rounded = tensor.rows(lo, hi).astype(np.float64)
        weight += float(np.sum(original**2))
        change += float(np.sum((exact - original) ** 2))
        lost += float(np.sum((rounded - exact) ** 2))
    relative_norm = math.sqrt(change / weight) if weight else None
    survived = max(0.0, 1.0 - math.sqrt(lost / change)) if change else None
    return relative_norm, survived


def _sampled_rows(tensor: ir.TensorProtocol) -> list[tuple[int, int]]:
    """Up to eight evenly spread runs of rows, SAMPLE_BYTES together; all rows of a small tensor."""
    shape = dims(tensor)
    length = shape[0] if shape else 1
    run = tile_rows(shape, int(tensor.dtype.itemsize), SAMPLE_BYTES // 8)
    if run * 8 >= length:
        return [(0, length)]
    starts = np.linspace(0, length - run, 8, dtype=np.int64)
    return [(int(lo), int(lo) + run) for lo in starts]
