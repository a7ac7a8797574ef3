"""Every tensor of an ONNX file, checked before the graph is built: shape against data, data against the file.

onnx_ir reads what the file says when a tensor is used, and the protobuf's own reader believes every header. Here:

1. a tensor's dtype is known and its axes are not negative;
2. inline data has exactly the bytes that shape and dtype take;
3. external data lies in the model's folder: a relative location, no "..", and no link that leads out;
4. its span lies inside its file and has exactly the bytes that shape and dtype take.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import onnx
import onnx_ir as ir

from loracc.errors import InputError

__all__ = ["check_tensors"]

#: The typed field that holds a dtype's values where ``raw_data`` does not, and how many entries one element takes.
_TYPED: dict[int, tuple[str, int]] = {
    ir.DataType.FLOAT: ("float_data", 1),
    ir.DataType.COMPLEX64: ("float_data", 2),
    ir.DataType.DOUBLE: ("double_data", 1),
    ir.DataType.COMPLEX128: ("double_data", 2),
    ir.DataType.INT64: ("int64_data", 1),
    ir.DataType.UINT32: ("uint64_data", 1),
    ir.DataType.UINT64: ("uint64_data", 1),
    ir.DataType.STRING: ("string_data", 1),
}
_LARGEST = 1 << 62


def check_tensors(path: Path, proto: onnx.ModelProto) -> None:
    """Check every tensor, and point each external one at its file's absolute path.

    Args:
        path: The ONNX file.
        proto: Its content; ``location``, ``offset`` and ``length`` of external tensors are filled in.

    Raises:
        InputError: Lists every tensor that is not sound.
    """
    problems: list[str] = []
    for tensor in _tensors(proto):
        try:
            _check(path, tensor)
        except InputError as error:
            problems.append(error.message)
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        listing = "\n  ".join(problems[:10])
        raise InputError(
            f"{path}: the model's tensors are not sound:\n  {listing}{more}",
            hint="Fetch the model again, with its external data beside it.",
        )


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: object) -> Iterator[onnx.TensorProto]:
    for node in nodes:  # type: ignore[attr-defined]  # a repeated field has no importable type
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _graph_tensors(attribute.g)
            for graph in attribute.graphs:
                yield from _graph_tensors(graph)


def _check(path: Path, tensor: onnx.TensorProto) -> None:
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise InputError(f"tensor {tensor.name!r}: unknown dtype number {tensor.data_type}") from error
    if dtype == ir.DataType.UNDEFINED or any(size < 0 for size in tensor.dims):
        raise InputError(f"tensor {tensor.name!r}: {dtype.name}{list(tensor.dims)} is not a tensor's dtype and shape")
    count = math.prod(tensor.dims)
    if count > _LARGEST:
        raise InputError(f"tensor {tensor.name!r}: shape {list(tensor.dims)} is beyond any memory")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(path, tensor, dtype, count)
    else:
        _check_inline(tensor, dtype, count)


def _check_inline(tensor: onnx.TensorProto, dtype: ir.DataType, count: int) -> None:
    if tensor.HasField("raw_data"):
        if dtype == ir.DataType.STRING:
            raise InputError(f"tensor {tensor.name!r}: strings in raw_data")
        got, expected, unit = len(tensor.raw_data), _nbytes(dtype, count), "bytes"
    else:
        field, entries = _TYPED.get(dtype, ("int32_data", 1))
        got, expected, unit = len(getattr(tensor, field)), entries * count, f"entries of {field}"
        if dtype != ir.DataType.STRING and dtype.bitwidth < 8:  # packed, one byte an entry
            expected = _nbytes(dtype, count)
    if got != expected:
        raise InputError(
            f"tensor {tensor.name!r}: {dtype.name}{list(tensor.dims)} takes {expected} {unit}, and the file holds {got}"
        )


def _check_external(path: Path, tensor: onnx.TensorProto, dtype: ir.DataType, count: int) -> None:
    entries = {entry.key: entry for entry in tensor.external_data}
    if "location" not in entries or dtype == ir.DataType.STRING:
        raise InputError(f"tensor {tensor.name!r}: external data without a location")
    data = _data_file(path, tensor.name, entries["location"].value)
    expected = _nbytes(dtype, count)
    offset = _number(tensor.name, entries, "offset", 0)
    length = _number(tensor.name, entries, "length", expected)
    if length != expected:
        raise InputError(
            f"tensor {tensor.name!r}: {dtype.name}{list(tensor.dims)} takes {expected} bytes, its length says {length}"
        )
    size = data.stat().st_size
    if offset + length > size:
        raise InputError(f"tensor {tensor.name!r}: ends at byte {offset + length} of {data.name}, which has {size}")
    del tensor.external_data[:]
    for key, value in (("location", str(data)), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _number(name: str, entries: dict[str, onnx.StringStringEntryProto], key: str, default: int) -> int:
    text = entries[key].value if key in entries else str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InputError(f"tensor {name!r}: external {key} {text!r:.40} is not a number of bytes")
    return int(text)


def _data_file(path: Path, name: str, location: str) -> Path:
    """The real path of a data file; rule 3.

    The model's folder is where the model is named and, where that is a link (a hub's cache), where it leads: there the
    blobs lie side by side.
    """
    inside = Path(location)
    foreign = inside.is_absolute() or PureWindowsPath(location).drive or PureWindowsPath(location).root
    if not location or "\0" in location or foreign or ".." in inside.parts or ".." in PureWindowsPath(location).parts:
        raise InputError(
            f"tensor {name!r}: its external data {location!r:.120} is not a path inside the model's folder"
        )
    real = Path(os.path.realpath(path.parent / inside))
    folders = (Path(os.path.realpath(path.parent)), Path(os.path.realpath(path)).parent)
    if not any(real.is_relative_to(folder) for folder in folders):
        raise InputError(
            f"tensor {name!r}: its external data {location!r:.120} is a link that leaves the model's folder"
        )
    if not real.is_file():
        raise InputError(f"tensor {name!r}: its data file {str(path.parent / inside)!r} is missing")
    return real


def _nbytes(dtype: ir.DataType, count: int) -> int:
    return (count * dtype.bitwidth + 7) // 8
