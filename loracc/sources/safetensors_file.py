"""The header of a safetensors file, read without reading a tensor.

The file is ``u64 little-endian header length | JSON header | data``; every tensor names its dtype, its shape and its
span of the data. The library loads tensors; a fold needs to know where each one lies, so that it can stay there. A
header is checked whole before anything is believed:

1. its length lies inside the file and under the format's own limit, before a byte of it is read;
2. it is UTF-8 JSON without duplicate keys;
3. each dtype is known, each shape is of non-negative integers, and shape times dtype is the span's length;
4. the spans cover the data: none outside the file, none overlapping, no hole and nothing left over.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracc.errors import InputError
from loracc.tensors import file_tensor

__all__ = ["DTYPES", "SafetensorsFile", "TensorInfo", "dtype_name", "read_header", "tensor_of"]

#: The format's dtype names that fill whole bytes.
DTYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16,
    "I8": ir.DataType.INT8,
    "U64": ir.DataType.UINT64,
    "U32": ir.DataType.UINT32,
    "U16": ir.DataType.UINT16,
    "U8": ir.DataType.UINT8,
    "C64": ir.DataType.COMPLEX64,
    "BOOL": ir.DataType.BOOL,
}

#: The limit of the format's reference reader.
_MAX_HEADER = 100_000_000
#: numpy's limit on the number of axes.
_MAX_AXES = 64
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``nbytes`` bytes at ``offset`` from the start of ``path``."""

    path: Path
    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A header.

    Attributes:
        path: The file.
        tensors: In the order of the header.
        metadata: The ``__metadata__`` strings.
        data_start: Where the data begins in the file.
    """

    path: Path
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    data_start: int = 8

    def by_name(self) -> dict[str, TensorInfo]:
        """Tensors by name."""
        return {info.name: info for info in self.tensors}


def dtype_name(dtype: ir.DataType) -> str:
    """The format's name of a dtype: ``ir.DataType.BFLOAT16`` -> ``"BF16"``; raises KeyError where it has none."""
    return {value: name for name, value in DTYPES.items()}[dtype]


def tensor_of(info: TensorInfo) -> ir.ExternalTensor:
    """The tensor, staying in its file."""
    return file_tensor(info.path, info.offset, info.nbytes, info.dtype, info.shape, info.name)


def read_header(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Read and check a safetensors header; no tensor data is read.

    Raises:
        InputError: The file is missing, truncated, not safetensors, or its header contradicts itself.
    """
    file = Path(path)
    header, data_start, size = _read_json(file)
    metadata = _metadata(file, header.pop(_METADATA, {}))
    tensors = tuple(_tensor(file, name, entry, data_start) for name, entry in header.items())
    _check_spans(file, tensors, data_start, size)
    return SafetensorsFile(file, tensors, metadata, data_start)


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, start of the data, size of the file); rules 1 and 2."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if len(start) < 8:
                raise _damaged(path, f"it has {size} bytes, too few for a safetensors header")
            length = int.from_bytes(start, "little")
            if length > min(size - 8, _MAX_HEADER):
                raise _damaged(path, f"it announces a header of {length} bytes, and the file has {size}")
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if len(text) != length:
        raise _damaged(path, "the file ends inside its header")
    return _parse(path, text), 8 + length, size


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _DuplicateKey as error:
        raise _damaged(path, f"the header names {error.args[0]!r} twice") from error
    except ValueError as error:  # not UTF-8, not JSON, or a number beyond Python's limit
        raise _damaged(path, f"the header is not UTF-8 JSON ({error})") from error
    except RecursionError as error:
        raise _damaged(path, "the header is nested too deeply") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"the header is a JSON {type(header).__name__}, expected an object")
    return header


class _DuplicateKey(Exception):
    """A JSON object with one key twice; not a ValueError, so that it is told from bad JSON."""


def _no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key)
            seen.add(key)
    return result


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, f"{_METADATA} is not an object of strings")
    return metadata


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry, checked by itself; rule 3."""
    if not _printable(name):
        raise _damaged(path, f"tensor name {name!r} is not valid Unicode")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name!r}: expected an object of dtype, shape and data_offsets, got {entry!r:.80}")
    label, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(label, str) or label not in DTYPES:
        raise InputError(
            f"{path}: tensor {name!r} has dtype {label!r:.40}, which loracc does not read.",
            hint=f"Known: {', '.join(DTYPES)}.",
        )
    if not _counts(shape) or len(shape) > _MAX_AXES:
        raise _damaged(path, f"tensor {name!r}: shape {shape!r:.80} is not a list of sizes")
    if not _counts(span) or len(span) != 2 or span[0] > span[1]:
        raise _damaged(path, f"tensor {name!r}: data_offsets {span!r:.80} are not a span")
    dtype = DTYPES[label]
    expected, got = math.prod(shape) * int(dtype.itemsize), span[1] - span[0]
    if expected != got:
        raise _damaged(path, f"tensor {name!r}: {label}{shape} takes {expected} bytes, and its span has {got}")
    return TensorInfo(path, name, dtype, tuple(shape), data_start + span[0], got)


def _check_spans(path: Path, tensors: Sequence[TensorInfo], data_start: int, size: int) -> None:
    """Rule 4."""
    at, before = data_start, "the header"
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != at:
            relation = "overlaps" if info.offset < at else "leaves a hole after"
            raise _damaged(path, f"tensor {info.name!r} {relation} {before}")
        at, before = info.offset + info.nbytes, f"tensor {info.name!r}"
        if at > size:
            raise _damaged(path, f"tensor {info.name!r} ends at byte {at}, and the file has {size}")
    if at != size:
        raise _damaged(path, f"{size - at} bytes after its last tensor belong to none")


def _counts(values: Any) -> bool:
    """Whether this is a list of non-negative integers (a bool is none)."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _printable(name: str) -> bool:
    """Whether a name can be written: JSON may hold half of a surrogate pair."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path}: not a sound safetensors file: {problem}.",
        hint="The file is damaged, truncated or of another kind: fetch it again.",
    )
