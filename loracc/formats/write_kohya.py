"""kohya's file: ``<prefix>_<path with underscores>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``.

The module paths are kept in the file's metadata (``kohya_names.NAMES_KEY``), where other tools ignore them and loracc
finds them again; without them the names could only be read against the model. Lost: PEFT's ``fan_in_fan_out``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loracc.dtypes import Array
from loracc.errors import UnsupportedError
from loracc.formats.factors import Factors, alpha_of, refuse
from loracc.formats.kohya_names import NAMES_KEY, mangle
from loracc.formats.write_tensors import write_tensors

__all__ = ["PREFIX", "write_kohya"]

#: What sd-scripts calls the model that is not a text encoder, whatever it is.
PREFIX = "lora_unet_"


def write_kohya(factors: Sequence[Factors], path: Path) -> tuple[str, ...]:
    """Write one file; returns what was lost.

    Raises:
        UnsupportedError: Embeddings, stacked experts or DoRA (LyCORIS' has an epsilon that PEFT's has not), or two
            modules whose names would be one.
    """
    refuse("kohya's format", "embeddings", [one for one in factors if one.embedding])
    refuse("kohya's format", "stacked experts", [one for one in factors if one.stacked])
    refuse("kohya's format", "PEFT's DoRA", [one for one in factors if one.magnitude is not None])
    names: dict[str, str] = {}
    tensors: dict[str, Array] = {}
    for one in factors:
        name = f"{PREFIX}{mangle(one.module)}"
        if name in names:
            raise UnsupportedError(f"kohya's format cannot tell {names[name]} from {one.module}: both are {name}.")
        names[name] = one.module
        tensors |= {f"{name}.{tail}": np.ascontiguousarray(array) for tail, array in _tensors(one).items()}
    write_tensors(path, tensors, {NAMES_KEY: json.dumps(names, separators=(",", ":"))})
    turned = any(one.fan_in_fan_out for one in factors)
    return ("fan_in_fan_out is not kept: the model tells how its weights lie.",) if turned else ()


def _tensors(one: Factors) -> dict[str, Array]:
    alpha = np.array(alpha_of(one.s, one.rank), np.float64)
    exact = alpha.astype(np.float32)
    ones = (1,) * (one.a.ndim - 2)
    return {
        "lora_down.weight": one.a,
        "lora_up.weight": one.b.reshape(*one.b.shape, *ones),
        "alpha": exact if exact == alpha else alpha,
    }
