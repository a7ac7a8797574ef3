"""Inputs that the user gives, in their three spellings."""

from __future__ import annotations

import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from loracc.errors import InputError
from loracc.model import LoadOptions
from loracc.sources.user_inputs import (
    DynamicSpec,
    InputSpec,
    given_inputs,
    parse_dynamic_spec,
    parse_input_spec,
    read_npz,
    sample_array,
)


def test_specs() -> None:
    assert parse_input_spec("x:float32[2, 16]") == InputSpec("x", np.dtype(np.float32), (2, 16))
    assert parse_input_spec("serving:0:int64[1]") == InputSpec("serving:0", np.dtype(np.int64), (1,))
    assert parse_input_spec("t:bool[]") == InputSpec("t", np.dtype(np.bool_), ())
    assert parse_input_spec("x:bfloat16[3]").dtype == ml_dtypes.bfloat16
    assert parse_dynamic_spec("x:0=batch") == DynamicSpec("x", 0, "batch")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x", "NAME:DTYPE"),
        ("x:float32", "NAME:DTYPE"),
        (":float32[2]", "NAME:DTYPE"),
        ("x:float99[2]", "unknown dtype 'float99'"),
        ("x:float32[0]", "positive"),
        ("x:float32[2,,3]", "positive"),
        ("x:float32[-1]", "NAME:DTYPE"),
        ("x:float32[9999999999999]", "positive"),
        ("x:float32[100000,100000]", "too many"),
    ],
)
def test_bad_specs(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse_input_spec(text)


@pytest.mark.parametrize("text", ["x", "x:1", "x:a=b", "x:1=2b", "x:-1=b", ":1=b"])
def test_bad_dynamic_specs(text: str) -> None:
    with pytest.raises(InputError, match="NAME:AXIS=SYMBOL"):
        parse_dynamic_spec(text)


def test_samples_are_reproducible_and_in_range() -> None:
    ids = InputSpec("ids", np.dtype(np.int64), (500,))
    array = sample_array(ids, (3, 7))
    assert array.dtype == np.int64
    assert set(array.tolist()) == {3, 4, 5, 6}
    np.testing.assert_array_equal(array, sample_array(ids, (3, 7)))
    other = InputSpec("mask", np.dtype(np.int64), (500,))
    assert not np.array_equal(array, sample_array(other, (3, 7)))
    assert sample_array(InputSpec("b", np.dtype(np.bool_), (9,))).dtype == np.bool_


def test_npz_and_specs_together(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.arange(3.0), y=np.ones((2, 2), np.int32))
    given = given_inputs(LoadOptions(inputs=("z:float32[2]",), inputs_file=str(tmp_path / "in.npz")))
    assert list(given) == ["x", "y", "z"]
    np.testing.assert_array_equal(given["x"], np.arange(3.0))
    with pytest.raises(InputError, match="'x' is given twice"):
        given_inputs(LoadOptions(inputs=("x:float32[2]",), inputs_file=str(tmp_path / "in.npz")))


def test_npz_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    with pytest.raises(InputError, match="cannot be read"):
        read_npz(path)
    path.write_bytes(b"no zip")
    with pytest.raises(InputError, match="not a sound"):
        read_npz(path)
    np.savez(path, x=np.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not a sound"):
        read_npz(path)


def test_npz_header_is_checked_before_memory_is_taken(tmp_path: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}"
    header += b" " * (118 - len(header) - 1) + b"\n"
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8))
    with pytest.raises(InputError, match="does not fit its"):
        read_npz(tmp_path / "in.npz")
