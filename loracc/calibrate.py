"""Fold with calibrated rounding: which neighbour each element is rounded to is chosen so that the outputs change least.

Rounding W + ΔW back to 16 bits, or to codes, is the largest error of a fold, and at inference another choice of
neighbours costs nothing: the error of a layer's outputs is the product of the rounding errors and of the inputs that it
really sees.

1. The bound weights are taken in stages, in the graph's order. The reference (the weights before their rounding, in
   float32) and the model as it is rounded so far run on the calibration inputs, up to the stage's layers
   (:mod:`loracc.second_moments`).
2. A part of what the stages before have got wrong is linear in the layer's own input, and is taken back by moving the
   weight before it is rounded (asymmetric calibration: Li et al. 2025, GPTAQ; here by half).
3. The weight is rounded with feedback (:mod:`loracc.calibrate_weight`, :mod:`loracc.calibrate_codes`), fitted on three
   quarters of the inputs. It is kept where it is clearly better than rounding to nearest on the others, which take no
   part in any fit, and where it holds what is promised of every weight (:mod:`loracc.verify_calibrated`,
   :mod:`loracc.verify_chosen_codes`).
4. What no product reads (embeddings, convolutions, norms) is rounded to nearest, as always.
5. At the end the whole model, calibrated, is compared with the whole model, rounded to nearest, on the held-out inputs.
   If it is not clearly better, everything is rounded to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.blas import one_blas_thread
from loracc.calibrate_codes import round_codes
from loracc.calibrate_weight import CalibrateOptions, clearly, round_weight
from loracc.calibrated import CalibratedTensor
from loracc.calibrated_codes import CalibratedCodes
from loracc.calibration_data import Batch
from loracc.calibration_stages import check_room, stages
from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.folded import FoldedTensor
from loracc.passes.site_inputs import site_inputs
from loracc.progress import NoProgress, Progress
from loracc.requantized import RequantizedTensor
from loracc.runners import OnnxRunner
from loracc.second_moments import Moments, collect_moments
from loracc.streaming import default_workers
from loracc.tensors import dims
from loracc.verify_graphs import in_reference
from loracc.verify_metrics import relative_l2

__all__ = ["CalibrateOptions", "Calibrated", "Calibration", "calibrate", "check_folds"]

#: A fold with its rounding chosen.
Calibrated = CalibratedTensor | CalibratedCodes


@dataclass(frozen=True)
class Calibration:
    """What came of it.

    Attributes:
        tensors: The calibrated folds by initializer; to be used while the scratch folder is there.
        nearest, calibrated: Relative error (L2) of all outputs on the held-out inputs, against the reference.
        notes: What the user should know.
    """

    tensors: Mapping[str, Calibrated] = field(default_factory=dict)
    nearest: float | None = None
    calibrated: float | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Of ``fold --json``."""
        return {"nearest": self.nearest, "calibrated": self.calibrated, "weights": len(self.tensors)}


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
        batches: See :mod:`loracc.calibration_data`.
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
    inputs = site_inputs(graph, folds)
    left = len(list(_folds(graph))) - len(inputs)
    notes = [f"{left} weights that no product reads are rounded to nearest."] if left and inputs else []
    if not inputs:
        raise InputError(
            "calibrated rounding: no weight with a delta is read by a product of a 16-bit or quantized matrix alone.",
            hint="Embeddings, convolutions and biases are rounded to nearest: leave --calibrate out.",
        )
    done: dict[str, Calibrated] = {}
    exact = _reference(graph)
    progress.begin("calibrating", sum(math.prod(dims(folds[name])) for name in inputs))
    try:
        for stage in stages(graph, inputs, options.stages):
            check_room(graph, folder, stage)
            with TemporaryDirectory(dir=folder) as scratch:
                current = _with_values(exact, done) if done else None
                sums = collect_moments(exact, current, list(dict.fromkeys(stage.values())), batches, Path(scratch))
                jobs = [(name, sums[seen].read) for name, seen in stage.items() if all(sums[seen].rows)]
                done.update(_rounded(folds, jobs, folder, options, progress))
    finally:
        progress.end()
    return _judged(graph, done, batches, notes)


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


def _reference(graph: ir.Model) -> ir.Model:
    """The graph with quantized folds unrounded; those of floats are where the reference is made of it."""
    copy = graph.clone()
    for value in copy.graph.initializers.values():
        if isinstance(value.const_value, RequantizedTensor):
            value.const_value = FoldedTensor(value.const_value.decoded, value.const_value.bindings)
    return copy


def _with_values(graph: ir.Model, done: Mapping[str, Calibrated]) -> ir.Model:
    """The graph with some weights as they were rounded, and the others exact."""
    copy = graph.clone()
    for name, tensor in done.items():
        copy.graph.initializers[name].const_value = tensor.rounded
    return copy


# -------------------------------------------------------------------------------------------------------------- weights

_Job = tuple[str, Callable[[], tuple[Moments, Moments]]]


def _rounded(
    folds: Mapping[str, FoldedTensor], jobs: Sequence[_Job], folder: Path, options: CalibrateOptions, progress: Progress
) -> dict[str, Calibrated]:
    """The weights of one stage, a worker each; one BLAS thread each, so that the bits do not depend on the workers."""

    numbers = {name: number for number, name in enumerate(folds)}

    def work(job: _Job) -> Calibrated:
        name, read = job
        path = folder / f"{numbers[name]}.rounded"
        fold = folds[name]
        if isinstance(fold, RequantizedTensor):
            tensor: Calibrated = round_codes(fold, *read(), path, options)
        else:
            tensor = round_weight(fold, *read(), path, options)
        progress.advance(math.prod(dims(tensor)), name)
        return tensor

    with one_blas_thread(), ThreadPoolExecutor(default_workers()) as pool:
        return dict(zip((name for name, _ in jobs), pool.map(work, jobs), strict=True))


def _samples(batches: Sequence[Mapping[str, Array]]) -> int:
    return sum(max((len(array) for array in batch.values() if array.ndim), default=1) for batch in batches)


# ---------------------------------------------------------------------------------------------------------------- model


def _judged(graph: ir.Model, done: dict[str, Calibrated], batches: Sequence[Batch], notes: list[str]) -> Calibration:
    """Rule 5."""
    used = {name: tensor for name, tensor in done.items() if any(gain.used for gain in tensor.gains.values())}
    held_out = [batch.inputs for batch in batches if batch.held_out] or [batch.inputs for batch in batches]
    if not used:
        return Calibration(notes=(*notes, "calibration: rounding to nearest was as good everywhere."))
    rounded = graph.clone()
    for name, tensor in _folds(graph):
        rounded.graph.initializers[name].const_value = ir.tensor(tensor.numpy(), name=name)
    reference = _outputs(_reference(graph), held_out)
    nearest = _error(_outputs(rounded, held_out), reference)
    calibrated = _error(_outputs(_with_values(rounded, used), held_out), reference)
    if calibrated >= clearly(_samples(held_out)) * nearest:
        note = "calibration: on the held-out inputs the whole model was hardly better than to nearest, and is that."
        return Calibration({}, nearest, calibrated, (*notes, note))
    return Calibration(used, nearest, calibrated, tuple(notes))


def _outputs(model: ir.Model, inputs: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    graph = in_reference(model, (), ir.DataType.FLOAT).model
    assert isinstance(graph, ir.Model)
    runner = OnnxRunner(graph)
    return [runner.run(feeds) for feeds in inputs]


def _error(outputs: Sequence[Mapping[str, Array]], reference: Sequence[Mapping[str, Array]]) -> float:
    """Relative L2 error, the largest of all outputs' (each has a scale of its own)."""
    names = [name for name, value in reference[0].items() if np.issubdtype(value.dtype, np.floating)]
    return max(relative_l2([draw[name] for draw in outputs], [draw[name] for draw in reference]) for name in names)
