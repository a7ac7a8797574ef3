"""What calibrated rounding needs to know of a layer: sums over the calibration data.

With x the input that a layer has in the reference, x̃ the one it has in the model as it is rounded so far, and δ the
difference that is still to be made good behind its product, the layer's own weight exact in both,

    C = Σ x̃·x̃ᵀ        K = Σ x̃·δᵀ        d = Σ ‖δ‖²

tell the squared error that any Q in place of W leaves, Σ‖(Q − W)·x̃ − δ‖². For a layer that writes to a residual stream
s (:mod:`loracc.passes.site_targets`), δ is the difference of s in both. For any other it is W·(x − x̃), and what is
summed is x̃·(x − x̃)ᵀ and (x − x̃)·(x − x̃)ᵀ, once for all weights that share the input. Padded positions are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from loracc.calibration.data import Batch
from loracc.calibration.stages import Stage
from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.passes.site_inputs import SiteInput
from loracc.sites import Layout

__all__ = ["Moments", "StageSums", "Sums", "unpadded"]

_ROWS = 2048
#: Squared relative difference up to which two versions of a value are of the same inputs.
_ALIKE = 0.25


@dataclass(frozen=True)
class Moments:
    """The sums for a weight ``[out, in]``, or for a part of its rows.

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

    def output_error(self, rounded: Array, exact: Array) -> float:
        """Σ‖(Q − W)·x̃ − δ‖² of ``rounded`` Q and ``exact`` W, both ``[out, in]``; products in ``exact``'s dtype."""
        total, own = self.drift, self.own.astype(exact.dtype)
        for lo in range(0, len(exact), _ROWS):
            error = (rounded[lo : lo + _ROWS] - exact[lo : lo + _ROWS]).astype(exact.dtype)
            total += float(np.vdot(error @ own, error))
            if self.cross is not None:
                total -= 2 * float(np.vdot(error, self.cross[:, lo : lo + _ROWS].T))
        return max(total, 0.0)

    def output_power(self, exact: Array) -> float:
        """Σ‖W·x̃‖²."""
        return _quadratic(exact, self.own.astype(exact.dtype))


def _quadratic(matrix: Array, system: Array) -> float:
    """tr(M·S·Mᵀ)."""
    rows = (matrix[lo : lo + _ROWS] for lo in range(0, len(matrix), _ROWS))
    return sum(float(np.vdot(part @ system, part)) for part in rows)


@dataclass(frozen=True)
class Sums:
    """The sums for an initializer, before it is known which weight is in it.

    Attributes:
        own, rows: As in :class:`Moments`.
        target: K of the whole initializer and d, where it writes to a residual stream.
        inputs: Σ x̃·(x − x̃)ᵀ and Σ (x − x̃)·(x − x̃)ᵀ, ``[in, in]``; None where both inputs are the same.
    """

    own: Array
    rows: int
    target: tuple[Array, float] | None = None
    inputs: tuple[Array, Array] | None = None

    def of(self, layout: Layout, exact: Array) -> Moments:
        """For one site, W + ΔW of which is ``exact``; d stays the whole weight's, the same for any rounding."""
        if self.target is not None:
            return Moments(self.own, self.target[0][:, layout.start : layout.stop], self.target[1], self.rows)
        if self.inputs is None:
            return Moments(self.own, None, 0.0, self.rows)
        cross, spread = (values.astype(exact.dtype) for values in self.inputs)
        drift = sum(
            float(np.vdot(w @ spread, w)) for w in (exact[lo : lo + _ROWS] for lo in range(0, len(exact), _ROWS))
        )
        return Moments(self.own, cross @ exact.T, drift, self.rows)


class StageSums:
    """The sums of one stage, of the batches to fit and of those that are held out.

    Args:
        stage: Whose; its weights share C.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._targets = {name: target for name, target in stage.targets.items() if target is not None}
        self._own, self._inputs, self._spread = _Pair(), _Pair(), _Pair()
        self._cross = {name: _Pair() for name in self._targets}
        self._drift = {name: [0.0, 0.0] for name in self._targets}
        self.rows = [0, 0]

    def taps(self) -> list[str]:
        """What :meth:`add` needs of both models."""
        return list(dict.fromkeys([self._stage.seen.value, *(target.value for target in self._targets.values())]))

    def add(self, batch: Batch, reference: Mapping[str, Array], current: Mapping[str, Array]) -> None:
        """Add a batch's values, by name."""
        part = int(batch.held_out)
        x = _rows(current, self._stage.seen, batch.inputs)
        self.rows[part] += len(x)
        self._own.add(part, x.T @ x)
        if len(self._targets) < len(self._stage.targets):
            drift = _difference(reference, current, self._stage.seen, batch.inputs)
            if drift is not None:
                self._inputs.add(part, x.T @ drift)
                self._spread.add(part, drift.T @ drift)
        for name, target in self._targets.items():
            drift = _difference(reference, current, target, batch.inputs)
            if drift is not None:
                self._cross[name].add(part, x.T @ drift)
                self._drift[name][part] += float(np.vdot(drift, drift))

    def read(self, name: str) -> tuple[Sums, Sums]:
        """(to fit, held out) of an initializer; both must have rows."""
        fit, held_out = (self._part(name, part) for part in (0, 1))
        return fit, held_out

    def _part(self, name: str, part: int) -> Sums:
        own = self._own.parts[part]
        assert own is not None
        if name in self._targets:
            cross = self._cross[name].parts[part]
            return Sums(own, self.rows[part], target=None if cross is None else (cross, self._drift[name][part]))
        inputs, spread = self._inputs.parts[part], self._spread.parts[part]
        both = None if inputs is None or spread is None else (inputs, spread)
        return Sums(own, self.rows[part], inputs=both)


class _Pair:
    """Sums of what is fitted and of what is held out; None where nothing was added."""

    def __init__(self) -> None:
        self.parts: list[Array | None] = [None, None]

    def add(self, part: int, values: Array) -> None:
        total = self.parts[part]
        if total is None:
            self.parts[part] = values.astype(np.float64)
        else:
            total += values


def _difference(
    reference: Mapping[str, Array], current: Mapping[str, Array], seen: SiteInput, inputs: Mapping[str, Array]
) -> Array | None:
    """Reference less current; None where there is none, or where the rows are not the same ones.

    A mixture of experts may send a token to another expert once its router's input is rounded.
    """
    theirs, ours = _rows(reference, seen, inputs), _rows(current, seen, inputs)
    if theirs.shape != ours.shape:
        return None
    found = theirs - ours
    return found if 0.0 < float(np.vdot(found, found)) <= _ALIKE * float(np.vdot(theirs, theirs)) else None


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
