"""Where a checkpoint's tensors lie in a graph's initializers: as they are, transposed, or as a block of a longer one.

Only sampled elements are read (:mod:`loracc.passes.content_index`). A concatenated weight is laid out by its blocks:
where one ends the next begins, and a stretch that is no tensor of the checkpoint (a bias that the exporter filled in)
is stepped over in the largest step that all lengths are multiples of. A bias has the blocks of the weight that it
belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from loracc.dtypes import is_float
from loracc.passes.content_index import Candidate, ContentIndex
from loracc.passes.content_samples import Elements, Matrix
from loracc.passes.site_roles import readers_of, role_of
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
    found: dict[str, list[Place]] = {}
    values = model.graph.initializers
    for name in sorted(values, key=lambda name: len(values[name].shape or ()) == 1):
        tensor = values[name].const_value
        if tensor is not None and is_float(tensor.dtype) and len(tensor.shape) and tensor.size:
            bounds = _partners_blocks(model, values[name], found) if len(tensor.shape) == 1 else []
            found[name] = _places(name, tensor, index, bounds)
    return [place for name in values for place in found.get(name, ())]


def _partners_blocks(model: ir.Model, value: ir.Value, found: Mapping[str, list[Place]]) -> list[tuple[int, int]]:
    """(start, stop) of the blocks of the weight whose bias this is."""
    partners = {role.partner for role in map(role_of, readers_of(value, model.functions)) if role.kind == "bias"}
    weights = {str(v.name) for node in partners if node is not None for v in node.inputs if v is not None}
    blocks = [(place.start, place.stop) for name in sorted(weights) for place in found.get(name, ())]
    return [(start, stop) for start, stop in blocks if stop is not None]


def _places(
    name: str, tensor: ir.TensorProtocol, index: ContentIndex, bounds: Sequence[tuple[int, int]]
) -> list[Place]:
    shape = dims(tensor)
    if not any(_may_hold(shape, turned, index) for turned in (False, True)):
        return []
    with Elements(tensor) as elements:
        whole = index.find(elements, Matrix.of(shape), 0, shape[0], shape[1:])
        if whole:
            return [Place(name, 0, 0, None, tuple(whole))]
        view = Matrix.of(shape)
        known = [(a, b, index.find(elements, view, a, b - a, ())) for a, b in bounds if b <= shape[0]]
        if any(candidates for _, _, candidates in known):
            return [Place(name, 0, a, b, tuple(candidates)) for a, b, candidates in known if candidates]
        for turned in (False, True) if len(shape) == 2 else (False,):
            tail = shape[:1] if turned else shape[1:]
            blocks = list(_blocks(elements, Matrix.of(shape, turned=turned), tail, index))
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
    elements: Elements, view: Matrix, tail: tuple[int, ...], index: ContentIndex
) -> Iterator[tuple[int, int, list[Candidate]]]:
    """(start, stop, candidates) along the view's rows."""
    total = view.shape[0]
    lengths = [length for length in index.lengths(tail) if length < total]
    if not lengths:
        return
    step, at, missed = math.gcd(*lengths), 0, 0
    while at < total and missed < _STEPS:
        for length in lengths:
            found = index.find(elements, view, at, length, tail) if at + length <= total else []
            if found:
                yield at, at + length, found
                at += length
                break
        else:
            at += step
            missed += 1
