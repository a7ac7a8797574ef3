"""What a report shows beyond the verdicts: every delta's spectrum, and how far the written weights are from W + ΔW."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array, is_float
from loracc.folded import Binding, FoldedTensor
from loracc.proof.oracle import half_ulp
from loracc.reports.report_spectrum import spectrum_of
from loracc.requantized import RequantizedTensor
from loracc.tensors import dims, read_rows, tile_rows

__all__ = ["delta_facts", "rounding_errors"]

#: Bytes of each weight that are looked at for the histogram, in how many runs of rows.
_SAMPLE_BYTES, _RUNS = 1 << 16, 4
#: Bins of an eighth of half an ulp, centred: errors of short sums are often multiples of it, and must not lie on edges.
_BINS = 17


def delta_facts(bindings: Sequence[Binding]) -> list[dict[str, Any]]:
    """A row a delta: name, adapter, kind, rank, scale, way, shape, spectrum, effective_rank, stable_rank, note."""
    rows = []
    for binding in bindings:
        delta, found = binding.delta, spectrum_of(binding.delta)
        rows.append(
            {
                "name": binding.site.name,
                "adapter": binding.adapter,
                "kind": delta.kind,
                "rank": delta.rank,
                "scale": delta.scale,
                "way": binding.way,
                "shape": list(delta.shape),
                "spectrum": list(found.values),
                "effective_rank": found.effective_rank,
                "stable_rank": found.stable_rank,
                "note": found.reason,
            }
        )
    return rows


def rounding_errors(folded: ir.Model, out: ir.Model) -> dict[str, Any]:
    """Histogram of (W' − (W + ΔW)) / half an ulp over sampled rows of every folded weight, read from the output.

    Args:
        folded: The model whose bound initializers are :class:`FoldedTensor`.
        out: What was written.

    Returns:
        ``edges`` of the bins (the outer ones also hold what is beyond), ``counts``, ``elements`` looked at, ``beyond``
        (how many are further away than half an ulp and 4 %), ``skipped``: weights that were not looked at (quantized,
        or not in the output under that name).
    """
    edges = np.linspace(-_BINS / 16, _BINS / 16, _BINS + 1)
    counts, elements, beyond, skipped = np.zeros(_BINS, np.int64), 0, 0, 0
    for name, value in folded.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, FoldedTensor) or not tensor.bindings:
            continue
        written = out.graph.initializers.get(name)
        after = written.const_value if written is not None else None
        if isinstance(tensor, RequantizedTensor) or after is None or not _comparable(tensor, after):
            skipped += 1
            continue
        for errors in _errors(tensor, after):
            counts += np.histogram(np.clip(errors, -1.0, 1.0), edges)[0]
            elements += errors.size
            beyond += int(np.count_nonzero(~(np.abs(errors) <= 1.04)))
    listed = {"edges": [round(float(edge), 6) for edge in edges], "counts": [int(count) for count in counts]}
    return {**listed, "elements": elements, "beyond": beyond, "skipped": skipped}


def _comparable(tensor: FoldedTensor, after: ir.TensorProtocol) -> bool:
    return bool(dims(tensor) == dims(after) and is_float(after.dtype) and after.dtype.bitwidth >= 16)


def _errors(tensor: FoldedTensor, after: ir.TensorProtocol) -> Iterator[Array]:
    for lo, hi in _spans(tensor):
        exact = tensor.exact_rows(lo, hi, np.dtype(np.float64))
        with np.errstate(invalid="ignore", over="ignore"):
            errors = (read_rows(after, lo, hi).astype(np.float64) - exact) / half_ulp(exact, after.dtype)
        yield np.nan_to_num(errors, nan=np.inf).ravel()


def _spans(tensor: ir.TensorProtocol) -> list[tuple[int, int]]:
    """Up to ``_RUNS`` evenly spread runs of rows."""
    shape = dims(tensor)
    length = shape[0] if shape else 1
    run = tile_rows(shape, int(tensor.dtype.itemsize), _SAMPLE_BYTES // _RUNS)
    if run * _RUNS >= length:
        return [(0, length)]
    return [(int(lo), int(lo) + run) for lo in np.linspace(0, length - run, _RUNS, dtype=np.int64)]
