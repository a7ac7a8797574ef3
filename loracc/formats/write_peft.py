"""Writing PEFT adapters: ``adapter_model.safetensors`` and ``adapter_config.json`` (keys of FORMATS.md 1).

================ =================================================================================
delta            tensors
================ =================================================================================
LowRank          ``lora_A.weight``, ``lora_B.weight``; of an embedding ``lora_embedding_A``, ``..._B``
DoRA             the same and ``lora_magnitude_vector``
Replacement      the parameter itself: a bias by ``bias="all"``, others by ``modules_to_save``
================ =================================================================================

The scale of a module is written as its ``lora_alpha``, since s = α/r. Other kinds are refused by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loracc.adapter import Entry
from loracc.deltas import DoRA, LowRank, Replacement
from loracc.dtypes import Array
from loracc.errors import InputError, UnsupportedError, combined
from loracc.formats.factors import alpha_of
from loracc.formats.peft_keys import BASE_LAYER, PREFIXES
from loracc.formats.write_tensors import write_tensors

__all__ = ["peft_files", "write_peft"]

_PREFIX = PREFIXES[0]


def write_peft(entries: Sequence[Entry], folder: Path, *, fan_in_fan_out: bool = False, base: str | None = None) -> int:
    """Write an adapter into a folder that exists; returns the bytes written.

    Args:
        entries: Their deltas; modules are paths of the base model. ``fan_in_fan_out`` False marks an embedding here,
            for which PEFT has other keys.
        folder: Where.
        fan_in_fan_out: The adapted layers are transformers' Conv1D.
        base: ``base_model_name_or_path``.

    Raises:
        UnsupportedError: A delta that PEFT's LoRA has no tensors for.
        InputError: Two entries are for one parameter, or the disk is full.
    """
    tensors, config = peft_files(entries, fan_in_fan_out=fan_in_fan_out, base=base)
    model, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    try:
        write_tensors(model, {key: np.ascontiguousarray(array) for key, array in tensors.items()}, {"format": "pt"})
        settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    return model.stat().st_size + settings.stat().st_size


def peft_files(
    entries: Sequence[Entry], *, fan_in_fan_out: bool = False, base: str | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """(tensors by key, ``adapter_config.json``) of :func:`write_peft`."""
    tensors: dict[str, Array] = {}
    errors: list[UnsupportedError | InputError] = []
    adapted = [entry for entry in entries if isinstance(entry.delta, LowRank | DoRA)]
    saved = [entry for entry in entries if isinstance(entry.delta, Replacement)]
    for entry in entries:
        try:
            found = _tensors(entry, {other.module for other in adapted})
        except UnsupportedError as error:
            errors.append(error)
            continue
        if twice := found.keys() & tensors.keys():
            errors.append(InputError(f"{entry.name}: two deltas of the adapter would be {sorted(twice)[0]!r}."))
        tensors |= found
    if any(isinstance(entry.delta, DoRA) for entry in adapted) and not all(
        isinstance(entry.delta, DoRA) for entry in adapted
    ):
        errors.append(UnsupportedError("PEFT has one use_dora for all modules, and only some of these are DoRA."))
    if errors:
        raise combined(errors)
    return tensors, _config(adapted, saved, fan_in_fan_out=fan_in_fan_out, base=base)


def _tensors(entry: Entry, adapted: set[str]) -> dict[str, Array]:
    delta, module = entry.delta, f"{_PREFIX}{entry.module}."
    if isinstance(delta, Replacement):
        inner = f"{BASE_LAYER}." if entry.module in adapted else ""
        return {f"{module}{inner}{entry.parameter}": delta.new}
    inner_delta = delta.inner if isinstance(delta, DoRA) else delta
    if type(inner_delta) is not LowRank or entry.parameter != "weight":
        raise UnsupportedError(f"{entry.name}: a {delta.kind} delta has no form in a PEFT LoRA file.")
    a, b = inner_delta.a, inner_delta.b
    if entry.fan_in_fan_out is False and a.ndim == 2:  # an embedding: ΔW = (B·A)ᵀ
        found = {f"{module}lora_embedding_A": b.T, f"{module}lora_embedding_B": a.T}
    else:
        found = {
            f"{module}lora_A.weight": a,
            f"{module}lora_B.weight": b.reshape(*b.shape, *(1,) * (a.ndim - 2)),
        }
    if isinstance(delta, DoRA):
        shape = (1, -1, *(1,) * (a.ndim - 2)) if a.ndim > 2 else (-1,)
        found[f"{module}lora_magnitude_vector"] = delta.magnitude.reshape(shape)
    return found


def _config(
    adapted: Sequence[Entry], saved: Sequence[Entry], *, fan_in_fan_out: bool, base: str | None
) -> dict[str, Any]:
    ranks = {entry.module: entry.delta.rank or 1 for entry in adapted}
    alphas = {entry.module: alpha_of(entry.delta.scale, ranks[entry.module]) for entry in adapted}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    biases = [entry for entry in saved if entry.parameter == "bias"]
    modules = sorted({entry.module for entry in saved if entry.parameter != "bias"})
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_only(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {_only(name): _number(value) for name, value in alphas.items() if value != alpha},
        "lora_dropout": 0.0,
        "use_dora": any(isinstance(entry.delta, DoRA) for entry in adapted),
        "use_rslora": False,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "all" if biases else "none",
        "target_modules": sorted(ranks),
        "modules_to_save": modules or None,
        "task_type": None,
    }


def _commonest(values: Mapping[str, Any]) -> Any:
    """The value that most modules have; the smallest of several."""
    counts = Counter(values.values())
    return min(counts, key=lambda value: (-counts[value], value)) if counts else 8


def _only(module: str) -> str:
    """A pattern that PEFT matches to this module and no other (it tries ``(.*\\.)?(KEY)$``).

    >>> _only("h.0.attn")
    '^h\\\\.0\\\\.attn'
    """
    return "^" + module.replace(".", r"\.")


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
