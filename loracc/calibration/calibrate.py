"""Fold with calibrated rounding: which neighbour each element is rounded to is chosen so that the outputs change least.

Rounding W + ΔW back to 16 bits, or to codes, is the largest error of a fold, and at inference another choice of
neighbours costs nothing: the error of a layer's outputs is the product of the rounding errors and of the inputs that it
really sees.

1. The bound weights are taken in the graph's order. The reference (the weights before their rounding, in float32) and
   the model as it is rounded so far run on the calibration inputs, layer after layer
   (:mod:`loracc.calibration.versions`, :mod:`loracc.calibration.second_moments`).
2. What the layers before have got wrong, as far as it is linear in the layer's own input, is taken back by moving the
   weight before it is rounded (asymmetric calibration: Li et al. 2025, GPTAQ); of a layer that writes to a residual
   stream, also what lies in that stream.
3. The weight is rounded with feedback (:mod:`loracc.calibration.weight`, :mod:`loracc.calibration.codes`), fitted on
   three quarters of the inputs. It is kept where it is clearly better than rounding to nearest on the others, which
   take no part in any fit, and where it holds what is promised of every weight (:mod:`loracc.proof.calibrated`,
   :mod:`loracc.proof.chosen_codes`).
4. What no product reads (embeddings, convolutions, norms) is rounded to nearest, as always.
5. At the end the whole model, calibrated, is compared with the whole model, rounded to nearest, on the held-out inputs.
   If it is not clearly better, everything is rounded to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from loracc.blas import one_blas_thread
from loracc.calibrated import CalibratedTensor
from loracc.calibrated_codes import CalibratedCodes
from loracc.calibration.codes import round_codes
from loracc.calibration.data import Batch
from loracc.calibration.room import check_room
from loracc.calibration.second_moments import StageSums
from loracc.calibration.segments import Segments
from loracc.calibration.stages import stages
from loracc.calibration.versions import Versions
from loracc.calibration.weight import CalibrateOptions, clearly, round_weight
from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.folded import FoldedTensor
from loracc.passes.site_inputs import site_inputs
from loracc.progress import NoProgress, Progress
from loracc.proof.graphs import in_reference
from loracc.requantized import RequantizedTensor
from loracc.streaming import default_workers
from loracc.tensors import dims

__all__ = ["CalibrateOptions", "Calibrated", "Calibration", "calibrate", "check_folds"]

#: A fold with its rounding chosen.
Calibrated = CalibratedTensor | CalibratedCodes


@dataclass(frozen=True)
class Calibration:
    """What came of it.

    Attributes:
        tensors: The folds by initializer, those that gained nothing with nearest's values; to be used while the scratch
            folder is there.
        nearest, calibrated: Relative error (L2) of all outputs on the held-out inputs, against the reference.
        notes: What the user should know.
        inputs: Digest of what it was found on.
    """

    tensors: Mapping[str, Calibrated] = field(default_factory=dict)
    nearest: float | None = None
    calibrated: float | None = None
    notes: tuple[str, ...] = ()
    inputs: str = ""

    def to_json(self) -> dict[str, Any]:
        """Of ``fold --json``."""
        used = sum(any(gain.used for gain in tensor.gains.values()) for tensor in self.tensors.values())
        return {"nearest": self.nearest, "calibrated": self.calibrated, "weights": used}


def calibrate(
    graph: ir.Model,
    batches: Sequence[Batch],
    folder: Path,
    options: CalibrateOptions | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Choose the rounding of every folded weight that a product reads.

    Args:
        graph: A lowered graph: its folds are :class:`loracc.folded.FoldedTensor`. It stays as it is.
        batches: See :mod:`loracc.calibration.data`.
        folder: An empty folder for the values; the tensors read them there.
        options: See :class:`CalibrateOptions`.
        progress: Told of the elements that are rounded.

    Raises:
        RunError, InputError: The model does not run on the batches, gives numbers that are not finite, or has nothing
            to choose: see :func:`check_folds`.
        NumericsError: A rounded weight is not finite.
        MissingExtraError: onnxruntime is not installed.
    """
    options, progress = options or CalibrateOptions(), progress or NoProgress()
    check_folds(graph)
    folds = {name: tensor for name, tensor in _folds(graph) if _can_choose(tensor)}
    reference = _in_float(graph)
    inputs = site_inputs(reference, folds)
    paths = {name: folder / f"{number}.rounded" for number, name in enumerate(folds)}
    left = len(list(_folds(graph))) - len(inputs)
    notes = [f"{left} weights that no product reads are rounded to nearest."] if left and inputs else []
    if not inputs:
        raise InputError(
            "calibrated rounding: no weight with a delta is read by a product of a 16-bit or quantized matrix alone.",
            hint="Embeddings, convolutions and biases are rounded to nearest: leave --calibrate out.",
        )
    found = stages(reference, inputs)
    done: dict[str, Calibrated] = {}
    progress.begin("calibrating", sum(math.prod(dims(folds[name])) for name in inputs))
    try:
        with TemporaryDirectory(dir=folder) as scratch:
            segments = Segments(reference, [stage.end for stage in found])
            check_room(segments, found, folds, folder)
            versions = Versions(graph, segments, found, batches, Path(scratch))
            for number, stage in enumerate(found):
                sums = versions.sums(number)
                names = stage.targets if all(sums.rows) else ()
                done.update(_rounded({name: folds[name] for name in names}, sums, paths, options, progress))
                versions.advance(number, done)
            return _judged(versions, done, batches, notes)
    finally:
        progress.end()


def check_folds(graph: ir.Model) -> None:
    """Refuse a lowered model whose rounding cannot be chosen.

    Raises:
        InputError: All folded weights are written in floats of 32 bits or more.
    """
    folds = dict(_folds(graph))
    coded = any(isinstance(tensor, RequantizedTensor) for tensor in folds.values())
    if folds and not coded and all(tensor.dtype.bitwidth > 16 for tensor in folds.values()):
        kind = next(iter(folds.values())).dtype.name
        raise InputError(
            f"calibrated rounding: the output's weights are {kind}, which loses nothing that could be won back.",
            hint="Write 16-bit weights with --dtype bf16 or fp16, or leave --calibrate out.",
        )


def _folds(graph: ir.Model) -> Iterator[tuple[str, FoldedTensor]]:
    for name, value in graph.graph.initializers.items():
        if isinstance(value.const_value, FoldedTensor) and value.const_value.bindings:
            yield name, value.const_value


def _can_choose(tensor: FoldedTensor) -> bool:
    """A matrix that is rounded to 16 bits or to codes; in float32 there is nothing to win."""
    coded = isinstance(tensor, RequantizedTensor) and tensor.leader is None
    return len(dims(tensor)) == 2 and (coded or tensor.dtype.bitwidth <= 16)


def _in_float(graph: ir.Model) -> ir.Model:
    """The reference: folds of floats are unrounded when they are retyped, those of codes here."""
    copy = graph.clone()
    for value in copy.graph.initializers.values():
        if isinstance(value.const_value, RequantizedTensor):
            value.const_value = FoldedTensor(value.const_value.decoded, value.const_value.bindings)
    reference = in_reference(copy, (), ir.DataType.FLOAT).model
    assert isinstance(reference, ir.Model)
    return reference


def _rounded(
    folds: Mapping[str, FoldedTensor],
    sums: StageSums,
    paths: Mapping[str, Path],
    options: CalibrateOptions,
    progress: Progress,
) -> dict[str, Calibrated]:
    """The weights of one stage, a worker each; one BLAS thread each, so that the bits do not depend on the workers."""

    def work(name: str) -> Calibrated:
        fold = folds[name]
        if isinstance(fold, RequantizedTensor):
            tensor: Calibrated = round_codes(fold, *sums.read(name), paths[name], options)
        else:
            tensor = round_weight(fold, *sums.read(name), paths[name], options)
        progress.advance(math.prod(dims(tensor)), name)
        return tensor

    with one_blas_thread(), ThreadPoolExecutor(default_workers()) as pool:
        return dict(zip(folds, pool.map(work, folds), strict=True))


def _judged(versions: Versions, done: dict[str, Calibrated], batches: Sequence[Batch], notes: list[str]) -> Calibration:
    """Rule 5."""
    if not any(gain.used for tensor in done.values() for gain in tensor.gains.values()):
        return Calibration(notes=(*notes, "calibration: rounding to nearest was as good everywhere."))
    nearest, calibrated = versions.errors()
    if calibrated >= clearly(_samples([batch.inputs for batch in batches if batch.held_out])) * nearest:
        note = "calibration: on the held-out inputs the whole model was hardly better than to nearest, and is that."
        return Calibration({}, nearest, calibrated, (*notes, note))
    return Calibration(done, nearest, calibrated, tuple(notes))


def _samples(batches: Sequence[Mapping[str, Array]]) -> int:
    return sum(max((len(array) for array in batch.values() if array.ndim), default=1) for batch in batches)
