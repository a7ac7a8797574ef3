"""Running a model a segment at a time: only the segment's weights are in memory, and no node runs twice.

Between two segments, the values that later nodes read are kept in a scratch file for each batch of inputs. So the
model can be stopped anywhere, some weights changed, and run on from there.

1. What follows from weights alone is not kept but computed again, from the weights of that moment; so is what is no
   tensor (a sequence).
2. Everything else that is born before the cut and read behind it is kept.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.calibration.data import Batch
from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.runners.runner import OnnxRunner

__all__ = ["IN_MEMORY", "Segments", "Walk"]

#: Bytes between two segments that each walk holds; what is more lies in files.
IN_MEMORY = 1 << 29
#: Gives the tensor to run with in place of an initializer's own; None keeps that.
Weights = Callable[[str], ir.TensorProtocol | None]


class Segments:
    """A graph cut into segments.

    Args:
        model: A sorted graph in float32; it is kept, and not changed.
        ends: Where each segment ends: the place of the first node behind it.
    """

    def __init__(self, model: ir.Model, ends: Sequence[int]) -> None:
        self._model = model
        born = _births(model.graph)
        last = _last_uses(model.graph, born)
        self._kept = [
            [value for value, place in born.items() if place < end <= last.get(value, -1)] for end in (0, *ends)
        ]
        outputs = (value for node in model.graph for value in node.outputs)
        self._values = {str(value.name): value for value in (*model.graph.inputs, *outputs)}

    def entering(self, number: int) -> list[str]:
        """Names of the values that segment ``number`` and those behind it need from before it."""
        return [str(value.name) for value in self._kept[number]]

    def extracted(self, number: int, taps: Iterable[str], *, leave: bool) -> ir.Model | None:
        """The segment's nodes as a model of its own, or None where nothing is to be computed.

        Args:
            number: Which segment.
            taps: Names of float values that are to be outputs, unless they enter the segment.
            leave: Compute too what the segments behind it need.
        """
        wanted = [self._values[name] for name in taps]
        for value in wanted:  # a layer's input or output, whatever the graph does not say
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        if leave:
            wanted += self._kept[number + 1]
        entering = set(self._kept[number])
        outputs = [value for value in dict.fromkeys(wanted) if value not in entering]
        if not outputs:
            return None
        graph = ir.convenience.extract(self._model.graph, self._kept[number], outputs)
        return ir.Model(graph, ir_version=self._model.ir_version)


def _births(graph: ir.Graph) -> dict[ir.Value, int]:
    """Where each value that can be kept comes into being; graph inputs do before everything else."""
    born = {value: -1 for value in graph.inputs if not value.is_initializer()}
    moving = set(born)
    for place, node in enumerate(graph):
        if any(value in moving for value in _read(node)):
            moving.update(node.outputs)
            born |= {value: place for value in node.outputs if value.name and isinstance(value.type, ir.TensorType)}
    return born


def _last_uses(graph: ir.Graph, born: Mapping[ir.Value, int]) -> dict[ir.Value, int]:
    """Place of the last node that needs a value, also to compute again what cannot be kept; of outputs, behind all."""
    last = dict.fromkeys(graph.outputs, len(graph))
    for place, node in reversed(list(enumerate(graph))):
        needed = max([place, *(last.get(value, -1) for value in node.outputs if value not in born)])
        for value in _read(node):
            last[value] = max(last.get(value, -1), needed)
    return last


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, and what the graphs inside it do."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            inner = list(attribute.as_graphs())
        else:
            continue
        for graph in inner:
            yield from graph.outputs
            for one in graph:
                yield from _read(one)


class Walk:
    """One version of a model on its way through its segments, all batches side by side.

    Args:
        segments: The graph.
        batches: What to run it on.
        folder: A folder for the values between segments.
        name: Of this walk's files.
    """

    def __init__(self, segments: Segments, batches: Sequence[Batch], folder: Path, name: str) -> None:
        self._segments, self._batches, self._folder, self._name = segments, batches, folder, name
        self._held: list[list[Array] | None] = [None] * len(batches)
        for number, batch in enumerate(batches):
            self._save(number, [batch.inputs[key] for key in segments.entering(0)])

    def run(
        self, number: int, weights: Weights, taps: Sequence[str] = (), *, leave: bool = False
    ) -> Iterator[tuple[Batch, dict[str, Array]]]:
        """Each batch with its tapped values; afterwards, with ``leave``, the walk is behind the segment.

        Raises:
            RunError: The runtime refused the segment or the batch.
            InputError: The disk is full.
        """
        model = self._segments.extracted(number, taps, leave=leave)
        runner = _runner(model, weights) if model is not None else None
        names = self._segments.entering(number + 1) if leave else []
        for index, batch in enumerate(self._batches):
            values = self._load(index, number)
            if runner is not None:
                values |= runner.run(values)
            if leave:
                self._save(index, [values[name] for name in names])
            yield batch, {name: values[name] for name in taps}

    def values(self, number: int) -> Iterator[tuple[Batch, dict[str, Array]]]:
        """What the walk keeps before segment ``number``, where it is."""
        for index, batch in enumerate(self._batches):
            yield batch, self._load(index, number)

    def advance(self, number: int, weights: Weights) -> None:
        """Go on behind the segment."""
        for _ in self.run(number, weights, leave=True):
            pass

    def _load(self, index: int, number: int) -> dict[str, Array]:
        names = self._segments.entering(number)
        held = self._held[index]
        if held is not None:
            return dict(zip(names, held, strict=True))
        with np.load(self._path(index), allow_pickle=False) as file:
            return {name: file[f"v{place}"] for place, name in enumerate(names)}

    def _save(self, index: int, values: Sequence[Array]) -> None:
        self._held[index] = None
        if self._bytes(*values) <= IN_MEMORY:
            self._held[index] = list(values)
            return
        try:
            np.savez(self._path(index), **{f"v{place}": value for place, value in enumerate(values)})  # type: ignore[arg-type]  # its allow_pickle
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise InputError(
                f"calibrated rounding: no space is left in {self._folder} for what lies between two layers.",
                hint="Give fewer samples, or name a folder on a larger disk in the environment variable TMPDIR.",
            ) from error

    def _bytes(self, *more: Array) -> int:
        return sum(array.nbytes for held in (*self._held, more) if held for array in held)

    def _path(self, index: int) -> Path:
        return self._folder / f"{self._name}-{index}.npz"


def _runner(model: ir.Model, weights: Weights) -> OnnxRunner:
    for name, value in model.graph.initializers.items():
        tensor = weights(name)
        if tensor is not None:
            value.const_value = tensor
    return OnnxRunner(model)
