"""What must hold for any shapes and values: tiles do not matter, ranks add up, blocks do not touch each other."""

from __future__ import annotations

import itertools
from io import BytesIO

import ml_dtypes
import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from loracc.deltas import DoRA, LowRank, Replacement
from loracc.dtypes import Array
from loracc.folded import Binding, FoldedTensor
from loracc.sites import TRANSPOSED, Layout, Site

DTYPE = st.sampled_from([np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)])
SIZE = st.integers(1, 40)
SEED = st.integers(0, 2**32 - 1)


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fold(stored: Array, *bound: tuple[Site, LowRank | DoRA | Replacement]) -> FoldedTensor:
    bindings = [Binding(site, delta, str(i), site.name, "name") for i, (site, delta) in enumerate(bound)]
    return FoldedTensor(ir.Tensor(stored, name="w"), bindings)


WHOLE, TURNED = Site("m", "weight", "linear", "w"), Site("m", "weight", "linear", "w", TRANSPOSED)


@settings(max_examples=60, deadline=None)
@given(
    out=SIZE,
    inner=SIZE,
    r=st.integers(1, 6),
    seed=SEED,
    dtype=DTYPE,
    turned=st.booleans(),
    dora=st.booleans(),
    data=st.data(),
)
def test_any_tiles_give_the_same_bytes(
    out: int, inner: int, r: int, seed: int, dtype: np.dtype[np.generic], turned: bool, dora: bool, data: st.DataObject
) -> None:
    inside = LowRank(random(seed, r, inner), random(seed + 1, out, r), 0.5)
    delta = DoRA(inside, np.abs(random(seed + 2, out)) + 0.1) if dora else inside
    w = random(seed + 3, out, inner).astype(dtype)
    tensor = fold(np.ascontiguousarray(w.T) if turned else w, (TURNED if turned else WHOLE, delta))
    whole = tensor.tobytes()
    rows = inner if turned else out
    cuts = sorted(data.draw(st.sets(st.integers(1, rows), max_size=5)) | {0, rows})
    pieces = [tensor.compute_rows(lo, hi).tobytes() for lo, hi in itertools.pairwise(cuts)]
    assert b"".join(pieces) == whole
    file = BytesIO()
    tensor.tofile(file)
    assert file.getvalue() == whole


@settings(max_examples=60, deadline=None)
@given(out=SIZE, inner=SIZE, ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=SEED)
def test_several_adapters_are_their_ranks_side_by_side(out: int, inner: int, ranks: list[int], seed: int) -> None:
    """Σ sᵢBᵢAᵢ = [s₁B₁ ... sₙBₙ]·[A₁; ...; Aₙ] (FORMATS.md 10), before the rounding."""
    deltas = [LowRank(random(seed + i, r, inner), random(seed + 50 + i, out, r), 0.3 + i) for i, r in enumerate(ranks)]
    stacked = LowRank(
        np.concatenate([d.a for d in deltas]).astype(np.float64),
        np.concatenate([d.b.astype(np.float64) * d.s for d in deltas], axis=1),
        1.0,
    )
    w = random(seed + 99, out, inner)
    one = fold(w, (WHOLE, stacked)).exact_rows(0, out)
    several = fold(w, *((WHOLE, delta) for delta in deltas)).exact_rows(0, out)
    np.testing.assert_allclose(several, one, rtol=1e-12, atol=1e-12 * np.abs(one).max())


@settings(max_examples=60, deadline=None)
@given(blocks=st.lists(st.integers(1, 9), min_size=2, max_size=4), inner=SIZE, seed=SEED, turned=st.booleans())
def test_blocks_are_folded_as_if_each_were_alone(blocks: list[int], inner: int, seed: int, turned: bool) -> None:
    """A fused QKV: every site changes its own rows only."""
    w = random(seed, sum(blocks), inner)
    bound, start, alone = [], 0, []
    for i, size in enumerate(blocks):
        delta = LowRank(random(seed + i, 2, inner), random(seed + 9 + i, size, 2), 0.7)
        site = Site(f"m{i}", "weight", "linear", "w", Layout((1, 0) if turned else (), start, start + size))
        alone.append(fold(w[start : start + size], (WHOLE, delta)).numpy())
        start += size
        if i:  # the first block has no adapter
            bound.append((site, delta))
    alone[0] = w[: blocks[0]]
    folded = fold(np.ascontiguousarray(w.T) if turned else w, *bound).numpy()
    np.testing.assert_allclose(folded.T if turned else folded, np.concatenate(alone), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal((folded.T if turned else folded)[: blocks[0]], w[: blocks[0]])


@settings(max_examples=30, deadline=None)
@given(out=SIZE, inner=SIZE, seed=SEED, dtype=DTYPE)
def test_a_replacement_takes_what_is_folded_on_top(
    out: int, inner: int, seed: int, dtype: np.dtype[np.generic]
) -> None:
    new, delta = random(seed, out, inner), LowRank(random(seed + 1, 2, inner), random(seed + 2, out, 2), 1.5)
    w = random(seed + 3, out, inner).astype(dtype)
    both = fold(w, (WHOLE, delta), (WHOLE, Replacement(new))).exact_rows(0, out)
    np.testing.assert_allclose(both, delta.apply(new.astype(both.dtype)), rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(out=SIZE, inner=SIZE, seed=SEED, weight=st.sampled_from([-1.0, 0.25, 0.7, 3.0]))
def test_strength_scales_the_change(out: int, inner: int, seed: int, weight: float) -> None:
    delta = LowRank(random(seed, 3, inner), random(seed + 1, out, 3), 0.5)
    w = random(seed + 2, out, inner)
    full, part = (fold(w, (WHOLE, d)).exact_rows(0, out) - w for d in (delta, delta.scaled(weight)))
    np.testing.assert_allclose(part, weight * full, rtol=1e-9, atol=1e-12)
