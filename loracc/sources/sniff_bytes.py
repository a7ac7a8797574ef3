"""Kinds of files by their first bytes, and ONNX by the walk over its top-level protobuf fields."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from loracc.errors import InputError

__all__ = ["foreign_kind", "is_onnx", "looks_like_safetensors"]

#: (offset, bytes) -> (what it is, what to do); what loracc knows and does not take as a model.
_FOREIGN: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer and not the file itself", "Fetch the file: git lfs pull"),
    (0, b"<!DOCTYPE", "a web page", "The download went wrong: fetch the file itself."),
    (0, b"<!doctype", "a web page", "The download went wrong: fetch the file itself."),
    (0, b"<html", "a web page", "The download went wrong: fetch the file itself."),
    (0, b"GGUF", "a GGUF file (llama.cpp)", "Give the Hugging Face folder that it was converted from."),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", "Export the model to ONNX first."),
    (0, b"ftrt", "a TensorRT engine", "Give the ONNX model that it was built from."),
    (0, b"ptrt", "a TensorRT engine", "Give the ONNX model that it was built from."),
    (4, b"TORT", "an ONNX Runtime adapter (.onnx_adapter)", "Name the base model first, then the adapter."),
    (4, b"ORTM", "an ONNX Runtime .ort model", "Give the ONNX model that it was converted from."),
    (4, b"TFL3", "a TensorFlow Lite model", "Export the model to ONNX first."),
    (0, b"\x93NUMPY", "a NumPy array", "Inputs are given with --inputs FILE.npz."),
    (0, b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (0, b"7z\xbc\xaf", "a 7z archive", "Unpack it first."),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", "Unpack it first."),
    (257, b"ustar", "a tar archive", "Unpack it first."),
)

#: ModelProto's fields: number -> wire type (0 varint, 2 length-delimited); onnx.proto, IR version 13.
_MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_IR_VERSION, _GRAPH = 1, 7
_LENGTH_DELIMITED = 2


def foreign_kind(start: bytes) -> tuple[str, str] | None:
    """(what it is, what to do) for a known kind that is no model for loracc; None for everything else."""
    for offset, magic, what, mend in _FOREIGN:
        if start[offset : offset + len(magic)] == magic:
            return what, mend
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a plain Python pickle, which torch.save did not write", "Save the model with torch.export.save."
    return None


def looks_like_safetensors(start: bytes) -> bool:
    """A header length, and the brace that every header begins with. A protobuf has no such length there."""
    return start[8:9] == b"{" and start[5:8] == b"\0\0\0"


def is_onnx(path: Path, file: BinaryIO, size: int) -> bool:
    """Whether the file is a ModelProto: known fields only, each of its wire type, one of them the graph.

    Nothing but tags and lengths is read.

    Raises:
        InputError: It is one as far as it goes, and it ends too early.
    """
    seen: set[int] = set()
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(20)
        tag, used = _varint(head, 0)
        value, after = _varint(head, used)
        whole = 0 < used < after
        if whole and _MODEL_FIELDS.get(tag >> 3) != tag & 7:
            return False
        at += after + (value if tag & 7 == _LENGTH_DELIMITED else 0)
        if not whole or at > size:
            if _IR_VERSION in seen:  # it began as a model, and is cut short
                raise _cut_short(path, max(at, size + 1), size)
            return False
        seen.add(tag >> 3)
    return _GRAPH in seen


def _cut_short(path: Path, end: int, size: int) -> InputError:
    return InputError(
        f"{path}: an ONNX model that is cut short: it goes on to byte {end} at least, and the file has {size}.",
        hint="Fetch or export the model again.",
    )


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position after it); the position stays where there is no whole varint."""
    value = 0
    for index, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    return 0, at
