"""How long a fold will take and how much memory, before anything is written.

The time of what is computed is measured: a few tiles of the very weights are folded. What the kernel copies, and the
writing itself, is reckoned at the rates below (docs/benchmarks.md: two cores, page cache); a disk that is slower than
that sets the time of outputs that do not fit into memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loracc.adapter import Delta
from loracc.blas import one_blas_thread
from loracc.deltas import DoRA
from loracc.folded import FoldedTensor
from loracc.streaming import default_workers
from loracc.targets.plan import WritePlan
from loracc.tensors import TILE_BYTES, dims, open_rows, tile_rows

__all__ = ["Estimate", "estimate"]

#: Bytes a second: copied from file to file, and written from memory.
_COPY_RATE, _WRITE_RATE = 3.0e9, 4.0e9
#: Tiles that are folded to see how long one takes.
_TILES = 4
#: Buffers that a worker holds for each tile: stored and computed, the factors, a panel of a weight that is turned.
_WORKER_BYTES = 4 * TILE_BYTES + (16 << 20)


@dataclass(frozen=True)
class Estimate:
    """Seconds of writing, and the process' peak memory in bytes."""

    seconds: float
    memory: int


def estimate(plan: WritePlan, folded: Sequence[FoldedTensor]) -> Estimate:
    """What writing ``plan`` will take; ``folded`` are its computed tensors. A few tiles of them are read."""
    workers = default_workers()
    copied = max(plan.nbytes - plan.folded, 0)
    seconds = copied / _COPY_RATE + plan.folded * max(_seconds_a_byte(folded) / workers, 1 / _WRITE_RATE)
    return Estimate(seconds, _peak() + workers * (_WORKER_BYTES + max(map(_held, folded), default=0)))


def _seconds_a_byte(folded: Sequence[FoldedTensor]) -> float:
    """The median over some tiles of the largest tensors; the first is not counted."""
    found = []
    with one_blas_thread():
        for tensor in sorted(folded, key=lambda tensor: -tensor.nbytes)[: _TILES + 1]:
            shape = dims(tensor)
            if not shape or not _is_streamed(tensor):
                continue
            count = min(tile_rows(shape, int(tensor.dtype.itemsize), TILE_BYTES), shape[0])
            out = np.zeros((count, *shape[1:]), tensor.dtype.numpy())
            with open_rows(tensor) as rows:
                start = time.perf_counter()
                rows.fill(0, count, out)
                found.append((time.perf_counter() - start) / max(out.nbytes, 1))
    return float(np.median(found[1:] or found or [0.0]))


def _is_streamed(tensor: FoldedTensor) -> bool:
    """Whether a tile of the tensor needs no more of it: what has a first pass, or forms ΔW whole, is not timed."""
    return all(type(b.delta).prepare is Delta.prepare and _whole(b.delta) == 0 for b in tensor.bindings)


def _held(tensor: FoldedTensor) -> int:
    """Bytes held for one tensor beside the tiles: ΔW whole, where its kind has no other way."""
    elements = int(np.prod(dims(tensor), dtype=np.int64))
    return elements * tensor.compute_dtype.itemsize * sum(_whole(binding.delta) for binding in tensor.bindings)


def _whole(delta: Delta) -> int:
    """How many arrays of the weight's size a delta makes."""
    if isinstance(delta, DoRA):
        return 0
    return int(type(delta).apply_slab is Delta.apply_slab or type(delta).prepare is not Delta.prepare)


def _peak() -> int:
    """The process' peak memory so far; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
