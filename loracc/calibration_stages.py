"""In how many stages a model is calibrated, and whether there is room for one.

Each stage runs the model twice, up to the stage's layers, and keeps six squares of float64 for every input of a layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.errors import InputError
from loracc.folded import FoldedTensor
from loracc.passes.site_inputs import SiteInput
from loracc.tensors import dims
from loracc.verify_memory import available_memory, weights_in

__all__ = ["check_room", "stages"]

#: Bytes of weights that are run in one stage after the other; a model twice as large has half as many stages.
_STAGE_BYTES = 3 << 30
#: Each stage runs the model twice.
_STAGES = 6
#: Bytes of sums in one stage, six squares in float64 for every layer's input.
_SCRATCH_BYTES, _SQUARES = 8 << 30, 6


def stages(graph: ir.Model, inputs: Mapping[str, SiteInput], most: int | None) -> Iterator[dict[str, SiteInput]]:
    """The initializers of each stage, in the graph's order; those that share an input share a stage.

    Args:
        graph: The lowered graph.
        inputs: What the initializers are multiplied with, in the graph's order.
        most: At most so many stages; None is six, fewer for large models and more where their sums are large.
    """
    distinct = list(dict.fromkeys(inputs.values()))
    affordable = min(_STAGES, int(_STAGE_BYTES // max(weights_in(graph, ir.DataType.FLOAT), 1)))
    needed = -(-_scratch_bytes(graph, inputs) // _SCRATCH_BYTES)
    count = min(len(distinct), max(affordable if most is None else most, needed, 1))
    for part in np.array_split(np.arange(len(distinct)), count):
        chosen = {distinct[i] for i in part}
        yield {name: seen for name, seen in inputs.items() if seen in chosen}


def _scratch_bytes(graph: ir.Model, inputs: Mapping[str, SiteInput]) -> int:
    """Of the sums for these initializers; those that share an input share them."""
    tensors = {seen: graph.graph.initializers[name].const_value for name, seen in inputs.items()}
    widths = [_width(tensor) for tensor in tensors.values() if isinstance(tensor, FoldedTensor)]
    return sum(_SQUARES * width * width * 8 for width in widths)


def _width(tensor: FoldedTensor) -> int:
    return tensor.bindings[0].site.layout.canonical_shape(dims(tensor))[1]


def check_room(graph: ir.Model, folder: Path, stage: Mapping[str, SiteInput]) -> None:
    """Whether a stage can be run, before the system ends it in the middle.

    Raises:
        InputError: Not enough memory, or not enough disk in ``folder``.
    """
    values = sum(_tensor_bytes(graph, name) for name in stage)
    disk, free = _scratch_bytes(graph, stage) + values, shutil.disk_usage(folder).free
    if disk > free:
        raise InputError(
            f"calibrated rounding: {disk / 1e9:.1f} GB of sums, and {free / 1e9:.1f} GB are free in {folder}.",
            hint="Name a folder on a larger disk in the environment variable TMPDIR.",
        )
    memory, had = 2 * weights_in(graph, ir.DataType.FLOAT), available_memory()
    if had is not None and memory > had:
        raise InputError(
            f"calibrated rounding runs the model in float32, exact beside rounded: {memory / 1e9:.1f} GB, and "
            f"{had / 1e9:.1f} GB of memory are free.",
            hint="Use a machine with more memory, or round to nearest: leave --calibrate out.",
        )


def _tensor_bytes(graph: ir.Model, name: str) -> int:
    tensor = graph.graph.initializers[name].const_value
    return int(tensor.nbytes) if tensor is not None else 0
