"""GGUF files through the ``gguf`` package: what an adapter's header says, and its tensors as floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from loracc.dtypes import Array
from loracc.errors import InputError, require

__all__ = ["has_gguf_magic", "read_gguf"]


def has_gguf_magic(path: Path) -> bool:
    """Whether the file begins as GGUF does."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors with numpy's order of axes, scalar metadata as strings). Quantised tensors come out as float32.

    Raises:
        InputError: The file is damaged.
        MissingExtraError: The ``gguf`` package is not installed.
    """
    gguf: Any = require("gguf", "read GGUF adapters")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: _text(field) for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        return {tensor.name: _array(gguf, tensor) for tensor in reader.tensors}, metadata
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, AttributeError, MemoryError) as error:
        # The reader indexes a memory map by what the file says; a damaged one fails in any of these ways.
        raise InputError(f"{path}: not a sound GGUF file ({error}).", hint="Fetch the file again.") from error


def _text(field: Any) -> str:
    value = field.contents()
    return value if isinstance(value, str) else repr(value)


def _array(gguf: Any, tensor: Any) -> Array:
    kinds = gguf.GGMLQuantizationType
    if tensor.tensor_type in (kinds.F32, kinds.F16, kinds.F64):
        return np.array(tensor.data)
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    return values.astype(ml_dtypes.bfloat16) if tensor.tensor_type == kinds.BF16 else values
