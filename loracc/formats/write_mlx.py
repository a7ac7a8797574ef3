"""mlx-lm's folder: ``adapter_config.json`` of its own schema and ``adapters.safetensors``.

mlx-lm has one rank and one scale for all modules. Lost: alpha and rank apart (their quotient is kept as ``scale``), and
what PEFT's ``fan_in_fan_out`` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loracc.dtypes import Array
from loracc.errors import UnsupportedError
from loracc.formats.adapter_source import CONFIG
from loracc.formats.factors import Factors, refuse
from loracc.formats.write_tensors import write_tensors

__all__ = ["write_mlx"]

_LAYER = re.compile(r"^(?:.*\.)?layers\.(\d+)\.(.+)$")


def write_mlx(factors: Sequence[Factors], folder: Path) -> tuple[str, ...]:
    """Write into a folder that exists; returns what was lost.

    Raises:
        UnsupportedError: Convolutions, several ranks or scales, a magnitude that is not one for each row of the weight,
            or DoRA on some modules only.
    """
    refuse("MLX's format", "convolutions", [one for one in factors if one.convolution])
    decomposed = [one for one in factors if one.magnitude is not None]
    refuse("MLX's format", "a DoRA magnitude on this axis", [one for one in decomposed if one.axis != 0])
    if decomposed:
        plain = [one for one in factors if one.magnitude is None]
        refuse("MLX's format", "modules without DoRA beside others with it", plain)
    for what, values in (("rank", {one.rank for one in factors}), ("scale", {one.s for one in factors})):
        if len(values) > 1:
            listed = ", ".join(f"{value:g}" for value in sorted(values))
            raise UnsupportedError(f"MLX's format has one {what} for all modules, and this adapter has {listed}.")
    tensors = {key: np.ascontiguousarray(array) for one in factors for key, array in _tensors(one).items()}
    write_tensors(folder / "adapters.safetensors", tensors)
    (folder / CONFIG).write_text(json.dumps(_config(factors), indent=4) + "\n", encoding="utf-8")
    turned = any(one.fan_in_fan_out for one in factors)
    return ("fan_in_fan_out is not kept: the model tells how its weights lie.",) if turned else ()


def _tensors(one: Factors) -> dict[str, Array]:
    if one.stacked:
        a, b = one.a, one.b
    else:
        a, b = (one.b, one.a) if one.embedding else (one.a.T, one.b.T)
    tensors = {f"{one.module}.lora_a": a, f"{one.module}.lora_b": b}
    return tensors if one.magnitude is None else {**tensors, f"{one.module}.m": one.magnitude}


def _config(factors: Sequence[Factors]) -> dict[str, Any]:
    """mlx-lm adapts the modules named in ``keys``: in each of the last ``num_layers`` blocks, or by whole path."""
    matches = [_LAYER.match(one.module) for one in factors]
    keys = {match[2] if match else one.module for match, one in zip(matches, factors, strict=True)}
    blocks = [int(match[1]) for match in matches if match]
    return {
        "fine_tune_type": "dora" if factors[0].magnitude is not None else "lora",
        "num_layers": max(blocks) + 1 if blocks else 0,
        "lora_parameters": {"rank": factors[0].rank, "scale": factors[0].s, "dropout": 0.0, "keys": sorted(keys)},
    }
