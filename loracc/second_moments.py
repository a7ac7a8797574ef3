"""What calibrated rounding needs to know of a layer: sums over the calibration data.

With x̃ the input that a layer has in the model as it is rounded so far, and δ = s − s̃ the difference between what its
product ends up in (:mod:`loracc.passes.site_targets`) in the reference and there, the layer's own weight exact in both,

    C = Σ x̃·x̃ᵀ        K = Σ x̃·δᵀ        d = Σ ‖δ‖²

tell the squared error that any Q in place of W leaves, Σ‖(Q − W)·x̃ − δ‖². Where nothing upstream is rounded yet, K and
d are 0. Padded positions are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from loracc.calibration_data import Batch
from loracc.calibration_stages import Stage
from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.passes.site_inputs import SiteInput
from loracc.sites import Layout

__all__ = ["Moments", "StageSums", "unpadded"]

_ROWS = 2048


@dataclass(frozen=True)
class Moments:
    """The sums for a weight.

    Attributes:
        own: C, ``[in, in]``, float64.
        cross: K, ``[in, out]``, float64; None stands for 0.
        drift: d.
        rows: How many rows they are over.
    """

    own: Array
    cross: Array | None
    drift: float
    rows: int

    def of(self, layout: Layout) -> Moments:
        """For one site of the weight; d stays the whole weight's, which tells nothing between two roundings."""
        return self if self.cross is None else replace(self, cross=self.cross[:, layout.start : layout.stop])

    def output_error(self, rounded: Array, exact: Array) -> float:
        """Σ‖(Q − W)·x̃ − δ‖² of ``rounded`` Q and ``exact`` W, both ``[out, in]``."""
        total = self.drift
        for lo in range(0, len(exact), _ROWS):
            error = rounded[lo : lo + _ROWS].astype(np.float64) - exact[lo : lo + _ROWS]
            total += float(np.vdot(error @ self.own, error))
            if self.cross is not None:
                total -= 2 * float(np.vdot(error, self.cross[:, lo : lo + _ROWS].T))
        return max(total, 0.0)

    def output_power(self, exact: Array) -> float:
        """Σ‖W·x̃‖²."""
        rows = (exact[lo : lo + _ROWS].astype(np.float64) for lo in range(0, len(exact), _ROWS))
        return sum(float(np.vdot(w @ self.own, w)) for w in rows)


class StageSums:
    """The sums of one stage, of the batches to fit and of those that are held out.

    Args:
        stage: Whose; its weights share C.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._own: list[Array | None] = [None, None]
        self._cross: dict[str, list[Array | None]] = {name: [None, None] for name in stage.targets}
        self._drift: dict[str, list[float]] = {name: [0.0, 0.0] for name in stage.targets}
        self.rows = [0, 0]

    def targets(self) -> list[str]:
        """What :meth:`add` needs of the reference."""
        return list(dict.fromkeys(target.value for target in self._stage.targets.values() if target is not None))

    def taps(self) -> list[str]:
        """What it needs of the model as it is rounded so far."""
        return list(dict.fromkeys([self._stage.seen.value, *self.targets()]))

    def add(self, batch: Batch, reference: Mapping[str, Array], current: Mapping[str, Array]) -> None:
        """Add a batch's values, by name."""
        part = int(batch.held_out)
        x = _rows(current, self._stage.seen, batch.inputs)
        self.rows[part] += len(x)
        self._own[part] = _sum(self._own[part], x.T @ x)
        for name, target in self._stage.targets.items():
            if target is not None:
                drift = _rows(reference, target, batch.inputs) - _rows(current, target, batch.inputs)
                self._cross[name][part] = _sum(self._cross[name][part], x.T @ drift)
                self._drift[name][part] += float(np.vdot(drift, drift))

    def read(self, name: str) -> tuple[Moments, Moments]:
        """(to fit, held out) of an initializer."""
        fit, held_out = (
            Moments(own, cross, drift, rows)
            for own, cross, drift, rows in zip(self._own, self._cross[name], self._drift[name], self.rows, strict=True)
            if own is not None
        )
        return fit, held_out


def _sum(total: Array | None, added: Array) -> Array:
    if total is None:
        return added.astype(np.float64)
    total += added
    return total


def _rows(values: Mapping[str, Array], seen: SiteInput, inputs: Mapping[str, Array]) -> Array:
    """``[n, features]`` in float32, without padded positions."""
    rows = unpadded(np.moveaxis(values[seen.value], seen.axis, -1), inputs).astype(np.float32)
    rows = rows.reshape(-1, rows.shape[-1])
    if not np.isfinite(rows).all():
        raise InputError(f"{seen.value}: the reference gives inf or NaN on the calibration inputs.")
    return rows


def unpadded(values: Array, inputs: Mapping[str, Array]) -> Array:
    """Values without padded positions, where their first axes are those of the mask, or those made one."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return values
    if values.shape[:2] == mask.shape:
        return values[mask.astype(bool)]
    if values.ndim == 2 and len(values) == mask.size:
        return values[mask.astype(bool).ravel()]
    return values
