"""What was raised as an adapter's entries, for whoever writes an adapter file (``--save-adapter``).

One entry per weight: several low-rank deltas are put side by side, which is their exact sum; a delta that the graph had
multiplied out is factored again where its rank allows. A bias is the value it has afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from loracc.adapter import Delta, Entry
from loracc.deltas import Addition, DoRA, LowRank, Replacement
from loracc.dtypes import Array
from loracc.errors import LoraccError, UnsupportedError, combined
from loracc.folded import Binding, FoldedTensor
from loracc.passes.low_rank import low_rank_factors
from loracc.passes.raised_deltas import stacked
from loracc.sites import Site

__all__ = ["raised_entries"]


def raised_entries(model: ir.Model, bindings: Sequence[Binding]) -> list[Entry]:
    """The bindings of one raised model, before or after folding, as entries; modules are paths of the base model.

    Raises:
        UnsupportedError: A weight's module is not known, or its deltas have no common low-rank form.
    """
    by_site: dict[Site, list[Delta]] = {}
    for binding in bindings:
        by_site.setdefault(binding.site, []).append(binding.delta)
    entries, errors = [], []
    for site, deltas in by_site.items():
        try:
            entries.append(_entry(model, site, deltas))
        except UnsupportedError as error:
            errors.append(error)
    if errors:
        raise combined(list[LoraccError](errors))
    return entries


def _entry(model: ir.Model, site: Site, deltas: Sequence[Delta]) -> Entry:
    if not site.module:
        raise UnsupportedError(
            f"{site.initializer!r}: which module's weight this is cannot be told.",
            hint="Export the model with torch.onnx.export(..., dynamo=True), or give its .pt2 file.",
        )
    delta = _bias(model, site, deltas) if site.kind == "bias" else _weight(site, deltas)
    return Entry(site.module, site.parameter, delta, (), False if site.kind == "embedding" else None)


def _weight(site: Site, deltas: Sequence[Delta]) -> Delta:
    first = deltas[0]
    if len(deltas) == 1 and isinstance(first, DoRA):
        return DoRA(_single(first.inner), first.magnitude.astype(np.float32), first.axis)
    return _single(stacked([_low_rank(site, delta) for delta in deltas]))


def _low_rank(site: Site, delta: Delta) -> LowRank:
    if isinstance(delta, LowRank):
        return delta
    if isinstance(delta, Addition):
        dense = delta.d.astype(np.float64)
        factors = low_rank_factors(dense.reshape(dense.shape[0], -1))
        if factors is not None:
            return LowRank(factors[1].reshape(-1, *dense.shape[1:]), factors[0], delta.s)
        raise UnsupportedError(f"{site.name}: the delta found in the graph has full rank: no LoRA adapter can hold it.")
    raise UnsupportedError(f"{site.name}: {delta.kind} together with another delta is no single adapter.")


def _single(delta: LowRank) -> LowRank:
    """In float32, as adapters are kept."""
    return LowRank(delta.a.astype(np.float32), delta.b.astype(np.float32), delta.s)


def _bias(model: ir.Model, site: Site, deltas: Sequence[Delta]) -> Replacement:
    tensor = model.graph.initializers[site.initializer].const_value
    tensor = tensor.base if isinstance(tensor, FoldedTensor) else tensor
    assert tensor is not None
    value: Array = tensor.numpy().astype(np.float64)
    for delta in deltas:
        value = delta.apply(value)
    return Replacement(value.astype(np.float32).reshape(-1))
