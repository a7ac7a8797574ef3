"""The compiled inner loop: the bits of numpy's way, whatever the shapes, and never a wrong buffer.

Where the kernel was not built these are skipped; that it is built where there is a compiler is tested with the wheel.
"""

from __future__ import annotations

import importlib
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracc import folded, fused, kernel
from loracc.deltas import LowRank
from loracc.dtypes import Array, round_to
from loracc.errors import NumericsError
from loracc.folded import Binding, FoldedTensor
from loracc.kernel import Product, has_kernel
from loracc.sites import Layout, Site

_kernels: Any = pytest.importorskip("loracc._kernels", reason="the kernel is not built here")

BF16, FP16, FP32 = (np.dtype(dtype) for dtype in (ml_dtypes.bfloat16, np.float16, np.float32))
SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
#: (dtype of the weight, dtype of the sums)
KERNELS: list[tuple[np.dtype[Any], np.dtype[Any]]] = [(BF16, SINGLE), (BF16, DOUBLE), (FP16, DOUBLE), (FP32, DOUBLE)]
each_kernel = pytest.mark.parametrize(("dtype", "sums"), KERNELS, ids=lambda dtype: str(dtype))
TRANSPOSED = Layout(perm=(1, 0))

pytestmark = pytest.mark.skipif(not all(has_kernel(*pair) for pair in KERNELS), reason="no kernel for this processor")


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


def sums_in(sums: np.dtype[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sums for bfloat16 weights in float32, as for a large one, or in float64, as for a small one."""
    monkeypatch.setattr(folded, "_FLOAT32_ELEMENTS", 0 if sums == SINGLE else 1 << 20)


@given(
    pair=st.sampled_from(KERNELS),
    rows=st.integers(1, 20),
    columns=st.integers(1, 150),
    rank=st.integers(1, 20),
    row=st.integers(0, 3),
    column=st.integers(0, 3),
)
def test_a_rectangle_against_an_exact_sum(
    pair: tuple[np.dtype[Any], np.dtype[Any]], rows: int, columns: int, rank: int, row: int, column: int
) -> None:
    dtype, sums = pair
    rng = np.random.default_rng(rows * columns + rank)
    left, right = (rng.standard_normal(shape).astype(sums) for shape in ((rows, rank), (rank, columns)))
    tile = weight((rows + row + 2, columns + column + 1), dtype)
    before = tile.copy()
    assert Product(left, right, row, column, dtype).add_to(tile, 0)
    here = (slice(row, row + rows), slice(column, column + columns))
    exact = before[here].astype(np.longdouble) + left.astype(np.longdouble) @ right.astype(np.longdouble)
    # Half a unit in the last place for the rounding, and what a sum of so many terms may be off.
    kept = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]  # untyped upstream
    bound = np.maximum(np.abs(exact) * float(kept.eps), float(kept.smallest_subnormal)) / 2
    terms = np.abs(before[here].astype(np.longdouble)) + np.abs(left).astype(np.longdouble) @ np.abs(right)
    bound = bound + terms * (rank + 2) * float(np.finfo(sums).eps)
    assert (np.abs(tile[here].astype(np.longdouble) - exact) <= bound).all()
    before[here] = tile[here]
    assert tile.tobytes() == before.tobytes()  # nothing else was touched


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_a_sum_is_rounded_once(dtype: np.dtype[Any]) -> None:
    """Every number of the dtype, with sums that land on it, midway between it and the next, and just beside that."""
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        finite = every[np.isfinite(every.astype(np.float64))]
        step = np.nextafter(finite, dtype.type(np.inf)).astype(np.float64) - finite.astype(np.float64)
    stored, step = finite[np.isfinite(step)], step[np.isfinite(step)]
    for share in (0.0, 0.25, 0.5, np.nextafter(0.5, 0), np.nextafter(0.5, 1), 0.75, 1.5, -0.5, -0.3):
        tile = stored[:, None].copy()
        expected = round_to(stored.astype(np.float64) + share * step, ir.DataType.from_numpy(dtype))
        representable = np.isfinite(expected.astype(np.float64))
        product = Product((share * step)[:, None], np.ones((1, 1)), 0, 0, dtype)
        assert product.add_to(tile, 0) == representable.all()
        assert (tile[:, 0].view(np.uint16) == expected.view(np.uint16))[representable].all()


@each_kernel
@pytest.mark.parametrize("layout", [Layout(), TRANSPOSED], ids=["rows", "transposed"])
def test_the_bits_of_numpy(
    dtype: np.dtype[Any], sums: np.dtype[Any], layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums_in(sums, monkeypatch)
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
    assert fused.products_of([one], (8, 9), FP32, DOUBLE) is not None
    assert fused.products_of([one, two], (8, 9), FP32, DOUBLE) is None  # rounded together
    assert fused.products_of([one], (8, 9), FP32, SINGLE) is None  # sums that the kernel does not form
    assert fused.products_of([], (8, 9), FP32, DOUBLE) is None


@each_kernel
@pytest.mark.parametrize("where", [(0, 0), (7, 69), (5, 64)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(
    dtype: np.dtype[Any], sums: np.dtype[Any], where: tuple[int, int], bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums_in(sums, monkeypatch)
    base = weight((8, 70), dtype)
    base[where] = bad
    with pytest.raises(NumericsError, match=r"m\.weight"):
        tensor_of(base, bind(lora(8, 70, 3))).numpy()


@each_kernel
def test_the_largest_number_stays_and_what_rounds_up_from_it_does_not(
    dtype: np.dtype[Any], sums: np.dtype[Any]
) -> None:
    largest = ml_dtypes.finfo(dtype).max  # type: ignore[no-untyped-call]  # untyped upstream
    base = np.full((1, 64), largest, dtype)
    ulp = float(largest) - float(np.nextafter(largest, dtype.type(0)))
    for part, finite in ((0.49, True), (0.5, False)):
        factors = (np.array([[part * ulp]], sums), np.ones((1, 64), sums))
        assert Product(*factors, 0, 0, dtype).add_to(base.copy(), 0) is finite


def test_buffers_that_do_not_fit_are_refused() -> None:
    width = _kernels.width("float32", "float64")
    left, packed = np.ones((2, 3)), np.ones((1, 3, width))
    arguments: list[Any] = ["float32", "float64", np.zeros((2, 5), np.float32), 0, 2, 5, 5, left, packed, 3]
    assert _kernels.fold(*arguments)
    for index, wrong in ((2, np.zeros(9, np.float32)), (3, 1), (3, -1), (4, 3), (5, 6), (6, 4), (7, left[:1]), (9, 2)):
        changed = [*arguments[:index], wrong, *arguments[index + 1 :]]
        with pytest.raises(ValueError):
            _kernels.fold(*changed)
    with pytest.raises((TypeError, BufferError, ValueError)):
        _kernels.fold("float32", "float64", bytes(40), *arguments[3:])
    with pytest.raises(RuntimeError, match="no kernel"):
        _kernels.fold("float16", "float32", *arguments[2:])
    assert _kernels.width("float16", "float32") == _kernels.width("int8", "float64") == 0


def test_a_kernel_of_other_sources_counts_as_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "INTERFACE", 1)
    try:
        importlib.reload(kernel)
        assert not kernel.has_kernel(FP32, DOUBLE)
    finally:
        monkeypatch.undo()
        importlib.reload(kernel)
    assert kernel.has_kernel(FP32, DOUBLE)
