"""Grids: properties of any scheme, and onnxruntime's own quantizers as the authority on how scales are chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)
from onnxruntime.quantization.quant_utils import QuantType, compute_scale_zp, get_qmin_qmax_for_qType

from loracc.encodings.grid import Blocks, Grid, Rule, used_range
from loracc.encodings.packing import pack, unpack

Array = np.ndarray[Any, Any]


@given(st.sampled_from([2, 4, 8]), st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packing_round_trips(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert np.array_equal(unpack(packed, bits)[:, :count], codes)


@st.composite
def grids(draw: st.DrawFn) -> tuple[Grid, Array]:
    """Some grid of any kind, and codes on it."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 12)))
    axis = draw(st.sampled_from([None, 0, 1]))
    block = draw(st.integers(1, 5)) if axis is not None and draw(st.booleans()) else 0
    blocks = Blocks(shape, axis, block)
    low, high = draw(st.sampled_from([(-8, 7), (0, 15), (-128, 127), (0, 255)]))
    sizes = st.floats(2.0**-20, 1.0, width=32)
    scales = draw(hnp.arrays(np.float64, blocks.grid, elements=sizes))
    signs = draw(hnp.arrays(np.float64, blocks.grid, elements=st.sampled_from([-1.0, 1.0])))
    zeros = draw(hnp.arrays(np.float64, blocks.grid, elements=st.integers(low, high).map(float)))
    codes = draw(hnp.arrays(np.float64, shape, elements=st.integers(low, high).map(float)))
    return Grid(blocks, scales * signs, zeros, low, high), codes


@given(grids())
def test_the_nearest_code_of_a_codes_value_is_the_code(made: tuple[Grid, Array]) -> None:
    grid, codes = made
    assert np.array_equal(grid.nearest(grid.decode(codes)), codes)


@given(grids(), st.integers(0, 2**32 - 1))
def test_no_code_is_nearer(made: tuple[Grid, Array], seed: int) -> None:
    grid, codes = made
    values = grid.decode(codes) + np.random.default_rng(seed).standard_normal(codes.shape) / 8
    nearest = grid.nearest(values)
    distance = np.abs(grid.decode(nearest) - values)
    for step in (-1, 1):
        other = np.clip(nearest + step, grid.low, grid.high)
        assert (distance <= np.abs(grid.decode(other) - values) * (1 + 1e-9)).all()


@given(grids())
def test_rows_are_the_whole_in_parts(made: tuple[Grid, Array]) -> None:
    grid, codes = made
    step = grid.blocks.row_step
    spans = [(lo, min(lo + step, len(codes))) for lo in range(0, len(codes), step)]
    parts = [grid.part(lo, hi).decode(codes[lo:hi]) for lo, hi in spans]
    assert np.array_equal(np.concatenate(parts), grid.decode(codes))


@settings(max_examples=50)
@given(grids(), st.booleans())
def test_a_fitted_grid_holds_the_values(made: tuple[Grid, Array], symmetric: bool) -> None:
    """No value is further than half a step from its code's, beyond what rounding scale and zero point costs."""
    grid, codes = made
    middle = (grid.low + grid.high + 1) // 2
    grid = Grid(grid.blocks, np.abs(grid.scales), np.full_like(grid.zeros, middle), grid.low, grid.high)
    values = grid.decode(codes)
    rule = Rule(grid.low, grid.high, symmetric, negative_scales=False, scale_dtype=ir.DataType.FLOAT)
    least, most = (grid.blocks.reduce(function, values) for function in (np.minimum, np.maximum))
    fitted = rule.fit(least, most, grid)
    off = np.abs(fitted.decode(fitted.nearest(values)) - values)
    step = fitted.blocks.expand(np.abs(fitted.scales), len(values))
    assert (off <= (0.5 if symmetric else 1.0) * step * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_rule_is_that_of_onnxruntimes_blockwise_quantizer(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(bits)
    weight = rng.standard_normal((64, 6)).astype(np.float32)
    config = DefaultWeightOnlyQuantConfig(block_size=16, is_symmetric=symmetric, bits=bits)
    packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight)
    codes = unpack(packed.reshape(6, -1), bits)
    blocks, middle, high = Blocks((6, 64), 1, 16), 1 << bits - 1, (1 << bits) - 1
    theirs = np.full((6, 4), float(middle)) if symmetric else unpack(zeros, bits)[:, :4].astype(np.float64)
    old = Grid(blocks, np.ones((6, 4)), np.full((6, 4), float(middle)), 0, high)
    rule = Rule(0, high, symmetric, negative_scales=symmetric, scale_dtype=ir.DataType.FLOAT)
    values = weight.T.astype(np.float64)
    ours = rule.fit(blocks.reduce(np.minimum, values), blocks.reduce(np.maximum, values), old)
    np.testing.assert_allclose(ours.scales, scales, rtol=3e-7)
    assert np.array_equal(ours.zeros, theirs)
    assert np.mean(ours.nearest(values) == codes) > 0.99  # ties, and scales that differ in their last bit


RANGES: list[tuple[str, QuantType, bool, bool]] = [
    ("int8", QuantType.QInt8, True, False),
    ("int8 reduced", QuantType.QInt8, True, True),
    ("uint8", QuantType.QUInt8, False, False),
    ("uint8 reduced", QuantType.QUInt8, False, True),
    ("int16", QuantType.QInt16, True, False),
]


@pytest.mark.parametrize(("name", "kind", "symmetric", "reduced"), RANGES, ids=[row[0] for row in RANGES])
def test_the_rule_is_that_of_the_qdq_quantizer(name: str, kind: QuantType, symmetric: bool, reduced: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1, 32))
    low, high = (int(n) for n in get_qmin_qmax_for_qType(kind.tensor_type, reduced, symmetric))
    zero, scale = compute_scale_zp(values.min(), values.max(), np.array(low), np.array(high), symmetric)
    full = (0, 255) if name.startswith("uint8") else (-128, 127) if "8" in name else (-(2**15), 2**15 - 1)
    grid = Grid(Blocks((1, 32)), np.ones((1, 1)), np.zeros((1, 1)), *full)
    codes = np.clip(np.rint(values / scale) + zero, low, high).astype(int)
    middle = int(zero) if symmetric else (full[0] + full[1] + 1) // 2
    found = used_range(*full, int(codes.min()), int(codes.max()), middle)
    assert found == (low, high) or (symmetric and found[1] == high)
    rule = Rule(*found, symmetric, negative_scales=False, scale_dtype=ir.DataType.FLOAT)
    ours = rule.fit(values.min(keepdims=True), values.max(keepdims=True), grid)
    np.testing.assert_allclose(ours.scales.item(), float(scale), rtol=1e-6)
    assert ours.zeros.item() == float(zero)


@pytest.mark.parametrize("function", [np.minimum, np.maximum])
def test_reduce(function: np.ufunc) -> None:
    values = np.arange(12.0).reshape(3, 4)
    pick: Callable[[Array], float] = min if function is np.minimum else max
    assert Blocks((3, 4)).reduce(function, values).tolist() == [[pick(values.ravel())]]
    assert Blocks((3, 4), 1).reduce(function, values).tolist() == [[pick(values[:, i]) for i in range(4)]]
    assert Blocks((3, 4), 1, 3).reduce(function, values)[0].tolist() == [pick(values[0, :3]), pick(values[0, 3:])]
    assert Blocks((3, 4), 0, 2).reduce(function, values)[:, 0].tolist() == [pick(values[:2, 0]), pick(values[2:, 0])]
