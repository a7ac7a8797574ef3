"""What calibrated rounding needs to know of a layer's inputs: their second moments, summed over the calibration data.

With x the input that a layer has in the reference and x̃ the one it has in the model as it is rounded so far,

    C = Σ x̃·x̃ᵀ        K = Σ x̃·(x − x̃)ᵀ        D = Σ (x − x̃)·(x − x̃)ᵀ

tell the squared error of its outputs, Σ‖Q·x̃ − W·x‖², for any Q. Where nothing upstream is rounded yet, K and D are 0.
Padded positions are left out. The sums lie in a scratch file each, so that memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from loracc.calibration_data import Batch
from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.passes.site_inputs import SiteInput
from loracc.runners import OnnxRunner
from loracc.verify_graphs import in_reference, with_outputs

__all__ = ["Moments", "collect_moments"]


@dataclass(frozen=True)
class Moments:
    """The three sums, each ``[in, in]`` in float64, and how many rows they are over."""

    own: Array
    cross: Array
    drift: Array
    rows: int

    def output_error(self, rounded: Array, exact: Array) -> float:
        """Σ‖Q·x̃ − W·x‖² of ``rounded`` Q and ``exact`` W, both ``[out, in]``."""
        total = 0.0
        for lo in range(0, len(exact), _ROWS):
            w = exact[lo : lo + _ROWS].astype(np.float64)
            e = rounded[lo : lo + _ROWS].astype(np.float64) - w
            total += float(np.vdot(e @ self.own, e) - 2 * np.vdot(e @ self.cross, w) + np.vdot(w @ self.drift, w))
        return max(total, 0.0)

    def output_power(self, exact: Array) -> float:
        """Σ‖W·x̃‖²."""
        rows = (exact[lo : lo + _ROWS].astype(np.float64) for lo in range(0, len(exact), _ROWS))
        return sum(float(np.vdot(w @ self.own, w)) for w in rows)


_ROWS = 2048


class _Sums:
    """The moments of one value, fitted and held out, in a scratch file."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self.rows = path, 0, [0, 0]

    def add(self, current: Array, reference: Array | None, *, held_out: bool) -> None:
        """Add rows ``[n, in]``; ``reference`` None stands for the same rows."""
        self._size = current.shape[1]
        total = self._open("r+" if self._path.exists() else "w+")[int(held_out)]
        total[0] += current.T @ current
        if reference is not None:
            drift = reference - current
            total[1] += current.T @ drift
            total[2] += drift.T @ drift
        self.rows[int(held_out)] += len(current)

    def read(self) -> tuple[Moments, Moments]:
        """(to fit, held out)."""
        total = np.asarray(self._open("r"))
        fit, held_out = (Moments(part[0], part[1], part[2], rows) for part, rows in zip(total, self.rows, strict=True))
        return fit, held_out

    def _open(self, mode: str) -> np.memmap[tuple[int, ...], np.dtype[np.float64]]:
        return np.memmap(self._path, np.float64, mode, shape=(2, 3, self._size, self._size))  # type: ignore[call-overload]


def collect_moments(
    reference: ir.Model, current: ir.Model | None, inputs: Sequence[SiteInput], batches: Sequence[Batch], folder: Path
) -> dict[SiteInput, _Sums]:
    """Run both models on the batches, up to the values that are asked for.

    Args:
        reference: The graph with its exact weights.
        current: The same graph with the weights that are rounded so far; None when none is.
        inputs: Whose moments are wanted.
        batches: See :mod:`loracc.calibration_data`.
        folder: An empty folder for the sums.

    Raises:
        RunError: The model does not run on the batches.
        InputError: It gives numbers that are not finite.
        MissingExtraError: onnxruntime is not installed.
    """
    names = list(dict.fromkeys(seen.value for seen in inputs))
    runners = [_runner(model, names) for model in (reference, current) if model is not None]
    sums = {seen: _Sums(folder / f"{number}.f64") for number, seen in enumerate(inputs)}
    for batch in batches:
        found = [{**batch.inputs, **(runner.run(batch.inputs) if runner else {})} for runner in runners]
        for seen, total in sums.items():
            exact, *rounded = (_rows(values[seen.value], seen, batch.inputs) for values in found)
            total.add(rounded[0] if rounded else exact, exact if rounded else None, held_out=batch.held_out)
    return sums


def _runner(model: ir.Model, names: Sequence[str]) -> OnnxRunner | None:
    """The model in float32 with the named values as its only outputs, and nothing that they do not need.

    None where all of them are fed: the runtime does not load a graph without nodes.
    """
    graph = in_reference(model, (), ir.DataType.FLOAT).model
    assert isinstance(graph, ir.Model)
    fed = {value.name for value in graph.graph.inputs}
    graph.graph.outputs.clear()
    with_outputs(graph, [name for name in names if name not in fed])
    RemoveUnusedNodesPass()(graph)
    return OnnxRunner(graph) if graph.graph.outputs else None


def _rows(values: Array, seen: SiteInput, inputs: Mapping[str, Array]) -> Array:
    """``[n, in]`` in float64, without padded positions where the value's other axes are the mask's."""
    turned = np.moveaxis(values, seen.axis, -1)
    rows = turned.reshape(-1, turned.shape[-1]).astype(np.float64)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and (turned.shape[:-1] == mask.shape or len(rows) == mask.size):
        rows = rows[mask.astype(bool).ravel()]
    if not np.isfinite(rows).all():
        raise InputError(f"{seen.value}: the reference gives inf or NaN on the calibration inputs.")
    return rows
