"""The safetensors header reader against the reference writer, and against headers that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from loracc.errors import InputError
from loracc.sources.safetensors_file import DTYPES, dtype_name, read_header, tensor_of


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), span: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@pytest.mark.parametrize(
    "dtype",
    [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_],
)
def test_tensors_read_back_from_their_spans(tmp_path: Path, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "b.weight": rng.integers(0, 2, (3, 4)).astype(dtype),
        "a": rng.integers(0, 2, ()).astype(dtype),
        "empty": np.zeros((0, 3), dtype),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = read_header(tmp_path / "x.safetensors")
    assert read.metadata == {"format": "pt"}
    assert {info.name for info in read.tensors} == set(arrays)
    for info in read.tensors:
        tensor = tensor_of(info)
        assert tensor.name == info.name
        np.testing.assert_array_equal(tensor.numpy(), arrays[info.name])
        assert tensor.numpy().dtype == arrays[info.name].dtype


def test_order_is_the_headers_own(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"z": entry(span=(8, 16)), "a": entry(span=(0, 8))}, bytes(16))
    assert [(info.name, info.offset - read_header(path).data_start) for info in read_header(path).tensors] == [
        ("z", 8),
        ("a", 0),
    ]


def test_eight_bit_floats_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"w": entry("F8_E4M3", (2,), (0, 2))}, b"\x38\x40")
    tensor = tensor_of(read_header(path).tensors[0])
    assert tensor.dtype == ir.DataType.FLOAT8E4M3FN
    assert tensor.numpy().astype(np.float32).tolist() == [1.0, 2.0]


def test_dtype_names_are_one_to_one() -> None:
    assert {name: dtype_name(dtype) for name, dtype in DTYPES.items()} == {name: name for name in DTYPES}


HOSTILE: dict[str, tuple[object, bytes, int | None, str]] = {
    "header longer than the file": ({}, b"", 1 << 62, "announces a header of 4611686018427387904 bytes"),
    "header over the limit": ({}, b"", (1 << 64) - 1, "announces a header"),
    "not JSON": (b"{nope", b"", None, "not UTF-8 JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "not UTF-8 JSON"),
    "number of 5000 digits": (b'{"w": ' + b"9" * 5000 + b"}", b"", None, "not UTF-8 JSON"),
    "nested": (b'{"w":' + b"[" * 200_000, b"", None, "nested too deeply"),
    "a list": ([1], b"", None, "JSON list"),
    "duplicate tensor": (
        b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"",
        None,
        "names 'w' twice",
    ),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    "half a surrogate pair": (
        b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"",
        None,
        "not valid Unicode",
    ),
    "entry without shape": ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), None, "expected an object"),
    "unknown dtype": ({"w": entry("F9")}, bytes(8), None, "'F9'"),
    "dtype not a string": ({"w": {**entry(), "dtype": ["F32"]}}, bytes(8), None, "does not read"),
    "negative size": ({"w": entry(shape=(-2,))}, bytes(8), None, "not a list of sizes"),
    "size true": ({"w": entry(shape=(True, 2))}, bytes(8), None, "not a list of sizes"),
    "fractional size": ({"w": entry(shape=(2.0,))}, bytes(8), None, "not a list of sizes"),
    "negative offset": ({"w": entry(span=(-8, 0))}, bytes(8), None, "not a span"),
    "reversed span": ({"w": entry(span=(8, 0))}, bytes(8), None, "not a span"),
    "three offsets": ({"w": entry(span=(0, 4, 8))}, bytes(8), None, "not a span"),
    "shape against span": ({"w": entry(shape=(3,))}, bytes(8), None, "takes 12 bytes, and its span has 8"),
    "product beyond 64 bits": ({"w": entry(shape=(1 << 40, 1 << 40))}, bytes(8), None, "its span has 8"),
    "data truncated": ({"w": entry()}, bytes(7), None, "the file has"),
    "data left over": ({"w": entry()}, bytes(9), None, "1 bytes after its last tensor"),
    "overlap": ({"v": entry(), "w": entry(span=(4, 12))}, bytes(12), None, "'w' overlaps tensor 'v'"),
    "hole": ({"v": entry(), "w": entry(span=(9, 17))}, bytes(17), None, "'w' leaves a hole after tensor 'v'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    header, data, length, problem = HOSTILE[case]
    path = write(tmp_path / "hostile.safetensors", header, data, length)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert problem in str(caught.value)
    assert "hostile.safetensors" in str(caught.value)


def test_missing_and_tiny_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.safetensors: cannot be read: No such file"):
        read_header(tmp_path / "gone.safetensors")
    (tmp_path / "tiny.safetensors").write_bytes(b"abc")
    with pytest.raises(InputError, match=r"tiny\.safetensors.*3 bytes"):
        read_header(tmp_path / "tiny.safetensors")
