"""What a fold did at each site, for the report: rank, scale, ‖ΔW‖/‖W‖, and how much of ΔW survived the rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from loracc.algebra.low_rank import low_rank_norm
from loracc.blas import one_blas_thread
from loracc.calibrated import CalibratedTensor, Gain
from loracc.calibrated_codes import CalibratedCodes
from loracc.deltas import LowRank
from loracc.dtypes import Array
from loracc.folded import Binding, FoldedTensor
from loracc.requantized import RequantizedTensor
from loracc.tensors import PermutedTensor, dims, tile_rows

__all__ = ["Facts", "SiteFacts", "loss_notes", "site_facts"]

#: How much of each weight is read for its norm and its roundings', and in how many runs of rows. (Measured on 1.1B:
#: right to 2 %, for a twentieth of the fold's time.)
SAMPLE_BYTES, RUNS = 1 << 15, 2
#: The same where ΔW's norm is one of the sampled ones: its rows differ more from one another.
ALL_SAMPLE_BYTES, ALL_RUNS = 1 << 16, 4


@dataclass(frozen=True)
class SiteFacts:
    """One row of the report.

    Attributes:
        name: ``module.parameter`` of the site.
        kind: The delta's kind.
        rank: The delta's rank, None where it has none.
        scale: The factor on the delta, user's weight included.
        relative_norm: ‖ΔW‖_F / ‖W‖_F; None for a weight of zeros.
        survived: 1 − ‖(W' − W) − ΔW‖_F / ‖ΔW‖_F: 1 is everything, 0 nothing; None when ΔW is zero. Of a
            quantized weight ⟨W' − W, ΔW⟩ / ‖ΔW‖²: its rounding errors are often larger than ΔW, and what counts is how
            much of ΔW is in them.
        adapter: Where the delta comes from.
        way: How its key found the site.
        gain: What calibrated rounding did for the site; None where it is rounded to nearest from the start.
    """

    name: str
    kind: str
    rank: int | None
    scale: float
    relative_norm: float | None
    survived: float | None
    adapter: str
    way: str
    gain: Gain | None = None

    def to_json(self) -> dict[str, Any]:
        """The row of ``--json``."""
        row = asdict(self)
        if self.gain is None:
            del row["gain"]
        return row


def site_facts(folded: Iterable[FoldedTensor]) -> list[SiteFacts]:
    """Facts about every binding: see :class:`Facts`."""
    return Facts(folded).rows()


class Facts:
    """Facts about every binding. Norms are estimated from evenly spread rows (the same ones at every run); that of a
    low-rank ΔW is exact.

    Deltas that share an initializer share its norms: they are rounded together. Whoever has workers lets them do
    ``jobs``; ``rows`` does what is left.
    """

    def __init__(self, folded: Iterable[FoldedTensor]) -> None:
        self._folded = list(folded)
        self._norms: dict[int, tuple[float | None, float | None]] = {}

    def jobs(self) -> list[Callable[[], None]]:
        """One for each tensor, in any order and from any thread."""
        return [partial(self._look, index) for index in range(len(self._folded))]

    def rows(self) -> list[SiteFacts]:
        """The facts, in the order of the tensors and their bindings."""
        with one_blas_thread():
            for index in range(len(self._folded)):
                self._look(index)
        return [
            _row(binding, *self._norms[index], _gain(tensor, binding))
            for index, tensor in enumerate(self._folded)
            for binding in tensor.bindings
        ]

    def notes(self) -> list[str]:
        """What the user should know of them: see :func:`loss_notes`."""
        return loss_notes(self._folded)

    def _look(self, index: int) -> None:
        if index not in self._norms:
            self._norms[index] = _norms(self._folded[index])


#: Shares of ΔW below which a quantized site is named in a note.
LITTLE = 0.5


def loss_notes(folded: Iterable[FoldedTensor]) -> list[str]:
    """What the user should know of quantized weights whose grid is too coarse for the deltas; usually nothing."""
    rows = {
        binding.site.name: tensor.totals.survived
        for tensor in folded
        if isinstance(tensor, RequantizedTensor)
        for binding in tensor.bindings
    }
    little = {name: share for name, share in rows.items() if share is not None and share < LITTLE}
    if not little:
        return []
    shown = ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in sorted(little.items(), key=lambda i: i[1])[:3])
    more = f" and {len(little) - 3} more" if len(little) > 3 else ""
    return [
        f"less than half of ΔW survived quantization at {len(little)} of {len(rows)} quantized sites: {shown}{more}. "
        "ΔW is small beside the steps between codes: start from the original weights (--base DIR), quantize in smaller "
        "blocks or more bits, or fold into the float model and quantize the result."
    ]


def _row(binding: Binding, relative_norm: float | None, survived: float | None, gain: Gain | None) -> SiteFacts:
    name, delta = binding.site.name, binding.delta
    told = (name, delta.kind, delta.rank, delta.scale, relative_norm, survived, binding.adapter, binding.way)
    return SiteFacts(*told, gain)


def _gain(tensor: FoldedTensor, binding: Binding) -> Gain | None:
    return tensor.gains.get(binding.site.name) if isinstance(tensor, CalibratedTensor | CalibratedCodes) else None


def _norms(tensor: FoldedTensor) -> tuple[float | None, float | None]:
    if isinstance(tensor, RequantizedTensor):
        totals = tensor.totals
        return math.sqrt(totals.change / totals.weight) if totals.weight else None, totals.survived
    weight = change = lost = 0.0
    seen = 0
    norm = _low_rank_norm(tensor)
    sampled = _sampled_rows(tensor, ALL_SAMPLE_BYTES, ALL_RUNS) if norm is None else _sampled_rows(tensor)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused when the tensor is written
        for original, exact, rounded in tensor.probe(sampled):
            weight += _squares(original)
            change += _squares(exact - original) if norm is None else 0.0
            lost += _squares(rounded.astype(exact.dtype) - exact)
            seen += original.size
        if norm is not None:  # exact; rows of a low-rank ΔW differ by a third from one another
            part = seen / max(math.prod(dims(tensor)), 1)
            change = part * norm * norm
    if not math.isfinite(weight + change + lost):
        return None, None
    relative_norm = math.sqrt(change / weight) if weight else None
    survived = max(0.0, 1.0 - math.sqrt(lost / change)) if change else None
    return relative_norm, survived


def _low_rank_norm(tensor: FoldedTensor) -> float | None:
    """‖ΔW‖ where one pair of factors is all that acts, on the whole weight; None elsewhere."""
    if len(tensor.bindings) != 1:
        return None
    delta, layout = tensor.bindings[0].delta, tensor.bindings[0].site.layout
    return low_rank_norm(delta.b, delta.a, delta.s) if isinstance(delta, LowRank) and layout.whole else None


def _squares(values: Array) -> float:
    """Σ v². A row's sum in the array's own dtype is exact enough for the three digits shown."""
    rows = values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1)
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))


def _sampled_rows(tensor: FoldedTensor, sample_bytes: int = SAMPLE_BYTES, runs: int = RUNS) -> list[tuple[int, int]]:
    """Evenly spread runs of rows, ``sample_bytes`` together; all rows of a small tensor.

    A weight that is turned while it is read gives one run only: each costs a look at every page of it.
    """
    shape = dims(tensor)
    length = shape[0] if shape else 1
    run = tile_rows(shape, int(tensor.dtype.itemsize), sample_bytes // runs)
    if run * runs >= length:
        return [(0, length)]
    if isinstance(tensor.base, PermutedTensor):
        first = length // 2 // 8 * 8
        return [(first, min(first + 8, length))]
    starts = ((2 * i + 1) * (length - run) // (2 * runs) for i in range(runs))
    return [(lo, lo + run) for lo in starts]
