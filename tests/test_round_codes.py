"""The choice of codes of tiny weights, against every choice there is."""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from loracc.calibration.codes import round_codes
from loracc.calibration.second_moments import Moments, Sums
from loracc.calibration.weight import CalibrateOptions
from loracc.deltas import LowRank
from loracc.encodings.decoded import DecodedTensor
from loracc.encodings.encoded_weight import EncodedWeight
from loracc.encodings.grid import Blocks
from loracc.folded import Binding
from loracc.proof.chosen_codes import STEPS
from loracc.requantized import RequantizedTensor
from loracc.sites import Layout, Site

BITS = 2
LOW, HIGH = 0, (1 << BITS) - 1
INSIDE, OUTSIDE = 5, 32


def fold(rng: np.random.Generator, axis: int | None, block: int, *, turned: bool, packed: bool) -> RequantizedTensor:
    """A weight ``[out, in]`` (codes the other way round when ``turned``), its delta in the first columns only."""
    shape = (INSIDE, OUTSIDE) if turned else (OUTSIDE, INSIDE)
    blocks = Blocks(shape, axis, block)
    codes = rng.integers(LOW, HIGH + 1, (OUTSIDE, -(-INSIDE // 4) * 4) if packed else shape).astype(np.uint8)
    if packed:  # four codes a byte, the last ones pad
        codes = (codes.reshape(OUTSIDE, -1, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(-1).astype(np.uint8)
    scales = rng.uniform(0.2, 0.6, blocks.grid).astype(np.float32)
    zeros = None if packed else ir.tensor(rng.integers(1, 3, blocks.grid).astype(np.uint8))
    weight = EncodedWeight("w", "Op", ir.tensor(codes), ir.tensor(scales), zeros, blocks, BITS, packed, 2)
    a = rng.standard_normal((1, INSIDE)).astype(np.float32)
    a[:, 4:] = 0
    delta = LowRank(a, rng.standard_normal((OUTSIDE, 1)).astype(np.float32), 0.3)
    site = Site("w", "weight", "linear", "w", Layout((1, 0)) if turned else Layout())
    return RequantizedTensor(DecodedTensor(weight, "w", ir.DataType.FLOAT), [Binding(site, delta, "a", "k", "name")])


@given(
    seed=st.integers(0, 10_000),
    blocks=st.sampled_from([(None, 0), ("out", 0), ("in", 0), ("in", 4)]),
    turned=st.booleans(),
    rows=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_between_the_best_choice_and_nearest(
    *, seed: int, blocks: tuple[str | None, int], turned: bool, rows: int
) -> None:
    check(seed, blocks, turned=turned, rows=rows)


def test_most_draws_gain() -> None:
    """What is above is said of something: where inputs are few, most choices are better than nearest."""
    assert sum(check(seed, ("in", 4), turned=False, rows=2) for seed in range(20)) > 10


def check(seed: int, blocks: tuple[str | None, int], *, turned: bool, rows: int) -> bool:
    """One draw; whether the choice was better."""
    rng = np.random.default_rng(seed)
    name, block = blocks
    packed = name == "in" and block > 0 and not turned
    axis = None if name is None else int((name == "in") is not turned)
    tensor = fold(rng, axis, block, turned=turned, packed=packed)
    x = rng.standard_normal((rows, INSIDE))
    sums, moments = Sums(x.T @ x, 10_000), Moments(x.T @ x, None, 0.0, 10_000)
    with TemporaryDirectory() as folder:
        made = round_codes(tensor, sums, sums, Path(folder, "codes"), CalibrateOptions())
        ((_, _, codes),) = made.exact_codes_rows([(0, tensor.weight.shape[0])])
        ((_, _, nearest),) = tensor.exact_codes_rows([(0, tensor.weight.shape[0])])
        stored = made.parts()["codes"].numpy()
    assert codes.min() >= LOW and codes.max() <= HIGH
    exact = tensor.at_codes.numpy()
    whole = tensor.weight.spans()[0]
    grids = [tensor.settled.grid, made.settled.grid]
    before, after = (
        _errors(moments, grid.decode(chosen), exact, turned=turned)
        for grid, chosen in zip(grids, (nearest, codes), strict=True)
    )
    (gain,) = made.gains.values()
    if not gain.used:
        np.testing.assert_array_equal(codes, nearest)
        np.testing.assert_array_equal(grids[0].scales, grids[1].scales)
    assert after.sum() <= before.sum() + 1e-12
    # No other codes on the same grid do better than the best of all, row by row.
    best = _best(made, moments, exact, turned=turned)
    assert (after >= best - 1e-9).all()
    touched = np.broadcast_to(grids[0].blocks.expand(tensor.settled.touched, len(codes)), codes.shape)
    np.testing.assert_array_equal(codes[~touched], tensor.weight.read_codes(*whole)[~touched])
    if gain.used:
        ideal = np.clip(np.where(touched, grids[1].position(exact), codes), LOW, HIGH)
        assert np.abs(codes - ideal).max() <= STEPS + 1e-9
    if packed:
        np.testing.assert_array_equal(stored[:, -1] >> 2, tensor.weight.codes.numpy()[:, -1] >> 2)  # the padding
    return gain.used


def _errors(moments: Moments, values: np.ndarray, exact: np.ndarray, *, turned: bool) -> np.ndarray:
    """Of each output."""
    off = (values - exact).T if turned else values - exact
    result: np.ndarray = np.einsum("oi,ij,oj->o", off, moments.own, off)
    return result


def _best(made: RequantizedTensor, moments: Moments, exact: np.ndarray, *, turned: bool) -> np.ndarray:
    """The least error of each output over all codes, whatever stays or is far."""
    grid = made.settled.grid
    least = np.full(OUTSIDE, np.inf)
    for row in itertools.product(range(LOW, HIGH + 1), repeat=INSIDE):
        codes = np.broadcast_to(np.array(row), (OUTSIDE, INSIDE))
        values = grid.decode(np.ascontiguousarray(codes.T if turned else codes))
        least = np.minimum(least, _errors(moments, values, exact, turned=turned))
    return least
