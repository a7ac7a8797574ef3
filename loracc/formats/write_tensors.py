"""A small safetensors file, as readable as any other: ``safetensors.numpy.save_file`` makes it the owner's alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.numpy import save

from loracc.dtypes import Array

__all__ = ["write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and header metadata; the bytes are made in memory."""
    path.write_bytes(save(dict(tensors), dict(metadata) if metadata is not None else None))
