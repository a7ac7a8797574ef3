"""An adapter's tensors. Every one is looked at before anything is done with it, and none is kept in memory for that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from loracc.dtypes import Array, all_finite
from loracc.errors import InputError, NumericsError, require
from loracc.formats.gguf_file import read_gguf
from loracc.formats.onnx_adapter_file import has_adapter_magic, read_parameters
from loracc.rows import give_back, mapped
from loracc.sources.safetensors_file import TensorInfo, read_header
from loracc.sources.sniff_bytes import foreign_kind, looks_like_safetensors

__all__ = ["check_tensors", "digest_of", "read_tensors", "some"]

_FLOATS = tuple(np.dtype(name) for name in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


def read_tensors(path: Path, *, allow_pickle: bool = False) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors of a file in their own dtypes, in the file's order, and its metadata strings.

    The kind of file is told by its bytes: safetensors, what ``torch.save`` writes, GGUF, or ONNX Runtime's adapters.

    Raises:
        InputError: Missing, truncated, of another kind, or more than tensors without ``allow_pickle``.
        MissingExtraError: The package that reads the file is not installed.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if not start:
        raise InputError(f"{path}: the file is empty.", hint="Fetch it again.")
    if not looks_like_safetensors(start) and start.startswith((b"PK", b"\x80")):
        return _read_torch(path, allow_pickle), {}
    if start.startswith(b"GGUF"):
        return read_gguf(path)
    if has_adapter_magic(path):
        return read_parameters(path), {}
    if not looks_like_safetensors(start) and (foreign := foreign_kind(start)):
        raise InputError(f"{path}: this is {foreign[0]}, and no adapter.", hint=foreign[1])
    header = read_header(path)
    data = mapped(path)
    return {info.name: _view(data, info) for info in header.tensors}, header.metadata


def _view(data: Array, info: TensorInfo) -> Array:
    """One tensor of the mapped file; a copy where it begins between two elements."""
    array: Array = data[info.offset : info.offset + info.nbytes].view(info.dtype.numpy()).reshape(info.shape)
    return array if array.flags.aligned else array.copy()


def _read_torch(path: Path, allow_pickle: bool) -> dict[str, Array]:
    if not allow_pickle:
        from loracc.sources.torch_checkpoint import read_state_dict

        return {key: np.array(tensor.numpy()) for key, tensor in read_state_dict(path).items()}
    require("torch", "read .bin and .pt adapters")
    import torch

    from loracc.sources.torch_tensors import plain_tensors

    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs the file's own code, which may raise anything
        raise InputError(f"{path}: torch cannot load it ({type(error).__name__}: {error}).") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: holds more than tensors, and an adapter is a dictionary of tensors.")
    named = plain_tensors(path, {str(key): value for key, value in state.items()})
    return {key: np.array(tensor.numpy()) for key, tensor in named.items()}


def check_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Refuse what no delta can be made of.

    Raises:
        InputError: A tensor is empty or not of a float dtype.
        NumericsError: A tensor holds inf or NaN.
    """
    if not tensors:
        raise InputError(f"{path}: the file holds no tensors.", hint="Save the adapter again.")
    empty = [f"{key} {list(array.shape)}" for key, array in tensors.items() if not array.size]
    if empty:
        raise InputError(
            f"{path}: {len(empty)} tensors are empty: {some(empty)}.",
            hint="DeepSpeed ZeRO-3 and FSDP write these when the shards are not gathered before saving.",
        )
    odd = [f"{key} ({array.dtype})" for key, array in tensors.items() if array.dtype not in _FLOATS]
    if odd:
        raise InputError(
            f"{path}: {len(odd)} tensors are not of a float dtype: {some(odd)}.",
            hint="Adapter tensors are float16, bfloat16, float32 or float64: dequantise or save again.",
        )
    broken = [key for key, array in tensors.items() if not _finite(array)]
    if broken:
        raise NumericsError(
            f"{path}: {len(broken)} tensors hold inf or NaN: {some(broken)}.",
            hint="The adapter is damaged, or its training diverged.",
        )


def _finite(array: Array) -> bool:
    finite = all_finite(array)
    give_back(array)
    return finite


def digest_of(tensors: Mapping[str, Array], facts: Mapping[str, Any]) -> Callable[[], str]:
    """sha256 over the tensors (key, dtype, shape, bytes; sorted by key) and what else decides the result.

    It is computed when it is first asked for: a merged checkpoint, for one, records none.
    """

    @cache
    def digested() -> str:
        digest = hashlib.sha256()
        for key in sorted(tensors):
            array = tensors[key]
            digest.update(json.dumps([key, str(array.dtype), list(array.shape)]).encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            give_back(array)
        digest.update(json.dumps(dict(facts), sort_keys=True, separators=(",", ":"), default=str).encode())
        return digest.hexdigest()

    return digested


def some(names: Iterable[str], limit: int = 20) -> str:
    """The first names of a list, and how many more there are.

    >>> some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    listed = list(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest
