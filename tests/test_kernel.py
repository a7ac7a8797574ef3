"""The compiled inner loop: the bits of numpy's way, whatever the shapes, and never a wrong buffer.

Where the kernel was not built these are skipped; that it is built where there is a compiler is tested with the wheel.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracc import folded, fused
from loracc.deltas import LowRank
from loracc.dtypes import Array
from loracc.errors import NumericsError
from loracc.folded import Binding, FoldedTensor
from loracc.kernel import Product, has_kernel
from loracc.sites import Layout, Site

_kernels: Any = pytest.importorskip("loracc._kernels", reason="the kernel is not built here")

SUMS: dict[Any, Any] = {np.dtype(ml_dtypes.bfloat16): np.dtype(np.float32), np.dtype(np.float32): np.dtype(np.float64)}
BF16, FP32 = SUMS
TRANSPOSED = Layout(perm=(1, 0))

pytestmark = pytest.mark.skipif(not all(map(has_kernel, SUMS, SUMS.values())), reason="no kernel for this processor")


def bind(delta: LowRank, layout: Layout | None = None) -> Binding:
    return Binding(Site("m", "weight", "linear", "w", layout or Layout()), delta, "a", "m.weight", "name")


def lora(out: int, fan_in: int, rank: int, seed: int = 0) -> LowRank:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rank, fan_in)).astype(np.float32)
    return LowRank(a, (rng.standard_normal((out, rank)) * 0.1).astype(np.float32), 0.5)


def weight(shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    return (np.random.default_rng(7).standard_normal(shape) * 0.05).astype(dtype)


def tensor_of(base: Array, *bindings: Binding) -> FoldedTensor:
    return FoldedTensor(ir.tensor(base, dtype=ir.DataType.from_numpy(base.dtype), name="w"), bindings)


@pytest.fixture(autouse=True)
def short_sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a large weight."""
    monkeypatch.setattr(folded, "_FLOAT32_ELEMENTS", 0)


@given(
    dtype=st.sampled_from(list(SUMS)),
    rows=st.integers(1, 20),
    columns=st.integers(1, 150),
    rank=st.integers(1, 20),
    row=st.integers(0, 3),
    column=st.integers(0, 3),
)
def test_a_rectangle_against_an_exact_sum(
    dtype: np.dtype[Any], rows: int, columns: int, rank: int, row: int, column: int
) -> None:
    sums = SUMS[dtype]
    rng = np.random.default_rng(rows * columns + rank)
    left, right = (rng.standard_normal(shape).astype(sums) for shape in ((rows, rank), (rank, columns)))
    tile = weight((rows + row + 2, columns + column + 1), dtype)
    before = tile.copy()
    assert Product(left, right, row, column, dtype).add_to(tile, 0)
    here = (slice(row, row + rows), slice(column, column + columns))
    exact = before[here].astype(np.longdouble) + left.astype(np.longdouble) @ right.astype(np.longdouble)
    # Half a unit in the last place for the rounding, and what a sum of so many terms may be off.
    bound = np.abs(exact) * float(ml_dtypes.finfo(dtype).eps) / 2  # type: ignore[no-untyped-call]  # untyped upstream
    terms = np.abs(before[here].astype(np.longdouble)) + np.abs(left).astype(np.longdouble) @ np.abs(right)
    bound = bound + terms * (rank + 2) * float(np.finfo(sums).eps)
    assert (np.abs(tile[here].astype(np.longdouble) - exact) <= bound).all()
    before[here] = tile[here]
    assert tile.tobytes() == before.tobytes()  # nothing else was touched


@pytest.mark.parametrize("dtype", SUMS, ids=str)
@pytest.mark.parametrize("layout", [Layout(), TRANSPOSED], ids=["rows", "transposed"])
def test_the_bits_of_numpy(dtype: np.dtype[Any], layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    base = weight((300, 500), dtype)
    out, fan_in = layout.canonical_shape(base.shape)
    tensor = tensor_of(base, bind(lora(out, fan_in, 16), layout))
    calls = []
    add_to = Product.add_to

    def counted(self: Product, tile: Array, lo: int) -> bool:
        calls.append(lo)
        return add_to(self, tile, lo)

    monkeypatch.setattr(Product, "add_to", counted)
    here = tensor.numpy()
    assert calls
    monkeypatch.setattr(fused, "has_kernel", lambda *dtypes: False)
    assert (tensor.numpy().view(np.uint8) == here.view(np.uint8)).mean() >= 0.9999  # all, with OpenBLAS
    assert len(calls) == 1


def test_blocks_of_a_fused_weight() -> None:
    base = weight((90, 70), FP32)
    q, v = lora(30, 70, 4, 1), lora(30, 70, 4, 2)
    rows = tensor_of(base, bind(q, Layout(stop=30)), bind(v, Layout(start=60))).numpy()
    columns = tensor_of(
        np.ascontiguousarray(base.T), bind(q, Layout((1, 0), 0, 30)), bind(v, Layout((1, 0), 60))
    ).numpy()
    assert rows.tobytes() == np.ascontiguousarray(columns.T).tobytes()
    assert rows[30:60].tobytes() == base[30:60].tobytes()
    np.testing.assert_allclose(rows[:30], base[:30] + 0.5 * q.b @ q.a, atol=1e-6)
    np.testing.assert_allclose(rows[60:], base[60:] + 0.5 * v.b @ v.a, atol=1e-6)


def test_what_is_no_product_of_two_factors_is_left_to_numpy() -> None:
    one, two = bind(lora(8, 9, 2, 1)), bind(lora(8, 9, 2, 2))
    assert fused.products_of([one], (8, 9), FP32, SUMS[FP32]) is not None
    assert fused.products_of([one, two], (8, 9), FP32, SUMS[FP32]) is None  # rounded together
    assert fused.products_of([one], (8, 9), FP32, SUMS[BF16]) is None  # sums that the kernel does not form
    assert fused.products_of([], (8, 9), FP32, SUMS[FP32]) is None


@pytest.mark.parametrize("dtype", SUMS, ids=str)
@pytest.mark.parametrize("where", [(0, 0), (7, 69), (5, 64)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(dtype: np.dtype[Any], where: tuple[int, int], bad: float) -> None:
    base = weight((8, 70), dtype)
    base[where] = bad
    with pytest.raises(NumericsError, match=r"m\.weight"):
        tensor_of(base, bind(lora(8, 70, 3))).numpy()


@pytest.mark.parametrize("dtype", SUMS, ids=str)
def test_the_largest_number_stays_and_what_rounds_up_from_it_does_not(dtype: np.dtype[Any]) -> None:
    largest = ml_dtypes.finfo(dtype).max  # type: ignore[no-untyped-call]  # untyped upstream
    base = np.full((1, 64), largest, dtype)
    ulp = float(largest) - float(np.nextafter(largest, dtype.type(0)))
    for part, finite in ((0.49, True), (0.5, False)):
        factors = (np.array([[part * ulp]], SUMS[dtype]), np.ones((1, 64), SUMS[dtype]))
        assert Product(*factors, 0, 0, dtype).add_to(base.copy(), 0) is finite


def test_buffers_that_do_not_fit_are_refused() -> None:
    width = _kernels.width("float32")
    left, packed = np.ones((2, 3)), np.ones((1, 3, width))
    arguments: list[Any] = ["float32", np.zeros((2, 5), np.float32), 0, 2, 5, 5, left, packed, 3]
    assert _kernels.fold(*arguments)
    for index, wrong in ((1, np.zeros(9, np.float32)), (2, 1), (2, -1), (3, 3), (4, 6), (5, 4), (6, left[:1]), (8, 2)):
        changed = [*arguments[:index], wrong, *arguments[index + 1 :]]
        with pytest.raises(ValueError):
            _kernels.fold(*changed)
    with pytest.raises((TypeError, BufferError, ValueError)):
        _kernels.fold("float32", bytes(40), *arguments[2:])
    assert _kernels.width("float16") == 0
