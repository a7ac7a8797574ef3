"""``loracc inspect``: what is in a model, an adapter or an exported file."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from loracc.adapter import Adapter, Delta, PendingDelta
from loracc.encodings.decoded import DecodedTensor
from loracc.model import BaseModel, LoadOptions
from loracc.passes.decode_weights import undecoded
from loracc.passes.encode_weights import encoded
from loracc.provenance import read_provenance
from loracc.tensors import dims

__all__ = ["describe_adapter", "describe_model", "inspect"]


def inspect(path: str | Path, *, alpha: float | None = None, allow_pickle: bool = False) -> dict[str, Any]:
    """Describe ``path``: ``{"kind": "model"|"adapter", "format", ...}``. Nothing is traced; weights are read only
    where a graph adds something low-rank to them.

    Raises:
        InputError: It is neither a model nor an adapter that loracc reads.
    """
    from loracc.formats import is_adapter, load_adapter
    from loracc.sources import load_model

    if is_adapter(path):
        # Without the scale, what is in the file can still be told: 1 stands in and is not reported.
        adapter = load_adapter(path, alpha=alpha, allow_pickle=allow_pickle, describe=True)
        return describe_adapter(adapter)
    return describe_model(load_model(path, LoadOptions(allow_pickle=allow_pickle, graph=False)))


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """An adapter's format, kinds, ranks and entries."""
    deltas = [entry.delta for entry in adapter.entries]
    return {
        "kind": "adapter",
        "format": adapter.format,
        "path": adapter.path,
        "digest": adapter.digest,
        "parameters": sum(array.size for delta in deltas for array in delta.arrays().values()),
        "kinds": dict(Counter(_kind(delta) for delta in deltas)),
        "ranks": sorted({delta.rank for delta in deltas if delta.rank is not None}),
        "scales": sorted({delta.scale for delta in deltas}),
        "notes": list(adapter.notes),
        "entries": [
            {
                "name": entry.name,
                "kind": _kind(entry.delta),
                "rank": entry.delta.rank,
                "scale": entry.delta.scale,
                "shape": None if isinstance(entry.delta, PendingDelta) else list(entry.delta.shape),
            }
            for entry in adapter.entries
        ],
    }


def _kind(delta: Delta) -> str:
    return delta.name if isinstance(delta, PendingDelta) else delta.kind


def describe_model(model: BaseModel) -> dict[str, Any]:
    """A model's format, inputs, outputs, ops, size and sites; of a file made by loracc also what it was made from."""
    decoded = [value.const_value for value in model.ir.graph.initializers.values() if value.const_value is not None]
    graph = encoded(model.ir).graph  # quantized weights as the file has them
    weights = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    found: dict[str, Any] = {
        "kind": "model",
        "format": model.format,
        "path": str(model.path),
        "parameters": sum(math.prod(dims(weight)) for weight in decoded),
        "bytes": sum(int(weight.nbytes) for weight in weights),
        "dtypes": dict(Counter(weight.dtype.name for weight in weights)),
    }
    encodings = Counter(t.weight.describe() for t in decoded if isinstance(t, DecodedTensor))
    if encodings:
        found["quantized"] = dict(encodings.most_common())
    if refused := undecoded(model.ir):
        found["cannot be folded into"] = [f"{name}: {why}" for name, why in refused.items()]
    if model.traced:
        found |= {
            "opset": model.ir.opset_imports.get("", None),
            "inputs": [f"{value.name}: {value.type}{value.shape}" for value in graph.inputs],
            "outputs": [f"{value.name}: {value.type}{value.shape}" for value in graph.outputs],
            "ops": dict(Counter(node.op_type for node in graph.all_nodes()).most_common()),
        }
        found["lora"] = _lora_inside(model)
    record = read_provenance(model)
    if record is not None:
        found["made_by_loracc"] = record.to_json()
    found["notes"] = list(model.notes)
    found["sites"] = [
        {
            "name": site.name if site.module else "",
            "kind": site.kind,
            "shape": list(site.layout.canonical_shape(_stored_shape(model, site.initializer))),
            "initializer": site.initializer,
            "known by": site.source,
            **({"encoding": _encoding(model, site.initializer)} if encodings else {}),
        }
        for site in model.sites
    ]
    return found


def _lora_inside(model: BaseModel) -> dict[str, Any]:
    """The LoRA that ``fold`` without an adapter would fold, and what looks like it with the reason that it is left."""
    from loracc.passes.raise_lora import raise_lora

    raised = raise_lora(model.ir.clone())
    return {
        "found": [
            {
                "name": binding.site.name if binding.site.module else "",
                "kind": binding.delta.kind,
                "rank": binding.delta.rank,
                "scale": binding.delta.scale,
                "adapter": binding.adapter,
                "initializer": binding.site.initializer,
            }
            for binding in raised.bindings
        ],
        "lookalikes": [{"where": rejected.where, "reason": rejected.reason} for rejected in raised.rejected],
    }


def _encoding(model: BaseModel, initializer: str) -> str:
    """How a quantized weight is stored; "" of any other."""
    tensor = model.ir.graph.initializers[initializer].const_value
    return tensor.weight.describe() if isinstance(tensor, DecodedTensor) else ""


def _stored_shape(model: BaseModel, initializer: str) -> tuple[int, ...]:
    tensor = model.ir.graph.initializers[initializer].const_value
    return dims(tensor) if tensor is not None else ()
