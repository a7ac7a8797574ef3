"""Whether there is room to calibrate a model: memory and disk, asked before anything runs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from loracc.calibration.segments import IN_MEMORY, Segments
from loracc.calibration.stages import Stage
from loracc.errors import InputError
from loracc.folded import FoldedTensor
from loracc.proof.memory import available_memory, weights_in
from loracc.streaming import default_workers
from loracc.tensors import dims

__all__ = ["check_room"]

_DOUBLE = 8
#: Copies of a segment's weights: the reference's and the current ones, as they are given and as the runtime packs them.
_WEIGHTS = 4
#: Matrices ``[in, in]`` and ``[in, out]`` for a weight that is rounded, at most, as if all were in float64.
_SQUARES, _COPIES = 6, 6
#: The versions that are run, each holding what lies between two segments.
_WALKS = 3
#: Bytes of a chosen value: codes are kept as int32, and other layouts of the same weight beside it.
_VALUE = 4


def check_room(segments: Segments, stages: Sequence[Stage], folds: Mapping[str, FoldedTensor], folder: Path) -> None:
    """Rather than be ended by the system in the middle.

    Args:
        segments: The model's, one for each stage.
        stages: What is rounded together.
        folds: The weights by initializer.
        folder: Where the chosen values will lie.

    Raises:
        InputError: Not enough memory, or not enough disk in ``folder``.
    """
    disk = sum(_VALUE * math.prod(dims(folds[name])) for stage in stages for name in stage.targets)
    free = shutil.disk_usage(folder).free
    if disk > free:
        raise InputError(
            f"calibrated rounding chooses {disk / 1e9:.1f} GB of values, and {free / 1e9:.1f} GB are free in {folder}.",
            hint="Name a folder on a larger disk in the environment variable TMPDIR.",
        )
    memory, had = _largest_segment(segments, stages) + _largest_stage(stages, folds), available_memory()
    if had is not None and memory > had:
        raise InputError(
            f"calibrated rounding needs {memory / 1e9:.1f} GB of memory for this model's largest layer, and "
            f"{had / 1e9:.1f} GB are free.",
            hint="Use a machine with more memory, or round to nearest: leave --calibrate out.",
        )


def _largest_segment(segments: Segments, stages: Sequence[Stage]) -> int:
    models = (segments.extracted(number, (), leave=True) for number in range(len(stages)))
    weights = max((weights_in(model, ir.DataType.FLOAT) for model in models if model is not None), default=0)
    return _WEIGHTS * weights + _WALKS * IN_MEMORY


def _largest_stage(stages: Sequence[Stage], folds: Mapping[str, FoldedTensor]) -> int:
    return max((_bytes([folds[name] for name in stage.targets]) for stage in stages), default=0)


def _bytes(folds: Sequence[FoldedTensor]) -> int:
    """Of the sums of a stage, and of as many weights as are rounded at once."""
    width = max(fold.bindings[0].site.layout.canonical_shape(dims(fold))[1] for fold in folds)
    sizes = sorted((math.prod(dims(fold)) for fold in folds), reverse=True)
    sums = 2 * (3 * width * width + sum(sizes))
    at_once = sizes[: default_workers()]
    return _DOUBLE * (sums + _SQUARES * width * width * len(at_once) + _COPIES * sum(at_once))
