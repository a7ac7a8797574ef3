"""``attach --as batched``: one graph with all adapters in slots, chosen for each row of a batch by ``adapter_ids``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.deltas import LowRank
from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.manifest import ADAPTER_IDS, Manifest
from loracc.passes.attach_batched import AttachBatchedPass
from loracc.passes.delta_points import refuse_other_kinds
from loracc.proof.attached import Trial
from loracc.slot_layout import empty_stack, slot_parts, slot_places, stack_shapes
from loracc.switching.lowered import attached_base, finished, write_attached
from loracc.switching.request import AttachRequest, AttachResult, Bound, union_of_sites

__all__ = ["make"]

#: Every slot costs memory, also while it is free.
_MOST_SLOTS = 1 << 16


def make(request: AttachRequest) -> AttachResult:
    """Attach, fill the slots, verify, and move the graph into place."""
    for one in request.bound:
        refuse_other_kinds(one.bindings)
    names = _slots(request)
    rank = request.rank or max(_rank(one) for one in request.bound)
    base = attached_base(request)
    attaching = AttachBatchedPass(union_of_sites(request.base, request.bound), base.digest, names, rank)
    attaching(base.graph)
    manifest = attaching.manifest
    _fill(base.graph, manifest, [slot_parts(manifest, one.bindings, rank) for one in request.bound])
    graph = finished(base, request)
    ids = _ids(attaching.source)
    trials = [Trial(one.name, one.bindings, more=ids(slot)) for slot, one in enumerate(request.bound)]
    rows: list[dict[str, Any]] = [
        {"name": one.name, "slot": slot, "rank": _rank(one), "sites": len(one.bindings)}
        for slot, one in enumerate(request.bound)
    ]
    rows += [{"name": "", "slot": slot, "rank": 0, "sites": 0} for slot in range(len(request.bound), len(names))]
    result = write_attached(request, base, graph, (), lambda _folder: None, trials, {}, off=ids(-1))
    return replace(result, mode="batched", adapters=rows)


def _slots(request: AttachRequest) -> list[str]:
    names = [one.name for one in request.bound]
    count = len(names) if request.slots is None else request.slots
    if count < len(names):
        raise InputError(f"--slots {count}: there are {len(names)} adapters.", hint="Give as many slots or more.")
    if count > _MOST_SLOTS:
        raise InputError(f"--slots {count}: a graph has room for at most {_MOST_SLOTS:,}.", hint="Give fewer.")
    return [*names, *[""] * (count - len(names))]


def _rank(bound: Bound) -> int:
    return max(int(binding.delta.rank) for binding in bound.bindings if isinstance(binding.delta, LowRank))


def _fill(graph: ir.Model, manifest: Manifest, parts: list[dict[str, Array]]) -> None:
    """Give the stacks their values, one slot after the other."""
    dtype = ir.DataType[manifest.dtype]
    for branch in manifest.branches:
        slots, rank = len(manifest.slots), manifest.rank
        stacks = {name: empty_stack(name, shape, dtype) for name, shape in stack_shapes(branch, slots, rank).items()}
        for slot, one in enumerate(parts):
            for name, where, own in slot_places(branch, slots, rank, slot):
                stacks[name][where] = one[name][own]
        for name, array in stacks.items():
            graph.graph.initializers[name].const_value = ir.Tensor(array, dtype=dtype, name=name)


def _ids(source: str) -> Callable[[int], Callable[[Mapping[str, Array]], dict[str, Array]]]:
    """Of a slot: the input that gives it to every row of a batch."""

    def of(slot: int) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        return lambda feeds: {ADAPTER_IDS: np.full(feeds[source].shape[:1], slot, np.int64)}

    return of
