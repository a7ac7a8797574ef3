"""Where a checkpoint's tensors lie in a graph's initializers: as they are, transposed, or as a block of a longer one.

Only sampled elements are read (:mod:`loracc.passes.content_index`). A concatenated weight is laid out by its blocks:
where one ends the next begins, and a stretch that is no tensor of the checkpoint (a bias that the exporter filled in)
is stepped over in the largest step that all lengths are multiples of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from loracc.dtypes import is_float
from loracc.passes.content_index import Candidate, ContentIndex
from loracc.passes.content_samples import Elements, Matrix
from loracc.tensors import dims

__all__ = ["Place", "find_places"]

#: A concatenation is given up after this many steps over what is not known.
_STEPS = 1024


@dataclass(frozen=True)
class Place:
    """A stretch of an initializer that some tensors of the checkpoint may be.

    Attributes:
        initializer: Its name.
        axis: The stored axis that ``start`` and ``stop`` count along.
        start, stop: The stretch; ``stop`` is None when it is all of the initializer.
        candidates: What it may be; ``turned`` says that the stretch, as stored, is the tensor transposed.
    """

    initializer: str
    axis: int
    start: int
    stop: int | None
    candidates: tuple[Candidate, ...]


def find_places(model: ir.Model, index: ContentIndex) -> list[Place]:
    """Every place in the main graph's initializers, in their order."""
    places: list[Place] = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and is_float(tensor.dtype) and len(tensor.shape) and tensor.size:
            places += _places(name, tensor, index)
    return places


def _places(name: str, tensor: ir.TensorProtocol, index: ContentIndex) -> list[Place]:
    shape = dims(tensor)
    if not any(_may_hold(shape, turned, index) for turned in (False, True)):
        return []
    with Elements(tensor) as elements:
        whole = index.find(elements, Matrix.of(shape), tensor.dtype, 0, shape[0], shape[1:])
        if whole:
            return [Place(name, 0, 0, None, tuple(whole))]
        for turned in (False, True) if len(shape) == 2 else (False,):
            tail = shape[:1] if turned else shape[1:]
            blocks = list(_blocks(elements, tensor.dtype, Matrix.of(shape, turned=turned), tail, index))
            if blocks:
                axis = int(turned)
                return [
                    Place(name, axis, start, stop, tuple(Candidate(c.name, c.turned != turned) for c in found))
                    for start, stop, found in blocks
                ]
    return []


def _may_hold(shape: tuple[int, ...], turned: bool, index: ContentIndex) -> bool:
    if turned and len(shape) != 2:
        return False
    length, tail = (shape[1], shape[:1]) if turned else (shape[0], shape[1:])
    return any(known <= length for known in index.lengths(tail))


def _blocks(
    elements: Elements, dtype: ir.DataType, view: Matrix, tail: tuple[int, ...], index: ContentIndex
) -> Iterator[tuple[int, int, list[Candidate]]]:
    """(start, stop, candidates) along the view's rows."""
    total = view.shape[0]
    lengths = [length for length in index.lengths(tail) if length < total]
    if not lengths:
        return
    step, at, missed = math.gcd(*lengths), 0, 0
    while at < total and missed < _STEPS:
        for length in lengths:
            found = index.find(elements, view, dtype, at, length, tail) if at + length <= total else []
            if found:
                yield at, at + length, found
                at += length
                break
        else:
            at += step
            missed += 1
