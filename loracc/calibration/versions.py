"""The three versions of a model that calibration runs side by side, segment by segment.

1. The *reference*: W + ΔW before its rounding, all other weights as the base has them, in float32.
2. *Nearest*: every weight as it would be written without calibration; on the held-out inputs only.
3. *Current*: the weights of the stages that are done as they were rounded, the rest as in 2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.calibrated import CalibratedTensor
from loracc.calibrated_codes import CalibratedCodes
from loracc.calibration.data import Batch
from loracc.calibration.second_moments import StageSums, unpadded
from loracc.calibration.segments import Segments, Walk, Weights
from loracc.calibration.stages import Stage
from loracc.dtypes import Array
from loracc.folded import FoldedTensor
from loracc.proof.metrics import CACHE, is_float_array
from loracc.requantized import RequantizedTensor
from loracc.tensors import dims

__all__ = ["Versions"]


class Versions:
    """The versions on their way through the stages.

    Args:
        graph: The lowered graph.
        segments: Of the same in float32, its weights exact.
        stages: A segment each.
        batches: See :mod:`loracc.calibration.data`.
        folder: For what lies between two segments.
    """

    def __init__(
        self, graph: ir.Model, segments: Segments, stages: Sequence[Stage], batches: Sequence[Batch], folder: Path
    ) -> None:
        self._graph, self._stages = graph, stages
        held_out = [batch for batch in batches if batch.held_out]
        self._reference = Walk(segments, batches, folder, "reference")
        self._nearest = Walk(segments, held_out, folder, "nearest")
        self._current = Walk(segments, batches, folder, "current")

    def sums(self, number: int) -> StageSums:
        """Of a stage; the reference is behind it afterwards."""
        stage = self._stages[number]
        sums = StageSums(stage)
        reference = self._reference.run(number, _exact, sums.taps(), leave=True)
        current = self._current.run(number, self._written({}, stage.targets), sums.taps())
        for (batch, theirs), (_, ours) in zip(reference, current, strict=True):
            sums.add(batch, theirs, ours)
        return sums

    def advance(self, number: int, done: Mapping[str, CalibratedTensor | CalibratedCodes]) -> None:
        """Go on behind the stage, its weights rounded."""
        self._nearest.advance(number, self._written({}))
        self._current.advance(number, self._written(done))

    def errors(self) -> tuple[float, float]:
        """Relative error (L2) of nearest and of current, behind the last stage, on the held-out inputs.

        The largest of all outputs' (each has a scale of its own), a decoder's cache left out; without padded positions.
        """
        end = len(self._stages)
        sums: dict[str, Array] = {}
        held_out = (found for found in self._reference.values(end) if found[0].held_out)
        current = (found for found in self._current.values(end) if found[0].held_out)
        for (batch, exact), (_, nearest), (_, ours) in zip(held_out, self._nearest.values(end), current, strict=True):
            for name, value in exact.items():
                if is_float_array(value):
                    arrays = (unpadded(values[name], batch.inputs) for values in (exact, nearest, ours))
                    sums[name] = sums.get(name, 0.0) + _squares(*arrays)
        names = [name for name in sums if not name.startswith(CACHE)] or list(sums)
        relative = [
            np.sqrt(sums[name][1:] / sums[name][0]) if sums[name][0] else np.sqrt(sums[name][1:]) for name in names
        ]
        worst = np.max(relative, axis=0)
        return float(worst[0]), float(worst[1])

    def _written(self, done: Mapping[str, CalibratedTensor | CalibratedCodes], exact: Collection[str] = ()) -> Weights:
        """Weights as they are written, except some."""
        initializers = self._graph.graph.initializers

        def weights(name: str) -> ir.TensorProtocol | None:
            value = initializers.get(name)
            if value is None or name in exact:
                return None
            tensor = done.get(name, value.const_value)
            if not isinstance(tensor, FoldedTensor):
                return None
            return _widened(tensor) if tensor.dtype.bitwidth <= 16 or isinstance(tensor, RequantizedTensor) else None

        return weights


def _exact(name: str) -> None:
    """Of the reference."""


def _widened(tensor: FoldedTensor) -> ir.TensorProtocol:
    """What is written, in float32: casting a fold would give what it is before its rounding."""

    def values() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(values, ir.DataType.FLOAT, ir.Shape(dims(tensor)), name=tensor.name)


def _squares(exact: Array, nearest: Array, ours: Array) -> Array:
    """Squares of the reference, of nearest's errors and of ours."""
    wide = exact.astype(np.float64)
    return np.array([np.vdot(a, a) for a in (wide, nearest - wide, ours - wide)])
