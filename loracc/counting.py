"""How many parameters a PEFT configuration would train on a model, before anything is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracc.errors import InputError, UnsupportedError
from loracc.json_file import read_json_object
from loracc.model import BaseModel, LoadOptions
from loracc.sites import Site

__all__ = ["count_parameters"]

#: Kinds of weights that LoRA's two factors fit.
_KINDS = ("linear", "conv", "embedding", "other")


def count_parameters(model: str | Path, config: str | Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Trainable parameters of a LoRA configuration on a model; nothing is traced and no weight is read.

    For a weight [out, in, *k] a delta of rank r has r·(in·Πk + out): of a d x d matrix 2·d·r, as in the LoRA paper,
    section 4.2. DoRA adds one magnitude an output. ``modules_to_save`` are trained whole.

    Args:
        model: Any model that loracc reads.
        config: An ``adapter_config.json``, or the folder it is in: ``r``, ``target_modules``, ``rank_pattern``,
            ``use_dora``, ``modules_to_save`` of it count.
        allow_pickle: As for :func:`loracc.load_model`.

    Returns:
        ``{"trainable", "total", "share", "sites": [{"name", "rank", "parameters"}]}``.

    Raises:
        InputError: No such configuration, or it fits no weight of the model.
        UnsupportedError: It is not of LoRA.
    """
    from loracc.sources import load_model
    from loracc.tensors import dims

    settings = _settings(Path(config))
    loaded = load_model(model, LoadOptions(allow_pickle=allow_pickle, graph=False))
    weights = [value.const_value for value in loaded.ir.graph.initializers.values() if value.const_value is not None]
    total = sum(math.prod(dims(weight)) for weight in weights)
    rows = [row for site in loaded.sites if (row := _row(site, _shape(loaded, site), settings)) is not None]
    if not rows:
        raise InputError(
            f"{config}: target_modules {settings.get('target_modules')!r} name no weight of {model}.",
            hint="loracc inspect MODEL --sites lists them.",
        )
    trainable = sum(row["parameters"] for row in rows)
    return {"trainable": trainable, "total": total, "share": trainable / total if total else 0.0, "sites": rows}


def _settings(path: Path) -> dict[str, Any]:
    file = path / "adapter_config.json" if path.is_dir() else path
    settings = read_json_object(file)
    if not isinstance(settings.get("r"), int) or settings["r"] < 1:
        raise InputError(f"{file}: not a LoRA configuration: expected an object with a rank r of 1 or more.")
    if str(settings.get("peft_type", "LORA")).upper() != "LORA":
        raise UnsupportedError(f"{file}: a configuration of {settings['peft_type']}; parameters of LORA are counted.")
    return settings


def _shape(model: BaseModel, site: Site) -> tuple[int, ...]:
    from loracc.tensors import dims

    tensor = model.ir.graph.initializers[site.initializer].const_value
    return site.layout.canonical_shape(dims(tensor)) if tensor is not None else ()


def _row(site: Site, shape: tuple[int, ...], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What one weight trains; None where nothing."""
    parts = site.module.split(".")
    above = [".".join(parts[: end + 1]) for end in range(len(parts))]  # a saved module's children are saved
    if any(_named(module, settings.get("modules_to_save") or []) for module in above):
        return {"name": site.name, "rank": None, "parameters": math.prod(shape)}
    targets = settings.get("target_modules")
    if site.parameter != "weight" or site.kind not in _KINDS or len(shape) < 2 or not _named(site.module, targets):
        return None
    rank = next(
        (r for key, r in (settings.get("rank_pattern") or {}).items() if re.fullmatch(rf"(.*\.)?({key})", site.module)),
        settings["r"],
    )
    count = rank * (math.prod(shape[1:]) + shape[0]) + (shape[0] if settings.get("use_dora") else 0)
    return {"name": site.name, "rank": rank, "parameters": count}


def _named(module: str, targets: Any) -> bool:
    """PEFT's rule: a regular expression for the whole path, or a list of endings of it."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in targets or [])
