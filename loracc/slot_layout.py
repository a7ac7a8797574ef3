"""Where a slot's factors lie in the stacks of ``attach --as batched``.

With S slots that have room for rank R at every site, a branch of weights u = 1, 2, ... with nᵤ sites each (rᵤ = nᵤ·R)
keeps its factors in one of three layouts:

=========  ==========================================  ==================  ========================================
layout     A                                           B of weight u       computed as
=========  ==========================================  ==================  ========================================
columns    [features, S·r₁ + S·r₂ + ...]               [S·rᵤ, out]         x·A for all slots at once, others zeroed
stacked    [S, features, Σrᵤ]                          [S, rᵤ, out]        A and B gathered for every row of a batch
rows       [S·features, r₁] (an embedding)             [S, r₁, out]        rows of A looked up, B gathered
=========  ==========================================  ==================  ========================================

Site j of weight u has ranks j·R to (j+1)·R of its rᵤ. B is stored *negative*: branches are subtracted
(:mod:`loracc.passes.delta_nodes`). What a delta leaves free is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from loracc.deltas import LowRank
from loracc.dtypes import Array, all_finite, round_to
from loracc.errors import BindingError, InputError, NumericsError
from loracc.folded import Binding
from loracc.manifest import Branch, Manifest

__all__ = ["LAYOUTS", "Index", "empty_stack", "room", "slot_parts", "slot_places", "stack_shapes"]

Index = tuple[slice | int, ...]
#: The table's.
LAYOUTS = ("columns", "stacked", "rows")


def room(branch: Branch, rank: int) -> list[int]:
    """rᵤ of every weight."""
    return [rank * len(weight.places) for weight in branch.weights]


def stack_shapes(branch: Branch, slots: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of A and the B's, by name."""
    rooms = room(branch, rank)
    features, every = branch.features, sum(rooms)
    a = {
        "columns": (features, slots * every),
        "stacked": (slots, features, every),
        "rows": (slots * features, every),
    }[branch.layout]
    shapes: dict[str, tuple[int, ...]] = {branch.name: a}
    for weight, own in zip(branch.weights, rooms, strict=True):
        shapes[weight.name] = (slots * own, weight.out) if branch.layout == "columns" else (slots, own, weight.out)
    return shapes


def empty_stack(name: str, shape: tuple[int, ...], dtype: ir.DataType) -> Array:
    """A stack of free slots.

    Raises:
        InputError: There is no memory for it.
    """
    try:
        return np.zeros(shape, dtype.numpy())
    except (MemoryError, ValueError) as error:  # numpy's two answers to a size that cannot be
        size = math.prod(shape) * dtype.itemsize
        raise InputError(
            f"{name}: its slots {list(shape)} of {dtype.name} take {size:,.0f} bytes, more than there is memory for.",
            hint="Give fewer --slots, or a smaller --rank.",
        ) from error


def slot_places(branch: Branch, slots: int, rank: int, slot: int) -> Iterator[tuple[str, Index, Index]]:
    """(name, where in the stack, where in the slot's own part) of everything that one slot has in a branch.

    The parts are A ``[features, Σrᵤ]`` and B's ``[rᵤ, out]`` (:func:`slot_parts`).
    """
    rooms = room(branch, rank)
    first = 0
    for weight, own in zip(branch.weights, rooms, strict=True):
        if branch.layout == "columns":
            at = slots * first + slot * own
            yield branch.name, np.s_[:, at : at + own], np.s_[:, first : first + own]
            yield weight.name, np.s_[slot * own : (slot + 1) * own, :], np.s_[:, :]
        else:
            yield weight.name, np.s_[slot, :, :], np.s_[:, :]
        first += own
    if branch.layout == "stacked":
        yield branch.name, np.s_[slot, :, :], np.s_[:, :]
    elif branch.layout == "rows":
        features = branch.features
        yield branch.name, np.s_[slot * features : (slot + 1) * features, :], np.s_[:, :]


def slot_parts(manifest: Manifest, bindings: Sequence[Binding], rank: int) -> dict[str, Array]:
    """A slot's factors by the stacks' names, in the graph's type; all zero where the adapter has no delta.

    Raises:
        BindingError: A delta's rank is larger than the slots', or the graph has no branch at its site.
        NumericsError: A value does not fit the graph's type.
    """
    deltas: dict[str, list[LowRank]] = {}
    for binding in bindings:
        assert isinstance(binding.delta, LowRank)
        deltas.setdefault(binding.site.name, []).append(binding.delta)
    _refuse_large(deltas, rank)
    dtype = ir.DataType[manifest.dtype]
    parts: dict[str, Array] = {}
    for branch in manifest.branches:
        for name, exact in _parts(branch, deltas, rank).items():
            parts[name] = round_to(exact, dtype)
            if not all_finite(parts[name]):
                raise NumericsError(
                    f"{name}: the adapter's values do not fit the graph's type {dtype.name}.",
                    hint="Is its scale right? It is multiplied into B.",
                )
    return parts


def _refuse_large(deltas: Mapping[str, Sequence[LowRank]], rank: int) -> None:
    large = {site: sum(delta.rank for delta in found) for site, found in deltas.items()}
    large = {site: needed for site, needed in large.items() if needed > rank}
    if large:
        site, needed = max(large.items(), key=lambda item: item[1])
        raise BindingError(
            f"{len(large)} delta(s) are of a larger rank than the slots have room for: {site} has {needed}, the slots "
            f"have {rank}.",
            hint=f"Attach again with more room: --rank {needed}",
        )


def _parts(branch: Branch, deltas: Mapping[str, Sequence[LowRank]], rank: int) -> dict[str, Array]:
    rooms = room(branch, rank)
    a = np.zeros((branch.features, sum(rooms)))
    found = {branch.name: a}
    before = 0
    for weight, own in zip(branch.weights, rooms, strict=True):
        b = found[weight.name] = np.zeros((own, weight.out))
        for number, place in enumerate(weight.places):
            at = number * rank
            for delta in deltas.get(place.site, ()):
                left, right = delta.a.reshape(delta.rank, -1).astype(np.float64).T, delta.b.astype(np.float64).T
                if branch.kind == "embedding":
                    left, right = right.T, left.T
                a[:, before + at : before + at + delta.rank] = left
                b[at : at + delta.rank, place.start : place.stop] = -delta.s * right
                at += delta.rank
        before += own
    return found
