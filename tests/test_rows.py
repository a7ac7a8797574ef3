"""Reading rows: plain, transposed in panels, and the cheap finiteness check and rounding under them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracc import rows
from loracc.dtypes import all_finite, round_to
from loracc.rows import FileRows, TransposedRows, give_back, mapped, transpose_into


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (8, 8), (129, 40), (256, 33), (400, 17)])
def test_transpose(itemsize: int, shape: tuple[int, int]) -> None:
    source = np.random.default_rng(0).integers(0, 200, shape).astype(f"u{itemsize}")
    out = np.zeros((shape[1], shape[0]), source.dtype)
    transpose_into(source, out)
    assert (out == source.T).all()


@pytest.mark.parametrize(
    "dtype", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.int64)]
)
def test_panels_in_any_order(tmp_path: Path, dtype: np.dtype[np.generic], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PANEL_BYTES", 20_000)
    monkeypatch.setattr(rows, "_RESIDENT_BYTES", 30_000)
    matrix = np.random.default_rng(0).integers(-100, 100, (333, 210)).astype(dtype)
    (tmp_path / "w").write_bytes(b"x" * 5001 + matrix.tobytes())
    with TransposedRows(tmp_path / "w", 5001, matrix.shape, dtype, "w") as reader:
        for lo, hi in ((0, 210), (5, 6), (100, 200), (0, 50), (209, 210)):
            out = np.empty((hi - lo, 333), dtype)
            reader.fill(lo, hi, out)
            assert (out == matrix.T[lo:hi]).all()


def test_file_rows_of_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"")
    with FileRows(tmp_path / "w", 0) as reader:
        reader.fill(0, 3, np.empty((3, 0), np.float32))


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=0, max_size=20))
def test_all_finite_agrees_with_numpy(values: list[float]) -> None:
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            array = np.array(values, np.float64).astype(dtype)
        assert all_finite(array) == bool(np.isfinite(array.astype(np.float64)).all())


@given(st.floats(allow_nan=False), st.integers(-3, 3))
def test_bfloat16_from_float64_is_rounded_once(value: float, nudge: int) -> None:
    """Around every midpoint of two bfloat16 numbers, where rounding twice goes wrong."""
    with np.errstate(over="ignore"):
        near = np.array(value, np.float64).astype(np.float32)
    low = (near.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    high = (low.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    if not (np.isfinite(low) and np.isfinite(high)):
        return
    middle = (np.float64(low) + np.float64(high)) / 2
    x = middle
    for _ in range(abs(nudge)):
        x = np.nextafter(x, np.float64(np.sign(nudge)) * np.inf)
    even = low if not (int(low.view(np.uint32)) >> 16) & 1 else high
    expected = even if x == middle else (high if abs(x) > abs(middle) else low)
    result = round_to(np.array([x]), ir.DataType.BFLOAT16)
    assert result.astype(np.float32)[0] == expected


def test_rounding_keeps_what_is_not_finite() -> None:
    values = np.array([np.inf, -np.inf, np.nan, 1e300, -1e300, 3.3895313892515355e38, 1e-320, -0.0])
    result = round_to(values, ir.DataType.BFLOAT16).astype(np.float64)
    np.testing.assert_array_equal(result, [np.inf, -np.inf, np.nan, np.inf, -np.inf, 3.3895313892515355e38, 0.0, -0.0])
    assert np.signbit(result[-1])


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssFile:")[2].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own accounting")
def test_what_was_looked_at_is_given_back(tmp_path: Path) -> None:
    size = 64 << 20
    (tmp_path / "w").write_bytes(bytes(1000) + np.ones(size, np.uint8).tobytes())
    array = mapped(tmp_path / "w")[1000:].view(np.float32).reshape(-1, 1 << 20)
    before = resident_file_bytes()
    total = int(array.view(np.uint8).sum())
    assert total == size
    assert resident_file_bytes() - before > size * 0.9
    give_back(array)
    assert resident_file_bytes() - before < size * 0.1
    assert int(array.view(np.uint8).sum()) == total


def test_other_arrays_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"")
    for array in (np.ones((3, 4)), np.ones((3, 4)).T, np.ones(()), mapped(tmp_path / "w")):
        before = array.copy()
        give_back(array)
        assert (array == before).all()
