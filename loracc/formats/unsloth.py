"""PEFT adapters on stacked experts whose B Unsloth packed in its own order.

PEFT keeps B ``[out, r·E]`` rank-major, ``B.reshape(out, r, E)``; Unsloth's kernels pack it expert-major,
``B.view(out, E, r)`` (unsloth issues 5410 and 6930). The shapes are the same, so the file does not tell. Unsloth marks
its configurations (``auto_mapping.unsloth_fixed``): those are asked about, every other file is PEFT's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from loracc.adapter import Adapter, Entry
from loracc.errors import InputError
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import AdapterSource
from loracc.formats.peft import read_peft
from loracc.kinds.packed_experts import PackedExperts

__all__ = ["is_packed_peft", "read_packed_peft"]


def is_packed_peft(source: AdapterSource) -> bool:
    """Whether it is a PEFT adapter on raw parameters."""
    return source.config is not None and "peft_type" in source.config and bool(source.config.get("target_parameters"))


def read_packed_peft(source: AdapterSource, name: str, options: AdapterOptions) -> Adapter:
    """Read it as PEFT does, then undo Unsloth's packing where the user says that it is Unsloth's.

    Raises:
        InputError: Unsloth wrote the file, and ``--moe-layout`` was not given.
        LoraccError: Whatever :func:`loracc.formats.peft.read_peft` refuses.
    """
    adapter = read_peft(source, name, options)
    packed = any(isinstance(entry.delta, PackedExperts) for entry in adapter.entries)
    if packed and options.moe_layout is None and _by_unsloth(source.config or {}) and not options.describe:
        raise InputError(
            f"{source.file}: Unsloth wrote this adapter, and its experts' B may be packed in PEFT's order or in "
            "Unsloth's own; the file does not tell.",
            hint="Say which: --moe-layout unsloth (trained with Unsloth's own MoE kernels) or --moe-layout peft.",
        )
    if options.moe_layout != "unsloth":
        return adapter
    entries = tuple(_repacked(entry) for entry in adapter.entries)
    return replace(adapter, entries=entries, digested=lambda: f"{adapter.digest}-unsloth")


def _by_unsloth(config: Mapping[str, Any]) -> bool:
    mapping = config.get("auto_mapping")
    return isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))


def _repacked(entry: Entry) -> Entry:
    others = tuple(_repacked(other) for other in entry.alternatives)
    delta = entry.delta
    if isinstance(delta, PackedExperts):
        experts = delta.a.shape[0] // delta.r
        b = delta.b.reshape(-1, experts, delta.r).swapaxes(1, 2).reshape(delta.b.shape)
        delta = replace(delta, b=np.ascontiguousarray(b))
    return replace(entry, delta=delta, alternatives=others)
